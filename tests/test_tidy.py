"""Keeps the structure of the project: imports, purity, size, docstrings. The rules: ``tidy.py``."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from tests import tidy

VERBS = (
    *("help", "setup", "run", "test", "check", "proto", "proto-check", "lint", "type", "sim"),
    *("replay", "bench", "clean"),
)
SOURCES = tidy.sources()


@pytest.mark.parametrize("rule", tidy.RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule: tidy.Rule) -> None:
    complaints = [f"{src.path}:{text}" for src in SOURCES for text in rule(src)]
    assert not complaints, "\n" + "\n".join(complaints)


def test_the_rules_see_the_whole_project() -> None:
    seen = {src.folder for src in SOURCES}
    assert {"router", "shards", "deploy", "tls", "tests"} <= seen
    assert any(src.core for src in SOURCES)
    assert not any("v1" in src.path.parts for src in SOURCES)


GOOD = {
    "router/driver.py": '"""D."""\nfrom shards.v1 import shard_pb2\nimport asyncio\n',
    "deploy/cli.py": '"""C."""\nimport router.app\nimport shards.engines\n',
    "router/core/ledger.py": (
        '"""L."""\n'
        "from collections import deque\n"
        "from router.core.events import Reason\n"
        "def total(held: set[int], order: list[int]) -> int:\n"
        '    """T."""\n'
        "    return sum(sorted(held)) // 2 + len(held) + sum(x for x in order if x in held)\n"
    ),
    "shards/worker.py": '"""W."""\nimport asyncio\nqueue = asyncio.Queue(maxsize=3)\n',
    "shards/thread.py": '"""T."""\nqueue = SimpleQueue()  # bounded by put()\n',
}
BAD = [
    (tidy.importing, "router/driver.py", "import shards.worker"),
    (tidy.importing, "router/driver.py", "from shards import engines"),
    (tidy.importing, "router/driver.py", "from shards.engines.base import Plan"),
    (tidy.importing, "router/driver.py", "def f():\n    import deploy.cli"),
    (tidy.importing, "router/driver.py", "from . import link"),
    (tidy.importing, "shards/worker.py", "from router.errors import Fault"),
    (tidy.importing, "tls/files.py", "from router.config import Settings"),
    (tidy.importing, "tls/files.py", "from shards.v1 import shard_pb2"),
    (tidy.importing, "tls/files.py", "import deploy.cli"),
    (tidy.importing, "tests/test_x.py", "import proto"),
    (tidy.importing, "deploy/cli.py", "from tests import tidy"),
    (tidy.importing, "deploy/cli.py", "import benchmarks.load"),
    (tidy.importing, "shards/worker.py", "import deploy.cli"),
    (tidy.importing, "shards/worker.py", "importlib.import_module('router.errors')"),
    (tidy.importing, "router/driver.py", "x = import_module('shards.engines')"),
    (tidy.importing, "deploy/cli.py", "import pickle"),
    (tidy.importing, "router/core/plan.py", "import time"),
    (tidy.importing, "router/core/plan.py", "from random import random"),
    (tidy.importing, "router/core/plan.py", "import logging"),
    (tidy.importing, "router/core/plan.py", "from router.driver import Driver"),
    (tidy.importing, "router/core/plan.py", "from collections.evil import x"),
    (tidy.purity, "router/core/plan.py", "async def f(): pass"),
    (tidy.purity, "router/core/plan.py", "print(1)"),
    (tidy.purity, "router/core/plan.py", "open('x')"),
    (tidy.purity, "router/core/plan.py", "x = 0.5"),
    (tidy.purity, "router/core/plan.py", "x = 1 / 2"),
    (tidy.purity, "router/core/plan.py", "x = 1\nx /= 2"),
    (tidy.purity, "router/core/plan.py", "x = float(3)"),
    (tidy.purity, "router/core/plan.py", "for x in {1, 2}: pass"),
    (tidy.purity, "router/core/plan.py", "y = [x for x in set([1])]"),
    (tidy.purity, "router/core/plan.py", "def f(held: frozenset[int]):\n    return list(held)"),
    (tidy.purity, "router/core/plan.py", "class C:\n  a: set[int]\n  b = [x for x in C.a]"),
    (tidy.purity, "router/core/plan.py", "def f(self):\n    self.a = {1}\n    list(self.a)"),
    (tidy.purity, "router/core/plan.py", "a = set()\nfor x in a | b: pass"),
    (tidy.purity, "router/core/plan.py", "a = {1}\nb = [*a]"),
    (tidy.purity, "router/core/plan.py", "a = {1}\nb = a.pop()"),
    (tidy.purity, "router/core/plan.py", "def f(a: set[int]):\n    return tuple(a.union([1]))"),
    (tidy.purity, "router/core/plan.py", "def f(a: set[int]):\n    return list(a.copy())"),
    (tidy.purity, "router/core/plan.py", "for x in {1} ^ {2}: pass"),
    (tidy.purity, "router/core/plan.py", "for x in {}.keys() - {}.keys(): pass"),
    (tidy.purity, "router/core/plan.py", "async def f():\n    await g()"),
    (tidy.purity, "router/core/plan.py", "def f():\n    return hash('x')"),
    (tidy.lengths, "router/driver.py", "\n" * 401),
    (tidy.lengths, "tests/test_x.py", "\n" * 401),
    (tidy.lengths, "router/driver.py", "def f():\n" + "    x = 1\n" * 60),
    (tidy.docstrings, "router/driver.py", "x = 1"),
    (tidy.docstrings, "shards/worker.py", '"""W."""\ndef public(): pass'),
    (tidy.docstrings, "deploy/cli.py", '"""W."""\nclass C:\n    """C."""\n    def f(self): pass'),
    (tidy.calls, "router/driver.py", "print('x')"),
    (tidy.calls, "tls/files.py", "print('x')"),
    (tidy.calls, "deploy/cli.py", "eval('1')"),
    (tidy.calls, "tests/test_x.py", "exec('1')"),
    (tidy.calls, "router/driver.py", "asyncio.Queue()"),
    (tidy.calls, "shards/worker.py", "Queue()"),
    (tidy.calls, "shards/worker.py", "queue.SimpleQueue()"),
    (tidy.calls, "shards/worker.py", "load(trust_remote_code=True)"),
    (tidy.leftovers, "tests/test_x.py", "x = 1  # TO" + "DO later"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "path", "text"), BAD)
def test_a_bad_sample_is_caught(rule: tidy.Rule, path: str, text: str) -> None:
    assert list(rule(tidy.source(path, text)))


@pytest.mark.parametrize("rule", tidy.RULES, ids=lambda rule: rule.__name__)
def test_a_good_sample_passes(rule: tidy.Rule) -> None:
    for path, text in GOOD.items():
        assert not list(rule(tidy.source(path, text))), path


def test_proto_holds_nothing_but_proto_files() -> None:
    files = [path for path in (tidy.ROOT / "proto").rglob("*") if path.is_file()]
    assert files
    assert {path.suffix for path in files} == {".proto"}


def test_every_proto_file_has_generated_code_beside_its_users() -> None:
    for path in (tidy.ROOT / "proto").rglob("*.proto"):
        stem = tidy.ROOT / path.relative_to(tidy.ROOT / "proto").with_suffix("")
        for suffix in ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py"):
            assert stem.with_name(stem.name + suffix).is_file()


def test_all_generated_code_has_its_proto_file() -> None:
    for folder in tidy.PRODUCT:
        for path in (tidy.ROOT / folder).rglob("*_pb2*.py*"):
            stem = re.sub(r"_pb2(_grpc)?\.pyi?$", "", path.relative_to(tidy.ROOT).as_posix())
            assert "__pycache__" in stem or (tidy.ROOT / "proto" / f"{stem}.proto").is_file(), path


def test_every_field_and_method_of_the_protocols_is_described_in_sentences() -> None:
    assert len(tidy.own_protos()) >= 4
    missing = [f"{p}:{text}" for p in tidy.own_protos() for text in tidy.uncommented(p.read_text())]
    assert not missing, "\n" + "\n".join(missing)


@pytest.mark.parametrize("said", ["", "// 0 is off.\n", "// Of the tokens that there are\n"])
@pytest.mark.parametrize(
    "line",
    [
        *("uint32 x = 1;", "repeated a.v1.B x = 2;", "map<uint32, float> x = 3;", "rpc X(A) {"),
        "message B { uint32 x = 1; }",
    ],
)
def test_a_field_without_a_sentence_is_caught(said: str, line: str) -> None:
    assert list(tidy.uncommented(f"// Above the message.\nmessage A {{\n{said}{line}\n}}\n"))
    assert not list(tidy.uncommented(f"message A {{\n// It is what is meant here.\n{line}\n}}\n"))


def test_every_file_has_its_line_in_the_architecture_page() -> None:
    page = (tidy.ROOT / "docs" / "architecture.md").read_text()
    named, folder = set[str](), ""
    for row in re.findall(r"^\| (`.*?) \| ", page.partition("## The files")[2], re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", row):
            folder, _, last = name.rpartition("/") if "/" in name else (folder, "", name)
            named.add(f"{folder}/{last}" if last else name)
    files = {
        src.path.as_posix() for src in SOURCES if src.product and src.path.name != "__init__.py"
    }
    native = (one for kind in ("*.cpp", "*.h") for one in (tidy.ROOT / "shards").rglob(kind))
    files |= {path.relative_to(tidy.ROOT).as_posix() for path in native}
    assert not sorted(files - named)
    assert not [name for name in named if "." in name and not (tidy.ROOT / name).exists()]


def test_makefile_has_the_verbs_and_help_lists_them() -> None:
    makefile = (tidy.ROOT / "Makefile").read_text()
    listed = re.findall(r"^([a-z-]+):.*## ", makefile, flags=re.MULTILINE)
    assert set(VERBS) <= set(listed)
    shown = subprocess.run(
        ["make", "-C", tidy.ROOT], capture_output=True, text=True, check=True
    ).stdout
    assert all(f"make {verb} " in shown for verb in VERBS)


def test_clean_removes_nothing_beside_a_checkout_whose_path_has_a_space(tmp_path: Path) -> None:
    """``rm -rf /home/me/our server/.roundhouse`` would be two folders."""
    checkout, beside = tmp_path / "our server", tmp_path / "our"
    for folder in (checkout / ".roundhouse", checkout / ".venv", checkout / "kept", beside):
        folder.mkdir(parents=True)
    shutil.copy(tidy.ROOT / "Makefile", checkout)
    subprocess.run(["make", "clean"], cwd=checkout, capture_output=True, check=True)
    assert beside.exists()
    assert {path.name for path in checkout.iterdir()} == {"Makefile", "kept"}


def test_readme_gives_the_two_commands_and_ci_calls_its_test_command() -> None:
    readme = (tidy.ROOT / "README.md").read_text()
    assert "make run" in readme
    assert "make test" in readme
    ci = tidy.ROOT / ".ci" / "run"
    assert os.access(ci, os.X_OK)
    assert "make test" in ci.read_text()


def test_check_is_what_ci_runs() -> None:
    makefile = (tidy.ROOT / "Makefile").read_text()
    assert re.search(r"^check: ## .*\n\t@\.ci/run$", makefile, flags=re.MULTILINE)


def test_the_packages_are_listed_and_tests_are_not_shipped() -> None:
    project = tomllib.loads((tidy.ROOT / "pyproject.toml").read_text())
    found = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert found == [f"{name}*" for name in tidy.PRODUCT]
    assert project["project"]["scripts"]["roundhouse"] == "deploy.cli:main"


def test_contributing_is_short() -> None:
    assert len((tidy.ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 120
