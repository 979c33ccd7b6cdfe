"""Records what an engine's package promises: names, parameters and fields, from its source.

    python -m tests.engines.signatures.record sglang PATH            # shows what differs
    python -m tests.engines.signatures.record sglang PATH --write    # records it anew

PATH is an unpacked wheel or a checkout. Nothing of it is imported or run. A recorded file
(``<engine>.json`` beside this one) lists, for each source file, its sha256 and what was looked up
in it; ``version`` and ``source`` say where it came from. No text of the package is kept. Of
TensorRT-LLM only the pages could be read on which a release's documentation lists its source: they
have a commit in place of the hash.
``origin`` does the same from a public repository.

What to look up is named in ``WANTED``: a class's fields, a function's or method's parameters, the
names that a module offers. Fields that a class inherits are looked up where they are written.
"""

import argparse
import ast
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from tests.engines.signatures.wanted import WANTED

HERE = Path(__file__).parent


def record(engine: str, root: Path) -> dict[str, Any]:
    """What ``WANTED`` names, as it is under ``root``. Raises ``LookupError`` for what is not."""
    return {path: record_file(root / path, wanted) for path, wanted in WANTED[engine].items()}


def record_file(path: Path, wanted: dict[str, list[str]]) -> dict[str, Any]:
    """One source file: its hash, and what is wanted of it."""
    data = path.read_bytes()
    tree = ast.parse(data)
    found: dict[str, Any] = {"sha256": hashlib.sha256(data).hexdigest()}
    readers = {
        "names": lambda name: name in _offered(tree) or _missing(path, name),
        "classes": lambda name: _fields(_find(tree, name, path)),
        "functions": lambda name: _parameters(_find(tree, name, path)),
        "keys": lambda name: _keys(_find(tree, name, path)),
        "options": lambda name: _options(_find(tree, name, path)),
        "keywords": lambda name: _keywords(_find(tree, name, path)),
        "attributes": lambda name: _attributes(_find(tree, name, path)),
        "calls": lambda name: _sent(_find(tree, name.rpartition(".")[0], path), name, path),
        "constants": lambda name: _constant(_find(tree, name.rpartition(".")[0], path), name, path),
    }
    for kind, names in wanted.items():
        found[kind] = {name: readers[kind](name) for name in names}
    return found


def _missing(path: Path, name: str) -> bool:
    raise LookupError(f"{path} has no {name}")


def _find(tree: ast.Module, name: str, path: Path) -> ast.AST:
    """A class, a function or a module's constant, by its dotted name."""
    scope: Any = tree
    for part in name.split("."):
        inside = [node for node in scope.body if part in _named(node)]
        if not inside:
            _missing(path, name)
        # Of overloads and properties with setters the first says enough.
        scope = inside[0]
    found: ast.AST = scope
    return found


def _named(node: ast.AST) -> list[str]:
    """What a statement gives a name to."""
    targets = node.targets if isinstance(node, ast.Assign) else ()
    named = [target.id for target in targets if isinstance(target, ast.Name)]
    return [getattr(node, "name", ""), *named]


def _offered(tree: ast.Module) -> set[str]:
    """Names that a module binds, lists, or offers lazily as a text."""
    found: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.alias(name=name, asname=alias):
                found.add(alias or name)
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                found.add(name)
            case ast.Name(id=name, ctx=ast.Store()):
                found.add(name)
            case ast.Constant(value=str(text)) if text.isidentifier():
                found.add(text)
    return found


def _fields(node: Any) -> list[str]:
    """Annotated fields of a class, in order."""
    return [
        line.target.id
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    ]


def _parameters(node: Any) -> dict[str, list[str]]:
    """Names of a function's parameters; ``*`` and ``**`` where it takes any."""
    given = node.args
    positional = [one.arg for one in (*given.posonlyargs, *given.args)]
    rest = [f"*{given.vararg.arg}"] if given.vararg else []
    rest += [f"**{given.kwarg.arg}"] if given.kwarg else []
    return {"positional": positional, "keyword": [one.arg for one in given.kwonlyargs] + rest}


def _attributes(node: ast.AST) -> list[str]:
    """Attributes that a method sets on its object, sorted."""
    found = {
        part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute)
        and isinstance(part.ctx, ast.Store)
        and isinstance(part.value, ast.Name)
        and part.value.id == "self"
    }
    return sorted(found)


def _keywords(node: ast.AST) -> list[str]:
    """Keywords of all calls in a function, sorted: what it makes its answer of."""
    return sorted(
        {part.arg for part in ast.walk(node) if isinstance(part, ast.keyword) and part.arg}
    )


def _sent(node: ast.AST, name: str, path: Path) -> list[str]:
    """Names that a method gives, in order, to the attribute that it calls last by that name."""
    wanted = name.rpartition(".")[2]
    sent = [
        [given.id for given in part.args if isinstance(given, ast.Name)]
        for part in ast.walk(node)
        if isinstance(part, ast.Call)
        and isinstance(part.func, ast.Attribute)
        and part.func.attr == wanted
    ]
    if not sent:
        _missing(path, name)
    return sent[-1]


def _constant(node: ast.AST, name: str, path: Path) -> str:
    """The constant that a function gives, as a keyword of that name, to what it calls."""
    wanted = name.rpartition(".")[2]
    for part in ast.walk(node):
        match part:
            case ast.keyword(arg=str(given), value=ast.Constant(value=value)) if given == wanted:
                return repr(value)
    _missing(path, name)
    return ""


def _keys(node: ast.AST) -> list[str]:
    """Texts that are keys of dictionaries written in a function, sorted."""
    found: set[str] = set()
    for part in ast.walk(node):
        match part:
            case ast.Dict(keys=keys):
                found.update(key.value for key in keys if isinstance(key, ast.Constant))
            case ast.Subscript(slice=ast.Constant(value=str(key)), ctx=ast.Store()):
                found.add(key)
    return sorted(found)


def _options(node: ast.AST) -> list[str]:
    """Names that a function takes out of its ``kwargs``, sorted."""
    found: set[str] = set()
    for part in ast.walk(node):
        match part:
            case ast.Call(
                func=ast.Attribute(attr="pop", value=ast.Name(id="kwargs")),
                args=[ast.Constant(value=str(name)), *_],
            ):
                found.add(name)
    return sorted(found)


def load(engine: str) -> dict[str, Any]:
    """What is recorded of an engine."""
    found: dict[str, Any] = json.loads((HERE / f"{engine}.json").read_text())
    return found


# Where a file was read that could not be had as a whole; a commit stands for its contents.
_NOTES = ("commit", "page", "chars")


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """One line for each value that differs; a hash that was never recorded agrees with any."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            if key in _NOTES or (key == "sha256" and old.get(key) is None):
                continue
            lines += differences(old.get(key), new.get(key), f"{where}/{key}")
        return lines
    return [] if old == new else [f"{where}: recorded {old}, found {new}"]


def main(arguments: list[str]) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("engine", choices=sorted(WANTED))
    parser.add_argument("path", type=Path)
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args(arguments)
    old = load(given.engine)
    try:
        new = record(given.engine, given.path)
    except (LookupError, OSError) as error:
        sys.stderr.write(f"{given.engine}: {error}\n")
        return 2
    lines = differences(old["files"], new)
    sys.stdout.write(("\n".join(lines) or "as recorded") + "\n")
    if given.write:
        text = json.dumps({**old, "files": new}, indent=1)
        (HERE / f"{given.engine}.json").write_text(text + "\n")
    return 0 if not lines or given.write else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
