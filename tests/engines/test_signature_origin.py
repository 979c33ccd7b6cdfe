"""A package's promises recorded from its repository: from a real one, by git, on this machine."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.engines.signatures import origin, record

WANTED = {"toy": {"package/engine.py": {"classes": ["Args"], "functions": ["Args.run"]}}}


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *who, *arguments], cwd=folder, capture_output=True, check=True, timeout=60
    )
    return done.stdout.decode().strip()


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two releases, of which the second has another keyword; and where they are recorded."""
    place = tmp_path / "repository"
    (place / "package").mkdir(parents=True)
    git(place, "init", "--quiet", "--initial-branch=main")
    # As public servers allow it.
    for key in ("allowFilter", "allowAnySHA1InWant"):
        git(place, "config", f"uploadpack.{key}", "true")
    for tag, word in (("v1.0", "size"), ("v1.1", "length")):
        source = f"class Args:\n    {word}: int\n\n    def run(self, {word}): ...\n"
        (place / "package" / "engine.py").write_text(source)
        git(place, "add", ".")
        git(place, "commit", "--quiet", "-m", tag)
        git(place, "tag", tag)
    here = tmp_path / "recorded"
    here.mkdir()
    (here / "toy.json").write_text(json.dumps({"package": "toy", "version": "?", "files": {}}))
    monkeypatch.setattr(record, "HERE", here)
    monkeypatch.setattr(record, "WANTED", WANTED)
    monkeypatch.setattr(origin, "REPOSITORIES", {"toy": place.as_uri()})
    return place


def test_a_tag_is_recorded_with_its_commit_and_compared_by_it(
    repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert origin.main(["toy", "v1.0", "--write"]) == 0
    found = record.load("toy")
    assert (found["version"], found["commit"]) == ("1.0", git(repository, "rev-parse", "v1.0"))
    entry = found["files"]["package/engine.py"]
    assert len(entry["sha256"]) == 64
    assert entry["classes"] == {"Args": ["size"]}
    capsys.readouterr()
    assert origin.main(["toy"]) == 0
    assert capsys.readouterr().out == f"as recorded\nat {found['commit']}\n"
    assert origin.main(["toy", "v1.1"]) == 1
    assert "recorded ['size'], found ['length']" in capsys.readouterr().out


@pytest.mark.usefixtures("repository")
def test_what_cannot_be_had_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert origin.main(["toy", "v9.9"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    monkeypatch.setattr(record, "WANTED", {"toy": {"package/gone.py": {}}})
    assert origin.main(["toy", "v1.0"]) == 2
    told = capsys.readouterr().err
    assert told.startswith("toy: git show: ")
    assert "package/gone.py" in told
    with pytest.raises(SystemExit, match="2"):
        origin.main(["toy"])
    assert "no commit of toy is recorded" in capsys.readouterr().err


@pytest.mark.parametrize("engine", sorted(origin.REPOSITORIES))
def test_the_repositories_are_those_that_are_recorded(engine: str) -> None:
    name = origin.REPOSITORIES[engine].partition("github.com/")[2]
    assert record.load(engine)["source"].startswith(f"repository {name}")
    assert engine in record.WANTED
