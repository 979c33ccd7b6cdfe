"""The structural rules of the project, as functions from a source file to complaints.

``test_tidy`` applies them to every file, and shows that each catches a bad sample.
"""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("router", "shards", "deploy", "tls", "tests", "benchmarks")
PRODUCT = ("router", "shards", "deploy", "tls")
SERVERS = ("router", "shards", "tls")
FILE_LINES_MAX = 400
FUNCTION_LINES_MAX = 60

CORE_IMPORTS = {
    *("bisect", "collections", "collections.abc", "dataclasses", "enum", "heapq", "typing"),
}
CORE_NAMES = {"open", "print", "input", "float", "id", "hash", "globals", "vars", "__import__"}
# Calls that keep the order of what they are given; sorted(), len(), min() and max() do not.
ORDERED = {"list", "tuple", "iter", "enumerate", "zip", "map", "filter", "dict", "deque", "next"}
UNSAFE_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
QUEUES = {"Queue", "LifoQueue", "PriorityQueue"}
BOUNDED = "# bounded by "
# Methods of a set, or of a dictionary's keys, that give another set.
SET_METHODS = {"union", "intersection", "difference", "symmetric_difference", "copy"}
# A field or a method in a .proto file.
DECLARED = re.compile(
    r"(?:^|\{ )(?:(?:(?:(?:optional|repeated) )?[\w.]+|map<.*>) (\w+) = \d+;|rpc (\w+))"
)
# Protocols of others, which their own documents describe.
FOREIGN_PROTOS = ("fmaas", "kserve")


@dataclass(frozen=True)
class Source:
    """One Python file: its path from the root, its text and its tree."""

    path: PurePosixPath
    text: str
    tree: ast.Module

    @property
    def folder(self) -> str:
        """The top-level folder."""
        return self.path.parts[0]

    @property
    def product(self) -> bool:
        """Whether it is shipped."""
        return self.folder in PRODUCT

    @property
    def core(self) -> bool:
        """Whether the rules of the pure core hold."""
        return self.path.parts[:2] == ("router", "core")


Rule = Callable[[Source], Iterator[str]]


def source(path: str, text: str) -> Source:
    """A file as the rules see it."""
    return Source(PurePosixPath(path), text, ast.parse(text))


def sources() -> list[Source]:
    """All Python files of the project.

    Generated code (folders named v1) is nobody's style; hidden folders hold what was downloaded.
    """
    files = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return [
        source(path.relative_to(ROOT).as_posix(), path.read_text())
        for path in files
        if not any(part == "v1" or part[0] == "." for part in path.relative_to(ROOT).parts)
    ]


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and full name of everything imported; relative imports start with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")
        elif isinstance(node, ast.Call) and target_name(node.func) == "import_module":
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if is_text(arg))


def is_text(node: ast.AST) -> bool:
    """Whether an expression is a text that stands there."""
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def importing(src: Source) -> Iterator[str]:
    """Router knows only the contract of shards; shards know nothing of the router."""
    for line, name in imports(src.tree):
        top = name.split(".")[0]
        if src.product and name.startswith("."):
            yield f"{line}: imports are absolute"
        if top == "proto":
            yield f"{line}: proto/ holds no Python"
        if src.folder == "router" and top == "shards" and not f"{name}.".startswith("shards.v1."):
            yield f"{line}: router imports of shards only shards.v1, not {name}"
        if src.folder == "shards" and top == "router":
            yield f"{line}: shards import nothing of router"
        if src.folder in SERVERS and top == "deploy":
            yield f"{line}: {src.folder} does not import {top}"
        if src.product and top in ("tests", "benchmarks"):
            yield f"{line}: {top} is not shipped, and {src.folder} is"
        if src.folder == "tls" and top in ("router", "shards"):
            yield f"{line}: tls imports nothing of {top}"
        if src.product and top in UNSAFE_IMPORTS:
            yield f"{line}: {name} runs code that it reads"
        if src.core and name not in CORE_IMPORTS and not f"{name}.".startswith("router.core."):
            yield f"{line}: the core does not import {name}"
    if src.folder == "router":
        yield from (f"{line}: router imports of shards only shards.v1" for line in named(src.tree))


def named(tree: ast.AST) -> Iterator[int]:
    """Lines with ``from shards import`` anything but v1."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "shards":
            yield from (node.lineno for alias in node.names if alias.name != "v1")


def purity(src: Source) -> Iterator[str]:
    """The core has no await, I/O, float or order that differs between processes."""
    if not src.core:
        return
    for node in ast.walk(src.tree):
        match node:
            case ast.AsyncFunctionDef() | ast.Await() | ast.AsyncFor() | ast.AsyncWith():
                yield f"{node.lineno}: no async in the core"
            case ast.Constant(value=float()):
                yield f"{node.lineno}: no float in the core"
            case ast.BinOp(op=ast.Div()) | ast.AugAssign(op=ast.Div()):
                yield f"{node.lineno}: no true division in the core"
            case ast.Name(id=name) if name in CORE_NAMES:
                yield f"{node.lineno}: no {name} in the core"
    yield from (f"{line}: iterates over a set" for line in set_iterations(src.tree))


def set_iterations(tree: ast.AST) -> Iterator[int]:
    """Lines where something goes through a set in its own order."""
    known = set_names(tree)
    for node in ast.walk(tree):
        match node:
            case ast.For(iter=walked) | ast.comprehension(iter=walked) | ast.Starred(value=walked):
                walked_all = [walked]
            case ast.Call(func=ast.Name(id=name), args=arguments) if name in ORDERED:
                walked_all = arguments
            case ast.Call(func=ast.Attribute(attr="pop", value=value), args=[]):
                walked_all = [value]
            case _:
                continue
        yield from (walked.lineno for walked in walked_all if is_set(walked, known))


def set_names(tree: ast.AST) -> set[str]:
    """Names and attributes that are annotated as sets, or assigned one, anywhere in the file."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.AnnAssign(target=target, annotation=kind) if is_set_type(kind):
                found.add(target_name(target))
            case ast.arg(arg=name, annotation=kind) if kind is not None and is_set_type(kind):
                found.add(name)
            case ast.Assign(targets=targets, value=value) if is_set(value, set()):
                found.update(map(target_name, targets))
    return found - {""}


def target_name(node: ast.AST) -> str:
    """The last part of a name: ``x`` of both ``x`` and ``self.x``."""
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def is_set_type(node: ast.AST) -> bool:
    """Whether an annotation names a set, at its outermost."""
    outer = node.value if isinstance(node, ast.Subscript) else node
    return target_name(outer) in {"set", "frozenset", "Set", "AbstractSet", "MutableSet"}


def is_set(node: ast.AST, known: set[str]) -> bool:
    """Whether an expression is a set, as far as its text says."""
    match node:
        case ast.Set() | ast.SetComp():
            return True
        case ast.Call(func=ast.Name(id="set" | "frozenset")):
            return True
        case ast.Call(func=ast.Attribute(attr=attr, value=value)) if attr in SET_METHODS:
            operands = [value]
        case ast.BinOp(op=ast.BitOr() | ast.BitAnd() | ast.BitXor() | ast.Sub()):
            operands = [node.left, node.right]
        case _:
            return target_name(node) in known
    return any(is_keys(operand) or is_set(operand, known) for operand in operands)


def is_keys(node: ast.AST) -> bool:
    """Whether an expression is the keys of a dictionary, which lose their order in a union."""
    return isinstance(node, ast.Call) and target_name(node.func) == "keys"


def lengths(src: Source) -> Iterator[str]:
    """Files and functions that fit into a head. Tests may tell a long story in one function."""
    lines = len(src.text.splitlines())
    if lines > FILE_LINES_MAX:
        yield f"1: {lines} lines; {FILE_LINES_MAX} are the most"
    for node in ast.walk(src.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and src.folder != "tests":
            count = (node.end_lineno or node.lineno) - node.lineno + 1
            if count > FUNCTION_LINES_MAX:
                yield f"{node.lineno}: {node.name} has {count} lines; {FUNCTION_LINES_MAX} at most"


def docstrings(src: Source) -> Iterator[str]:
    """Every module, and every public class and function in it, says what it is."""
    if not src.product:
        return
    if src.text.strip() and ast.get_docstring(src.tree) is None:
        yield "1: the module has no docstring"
    yield from undocumented(src.tree)


def undocumented(scope: ast.Module | ast.ClassDef) -> Iterator[str]:
    """Public definitions without a docstring; functions inside functions are private."""
    for node in scope.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        names = {target_name(decorator) for decorator in node.decorator_list}
        if node.name.startswith("_") or names & {"overload", "setter"}:
            continue
        if ast.get_docstring(node) is None:
            yield f"{node.lineno}: {node.name} has no docstring"
        if isinstance(node, ast.ClassDef):
            yield from undocumented(node)


def calls(src: Source) -> Iterator[str]:
    """No prints in servers, no code from data, no queue without an end."""
    servers = src.folder in SERVERS and src.path.name not in ("__main__.py", "cli.py")
    lines = src.text.splitlines()
    for node in ast.walk(src.tree):
        if not isinstance(node, ast.Call):
            continue
        name, bare = target_name(node.func), isinstance(node.func, ast.Name)
        if servers and bare and name == "print":
            yield f"{node.lineno}: servers log, they do not print"
        if bare and name in ("eval", "exec"):
            yield f"{node.lineno}: {name} runs code that it reads"
        if name in QUEUES and not (node.args or any(key.arg == "maxsize" for key in node.keywords)):
            yield f"{node.lineno}: {name} without maxsize"
        if src.product and name == "SimpleQueue" and BOUNDED not in lines[node.lineno - 1]:
            yield f"{node.lineno}: SimpleQueue has no maxsize; say behind it what bounds it"
        if any(key.arg == "trust_remote_code" for key in node.keywords):
            yield f"{node.lineno}: remote code is never trusted"


def leftovers(src: Source) -> Iterator[str]:
    """Work that is not done is an issue, not a comment."""
    for number, line in enumerate(src.text.splitlines(), start=1):
        comment = line.partition("#")[2]
        yield from (f"{number}: {word}" for word in ("TO" + "DO", "FIX" + "ME") if word in comment)


RULES: tuple[Rule, ...] = (importing, purity, lengths, docstrings, calls, leftovers)


def own_protos() -> list[Path]:
    """The .proto files that are the reference for every field in them."""
    paths = (ROOT / "proto").rglob("*.proto")
    return sorted(path for path in paths if path.parent.parent.name not in FOREIGN_PROTOS)


def uncommented(text: str) -> Iterator[str]:
    """Fields and methods of a .proto file above which no full sentence says what they are."""
    comment: list[str] = []
    for number, line in enumerate(map(str.strip, text.splitlines()), start=1):
        if line.startswith("//"):
            comment.append(line.removeprefix("//").strip())
            continue
        found = DECLARED.search(line)
        said, comment = " ".join(comment), []
        if found and not (re.match(r'[A-Z"]', said) and said.endswith(".") and said.count(" ") > 2):
            yield f"{number}: {found[1] or found[2]} has no sentence that says what it is"
