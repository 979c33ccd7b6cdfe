"""What an adapter uses of its engine's package, found in the adapter's own source."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def tree_of(module: str) -> ast.Module:
    """The source of ``shards/engines/<module>.py``."""
    return ast.parse((ROOT / "shards" / "engines" / f"{module}.py").read_text())


def keys_of(module: str, function: str) -> set[str]:
    """Texts that a function writes as keys of a dictionary."""
    found: set[str] = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef) and node.name == function:
            for part in ast.walk(node):
                match part:
                    case ast.Dict(keys=keys):
                        found |= {key.value for key in keys if isinstance(key, ast.Constant)}
                    case ast.Subscript(slice=ast.Constant(value=str(key)), ctx=ast.Store()):
                        found.add(key)
    assert found, f"{module} has no {function} that fills a dictionary"
    return found


def call_keywords(module: str, name: str) -> set[str]:
    """Keywords of all calls of a method of that name."""
    found: set[str] = set()
    for node in ast.walk(tree_of(module)):
        match node:
            case ast.Call(func=ast.Attribute(attr=attr), keywords=keywords) if attr == name:
                found |= {keyword.arg for keyword in keywords if keyword.arg}
    assert found, f"{module} never calls {name} with keywords"
    return found


def names_read(module: str, owner: str) -> set[str]:
    """Attributes that are read of a name, or of an attribute of that name."""
    found: set[str] = set()
    for node in ast.walk(tree_of(module)):
        match node:
            case ast.Attribute(attr=attr, value=ast.Name(id=name)) if name == owner:
                found.add(attr)
            case ast.Attribute(attr=attr, value=ast.Attribute(attr=name)) if name == owner:
                found.add(attr)
    return found
