"""What is recorded of engines' packages, and the program that records it."""

import json
from pathlib import Path

import pytest

from tests.engines.signatures import record

ENGINES = sorted(record.WANTED)
SOURCE = """
from elsewhere import Thing as Renamed

class Args(Base):
    model: str
    size: int = 3
    _hidden: int = 0

    def make(self, a, b=1, *rest, c, d=2, **others):
        self.x = others.pop("ignored")
        return {"first": a, "second": {"third": b}}

    def options(self, **kwargs):
        self.n = kwargs.pop("n", 1)
        found = {}
        found["later"] = kwargs.pop("m", None)
        return found

__all__ = ["Lazy"]
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    path = tmp_path / "package.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize("engine", ENGINES)
def test_every_file_that_is_looked_into_is_recorded(engine: str) -> None:
    found = record.load(engine)
    assert found["files"].keys() == record.WANTED[engine].keys()
    for path, wanted in record.WANTED[engine].items():
        entry = found["files"][path]
        # A hash of the contents, or the commit that stands for them.
        assert len(entry["sha256"] or entry["commit"]) in (40, 64)
        for kind, names in wanted.items():
            assert entry[kind].keys() == set(names)


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_of_the_text_is_kept(engine: str) -> None:
    def texts(value: object) -> list[str]:
        if isinstance(value, dict):
            return [text for part in value.values() for text in texts(part)] + list(value)
        if isinstance(value, list):
            return [text for part in value for text in texts(part)]
        return [value] if isinstance(value, str) else []

    for text in texts(record.load(engine)["files"]):
        assert " " not in text
        assert len(text) <= 80


def test_reads_names_fields_parameters_keys_and_options(package: Path) -> None:
    wanted = {
        "names": ["Renamed", "Args", "Lazy"],
        "classes": ["Args"],
        "functions": ["Args.make"],
        "keys": ["Args.make", "Args.options"],
        "options": ["Args.options"],
    }
    found = record.record_file(package, wanted)
    assert len(found.pop("sha256")) == 64
    assert found == {
        "names": {"Renamed": True, "Args": True, "Lazy": True},
        "classes": {"Args": ["model", "size", "_hidden"]},
        "functions": {
            "Args.make": {
                "positional": ["self", "a", "b"],
                "keyword": ["c", "d", "*rest", "**others"],
            }
        },
        "keys": {"Args.make": ["first", "second", "third"], "Args.options": ["later"]},
        "options": {"Args.options": ["m", "n"]},
    }


@pytest.mark.parametrize(
    "wanted", [{"names": ["Nothing"]}, {"classes": ["Nothing"]}, {"functions": ["Args.nothing"]}]
)
def test_what_is_not_there_is_an_error(package: Path, wanted: dict[str, list[str]]) -> None:
    with pytest.raises(LookupError, match=r"has no .*[Nn]othing"):
        record.record_file(package, wanted)


def test_shows_what_differs_and_records_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(record, "HERE", tmp_path)
    monkeypatch.setattr(record, "WANTED", {"toy": {"package.py": {"classes": ["Args"]}}})
    old = {"package": "toy", "files": {"package.py": {"sha256": None, "commit": "abc"}}}
    (tmp_path / "toy.json").write_text(json.dumps(old))
    (tmp_path / "package.py").write_text(SOURCE)
    assert record.main(["toy", str(tmp_path)]) == 1
    assert "/package.py/classes: recorded None" in capsys.readouterr().out
    assert record.main(["toy", str(tmp_path), "--write"]) == 0
    assert record.main(["toy", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("as recorded\n")
    (tmp_path / "package.py").write_text(SOURCE.replace("size:", "length:"))
    assert record.main(["toy", str(tmp_path)]) == 1
    assert "length" in capsys.readouterr().out
    assert record.main(["toy", str(tmp_path / "elsewhere")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
