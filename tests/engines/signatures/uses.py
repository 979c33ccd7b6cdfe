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


class _Foreign(ast.NodeVisitor):
    """What a module touches of objects that are not its own: those that have no type but ``Any``.

    Foreign is what is annotated so, what ``load_package`` returns, and what comes out of something
    foreign: by an attribute, an entry, a call, an iteration, an assignment.
    """

    def __init__(self) -> None:
        self.names = {"load_package"}
        self.touched: set[str] = set()

    def is_foreign(self, node: ast.AST | None) -> bool:  # noqa: PLR0911 - one line for each kind
        match node:
            case ast.Name(id=name):
                return name in self.names
            case ast.Attribute(attr=attr, value=ast.Name(id="self")):
                return f"self.{attr}" in self.names
            case ast.BoolOp(values=values):
                return any(self.is_foreign(value) for value in values)
            case ast.Call(func=ast.Name(id="partial"), args=[first, *_]):
                return self.is_foreign(first)
            case ast.Call(func=inner):
                return self.is_foreign(inner)
            case ast.Attribute(value=inner) | ast.Subscript(value=inner) | ast.Await(value=inner):
                return self.is_foreign(inner)
        return False

    def bind(self, target: ast.AST) -> None:
        match target:
            case ast.Name(id=name):
                self.names.add(name)
            case ast.Attribute(attr=attr, value=ast.Name(id="self")):
                self.names.add(f"self.{attr}")

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if _says_any(node.returns):
            self.names.add(f"self.{node.name}")
        for given in (*node.args.args, *node.args.kwonlyargs):
            if _says_any(given.annotation):
                self.names.add(given.arg)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if self.is_foreign(node.value):
            for target in node.targets:
                self.bind(target)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if self.is_foreign(node.value) or ast.unparse(node.annotation) == "Any":
            self.bind(node.target)
        self.generic_visit(node)

    def _iterated(self, node: ast.For | ast.AsyncFor | ast.comprehension) -> None:
        if self.is_foreign(node.iter):
            self.bind(node.target)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._iterated(node)

    def visit_AsyncFor(self, node: ast.AsyncFor) -> None:
        self._iterated(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._iterated(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self.is_foreign(node.value):
            self.touched.add(node.attr)
        self.generic_visit(node)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        match node:
            case ast.Subscript(value=inner, slice=ast.Constant(value=str(key)), ctx=ast.Load()):
                if self.is_foreign(inner):
                    self.touched.add(key)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(
                func=ast.Attribute(attr="get", value=inner),
                args=[ast.Constant(value=str(key)), *_],
            ) if self.is_foreign(inner):
                self.touched.add(key)
        self.generic_visit(node)


def _says_any(annotation: ast.AST | None) -> bool:
    return annotation is not None and "Any" in ast.unparse(annotation).replace("NDArray[Any]", "")


def touched(tree: ast.Module) -> set[str]:
    """Attributes and keys that a module reads of foreign objects, by name."""
    visitor = _Foreign()
    before = -1
    # What a name stands for may be said behind its use.
    while before != len(visitor.names):
        before = len(visitor.names)
        visitor.visit(tree)
    return visitor.touched
