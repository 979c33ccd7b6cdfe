"""What a run of the benchmarks leaves: a table, a plot, and one line of JSON at the end."""

import json
from pathlib import Path

import pytest

from benchmarks import __main__ as program
from benchmarks import report
from benchmarks.jobs import LoadError
from benchmarks.rows import Row


def fast(quick: bool) -> list[Row]:
    return [Row.at_most("fast", "time of nothing", 1.0 if quick else 2.0, 10.0, unit="ms")]


def broken(_: bool) -> list[Row]:
    raise LoadError("the server\nis not there")


@pytest.fixture
def plotted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Two scenarios in the place of all others, where others leave the machine alone."""
    monkeypatch.setattr(program, "SCENARIOS", {"fast": fast, "broken": broken})
    monkeypatch.setattr(program, "wait_calm", lambda *_: 0.0)
    monkeypatch.setattr(program, "raise_file_limit", lambda: None)
    monkeypatch.setattr(program.signal, "signal", lambda *_: None)
    monkeypatch.setattr(report, "PLOT", tmp_path / "plot.png")
    return tmp_path / "plot.png"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["python -m benchmarks", *arguments])
    return program.main()


def test_the_last_line_is_one_json_object(
    plotted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[int] = []
    monkeypatch.setattr(report, "plot", lambda rows, _: shown.append(len(rows)))
    assert run(monkeypatch, "--quick") == 1
    out = capsys.readouterr().out.splitlines()
    assert any("time of nothing" in line and "yes" in line for line in out)
    last = json.loads(out[-1])
    assert (last["bars"], last["bars_reached"]) == (2, 1)
    assert [row["note"] for row in last["rows"]] == ["", "the server is not there"]
    assert shown == [2]
    assert not plotted.exists()


def test_a_run_in_which_nothing_could_be_measured_ends_as_well(
    plotted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "broken") == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["bars_reached"] == 0
    assert not plotted.exists()
