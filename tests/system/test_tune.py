"""Finding the fastest candidate: the order of the search, what it says and what it leaves."""

import asyncio
import io
import itertools
import tomllib
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from deploy import tune_command
from deploy.tune import Memory, Subject, Tuner
from deploy.tune_load import Tally
from deploy.tune_progress import Progress
from deploy.tune_report import comment, config_text, svg, table
from deploy.tune_search import (
    Candidate,
    Numbers,
    Result,
    Search,
    Setting,
    Shape,
    base,
    parse,
    space,
    winner,
)

SHAPE = Shape(16, 8, 4)
SUBJECT = Subject('a "model"', "/models/a b", "", "content", "a machine", SHAPE, {"torch": "2.13"})
SETTINGS = (
    Setting("threads", ("1", "2"), "why"),
    Setting("engine-option", ("flash=off",), "why"),
)


def numbers(tokens_s: float, gap_p99_ms: float = 9.0) -> Numbers:
    return Numbers(tokens_s, 20.0, 5.0, gap_p99_ms, 40, 10.0)


def found(text: str, tokens_s: float, gap_p99_ms: float = 9.0) -> Result:
    return Result(parse(text), numbers(tokens_s, gap_p99_ms))


def searched(bases: list[str], speeds: dict[str, float]) -> list[str]:
    """The candidates in the order in which they are tried; what has no speed fails."""
    search = Search([parse(text) for text in bases], lambda _: SETTINGS)
    order = []
    for candidate in search.following():
        order.append(str(candidate))
        speed = speeds.get(str(candidate))
        result = numbers(speed) if speed else None
        search.tell(Result(candidate, result, "" if result else "it failed"))
    return order


def test_engines_come_first_then_the_settings_of_the_best_on_top_of_what_was_good() -> None:
    speeds = {"a": 50.0, "b": 100.0, "b threads=1": 90.0, "b threads=2": 120.0}
    assert searched(["a", "b"], speeds) == [
        *("a", "b", "b threads=1", "b threads=2"),
        "b flash=off threads=2",
    ]


def test_an_engine_that_is_nearly_as_good_is_refined_too_and_one_that_fails_is_not() -> None:
    speeds = {"a": 70.0, "b": 100.0}
    order = searched(["a", "b", "c"], speeds)
    assert order[:3] == ["a", "b", "c"]
    assert order[3:] == [f"{e} {s}" for e in "ba" for s in ("threads=1", "threads=2", "flash=off")]
    assert searched(["a"], {}) == ["a"]


def test_what_is_asked_for_twice_is_measured_once() -> None:
    assert searched(["a", "a", "a,threads=1"], {"a": 1.0}) == [
        *("a", "a threads=1", "a threads=2", "a flash=off"),
    ]


@pytest.mark.parametrize(
    ("results", "wanted"),
    [
        ([found("a", 100), found("b", 103)], "b"),
        ([found("a,threads=1", 101), found("a", 100)], "a"),
        ([found("a", 100, 30.0), found("b", 101, 40.0)], "a"),
        ([Result(Candidate("a"), problem="no"), found("b", 1)], "b"),
    ],
    ids=["fastest", "fewest settings within the noise", "shortest gaps", "measured"],
)
def test_the_winner(results: list[Result], wanted: str) -> None:
    best = winner(results)
    assert best is not None
    assert str(best.candidate) == wanted


def decided(*results: Result) -> list[str]:
    search = Search([], lambda _: ())
    for result in results:
        search.tell(result)
    return [str(candidate) for candidate in search.finalists()]


def test_the_two_fastest_are_measured_again_if_they_are_close() -> None:
    fast, near, far = found("a", 100), found("b", 90), found("c", 80)
    assert decided(far, fast, near) == ["b", "a"]
    assert decided(fast, far) == []
    assert decided(fast) == decided() == []
    assert decided(fast, Result(Candidate("b"), problem="it failed")) == []
    twice = Result(near.candidate, near.numbers and near.numbers.and_again(numbers(94)))
    assert twice.score == 92.0
    assert decided(fast, twice) == ["a"], "it was measured twice already"


def test_rounds_are_averaged_and_what_is_counted_adds_up() -> None:
    three = numbers(100, 9.0).and_again(numbers(80, 12.0)).and_again(numbers(60, 3.0))
    assert three == Numbers(80.0, 20.0, 5.0, 8.0, 120, 30.0, rounds=3)


async def test_a_second_look_decides_and_is_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """b looked faster once; a is. Each measurement takes what comes next from these."""
    speeds = {"a": [95.0, 105.0], "b": [100.0, 60.0]}
    seen = []

    async def measured(_: Tuner, candidate: Candidate, place: str) -> Result:
        seen.append(place)
        return Result(candidate, numbers(speeds[candidate.engine].pop(0)))

    monkeypatch.setattr(Tuner, "_measure", measured)

    async def run() -> Result | None:
        search = Search([parse("a"), parse("b")], lambda _: ())
        memory = Memory(tmp_path / "known.json")
        return winner(await Tuner(SUBJECT, search, memory, 1.0, Progress(io.StringIO())).run())

    best = await run()
    assert best is not None
    assert str(best.candidate) == "a"
    assert best.score == 100.0
    assert seen[2:] == ["[once more, as it is close] a", "[once more, as it is close] b"]
    assert await run() == replace(best, cached=True)
    assert len(seen) == 4


async def test_a_second_look_that_fails_leaves_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def measured(_: Tuner, candidate: Candidate, place: str) -> Result:
        fine = "once more" not in place
        return Result(candidate, numbers(100.0) if fine else None, "" if fine else "it failed")

    monkeypatch.setattr(Tuner, "_measure", measured)
    out = io.StringIO()
    search = Search([parse("a"), parse("b")], lambda _: ())
    memory = Memory(tmp_path / "known.json")
    results = await Tuner(SUBJECT, search, memory, 1.0, Progress(out)).run()
    assert [one.numbers for one in results] == [numbers(100.0)] * 2
    assert out.getvalue().count("it failed") == 2


async def test_if_there_is_no_time_for_a_second_look_one_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def measured(_: Tuner, candidate: Candidate, place: str) -> Result:
        assert "once more" not in place
        return Result(candidate, numbers(100.0))

    monkeypatch.setattr(Tuner, "_measure", measured)
    out = io.StringIO()
    search = Search([parse("a"), parse("b")], lambda _: ())
    tuner = Tuner(SUBJECT, search, Memory(tmp_path / "known.json"), 1.0, Progress(out))
    left_s = [60.0, 60.0, 1.0]
    monkeypatch.setattr(Tuner, "_left_s", lambda _: left_s.pop(0))
    await tuner.run()
    told = "tune: the fastest are close; --minutes gives the time to tell them apart\n"
    assert out.getvalue() == told


def test_without_measurements_nobody_wins() -> None:
    assert winner([Result(Candidate("a"), problem="it failed")]) is None


def test_a_setting_takes_the_place_of_what_it_contradicts() -> None:
    candidate = parse("llamacpp,threads=2,engine-option=flash=on,engine-option=exact=1")
    changed = candidate.adding("engine-option", "flash=off").adding("threads", "1")
    assert str(changed) == "llamacpp exact=1 flash=off threads=1"


def test_what_an_engine_computes_in_by_itself_is_not_tried_again() -> None:
    dtypes = Setting("dtype", ("bfloat16", "float32"), "why")
    search = Search([parse("a")], lambda _: (dtypes,))
    order = []
    for candidate in search.following():
        order.append(str(candidate))
        used = dict(candidate.settings).get("dtype", "float32")
        search.tell(Result(candidate, replace(numbers(1.0), dtype=used)))
    assert order == ["a", "a dtype=bfloat16"]


def test_each_engine_is_tried_on_each_copy_of_the_model_that_it_reads(tmp_path: Path) -> None:
    folder, file = tmp_path / "model", tmp_path / "model.Q8_0.gguf"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    file.write_bytes(b"")
    copies = tune_command.copies_of((str(folder), str(file)), "")
    assert copies == {str(folder): "safetensors", str(file): "gguf"}
    bases = tune_command.bases_of(copies, ("llamacpp", "torch", "vllm"), SHAPE)
    shown = [str(candidate) for candidate in bases]
    assert shown == [
        "llamacpp model=model.Q8_0.gguf",
        "torch",
        "torch model=model.Q8_0.gguf",
        "vllm",
    ]
    placed = [tune_command.on_a_copy(parse(text), copies) for text in ("llamacpp", "vllm")]
    assert placed == [bases[0], bases[3]]
    # Another copy is no setting that makes a candidate less simple.
    near = [found("vllm,threads=1", 100.5), Result(bases[0], numbers(100.0))]
    assert winner(near) is near[1]
    subject = replace(SUBJECT, file="Q4", others={str(file): "other content"})
    assert tomllib.loads(config_text(subject, bases[0])) == {
        "model": str(file),
        "engine": "llamacpp",
    }
    same_names = replace(subject, others={str(file): "yet another"})
    assert subject.key(bases[0]) != same_names.key(bases[0])
    assert subject.key(bases[1]) == same_names.key(bases[1])


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("out", [io.StringIO(), Terminal()], ids=["file", "terminal"])
async def test_what_takes_long_is_seen_to_go_on(
    out: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deploy.tune_progress.FILE_S", 0.01)
    monkeypatch.setattr("deploy.tune_progress.TERMINAL_S", 0.01)
    calls = itertools.count(1)
    seen = asyncio.Event()

    def now() -> str:
        if (call := next(calls)) == 3:
            seen.set()
        return f"step {call}"

    progress = Progress(out)
    progress.say("loading ...")
    async with progress.during(now):
        await asyncio.wait_for(seen.wait(), 30)
    progress.say("done")
    shown = out.getvalue()
    if out.isatty():
        # One line, written over and erased at the end.
        first, ticks, end = shown.split("\n")
        assert first == "\r\033[Ktune: loading ..."
        assert ticks.startswith("\r\033[Ktune:   step 1, 0 s\r\033[Ktune:   step 2, 0 s")
        assert ticks.endswith("\r\033[K\r\033[Ktune: done")
        assert end == ""
    else:
        assert shown.splitlines()[:3] == [
            "tune: loading ...",
            "tune:   step 1, 0 s",
            "tune:   step 2, 0 s",
        ]
        assert shown.endswith("\ntune: done\n")


def test_the_space_leaves_out_what_cannot_matter() -> None:
    def options(engine: str, shape: Shape, *, on_cpu: bool = True) -> dict[str, tuple[str, ...]]:
        found: dict[str, tuple[str, ...]] = {}
        for setting in space(engine, 2, shape, on_cpu=on_cpu):
            assert setting.why
            found[setting.option] = found.get(setting.option, ()) + setting.values
        return found

    assert "threads" in options("vllm", Shape(32, 64, 1))
    assert "threads" not in options("vllm", Shape(32, 64, 1), on_cpu=False)
    small = options("llamacpp", Shape(32, 64, 1))
    assert small == {"engine-option": ("flash=off",), "threads": ("2", "1")}
    many, more, most = (options("llamacpp", Shape(32, 64, clients)) for clients in (32, 64, 128))
    assert many["engine-option"] == most["engine-option"] == ("kv=split", "flash=off")
    assert more["engine-option"] == ("flash=off",)  # half of them would wait
    assert options("llamacpp", Shape(2000, 64, 8))["engine-option"] == ("flash=off",)  # too long
    large = options("torch", Shape(2000, 500, 32), on_cpu=False)
    assert large == {
        "dtype": ("bfloat16", "float32"),
        "step-tokens-max": ("64", "512", "2048"),
        "kv-tokens": ("80896",),
    }
    assert options("scripted", Shape(1, 1, 1)) == {}
    assert str(base("llamacpp", Shape(1, 1, 100))) == "llamacpp sequences-max=100"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a,threads", "'threads' is not OPTION=VALUE"),
        ("a,port=80", "'port=80' is not OPTION=VALUE"),
        ("a,engine-option=x", "is not engine-option=KEY=VALUE"),
    ],
)
def test_a_candidate_that_makes_no_sense_is_one_line(text: str, told: str) -> None:
    with pytest.raises(ValueError, match="is not") as caught:
        parse(text)
    assert told in str(caught.value)


def test_the_config_file_is_toml_whatever_the_names() -> None:
    text = config_text(
        SUBJECT,
        parse("torch,dtype=float32,threads=2,engine-option=page_tokens=32,engine-option=a=b"),
        comment(SUBJECT, found("torch", 12.5)),
    )
    assert tomllib.loads(text) == {
        "model": "/models/a b",
        "engine": "torch",
        "dtype": "float32",
        "threads": 2,
        "engine-option": ["a=b", "page_tokens=32"],
    }
    assert "# Chosen by 'roundhouse tune': torch" in text
    assert "12.5 output tokens/s" in text
    many = Subject("m", "", "", "", "", Shape(1, 2, 200))
    assert tomllib.loads(config_text(many, Candidate("a")))["max-concurrent-requests"] == 200


def test_the_table_is_in_order_marks_the_winner_and_says_what_went_wrong() -> None:
    results = [found("a", 10), Result(Candidate("b"), problem="no such file"), found("c", 20)]
    lines = table(results, results[2])
    assert [line.split()[:2] for line in lines[1:]] == [["*", "c"], ["a", "10.0"], ["b", "-"]]
    assert lines[3].endswith("no such file")


def test_the_plot_is_xml_with_a_bar_for_each_measurement() -> None:
    results = [found("a", 10), found("c", 20), Result(Candidate("b"), problem="no")]
    tree = ET.fromstring(svg(SUBJECT, results, results[1]))
    bars = [float(node.attrib["width"]) for node in tree.iter() if node.tag.endswith("rect")][1:]
    assert len(bars) == 2
    assert bars[0] == 2 * bars[1]
    texts = [node.text or "" for node in tree.iter() if node.tag.endswith("text")]
    assert any('a "model": 16 prompt + 8 new tokens' in text for text in texts)
    long = [found(f"a,model=/models/{'x' * 200}", 10)]
    wide = ET.fromstring(svg(SUBJECT, long, long[0]))
    assert float(wide.attrib["width"]) > float(tree.attrib["width"]) + 900


def test_events_count_as_many_tokens_as_the_answers_ends_say() -> None:
    tally = Tally()
    tally.arrived(5, 1.0, first=True)  # the warm-up
    tally.open = True
    tally.arrived(1, 0.5, first=True)
    for gap_s in (0.01, 0.02, 0.03):
        tally.arrived(1, gap_s, first=False)
    tally.finished_events, tally.finished_tokens = 10, 20
    seen = tally.numbers(2.0)
    assert (seen.tokens_s, seen.first_p50_ms, seen.gap_p50_ms, seen.gap_p99_ms) == (4, 500, 20, 30)
    assert seen.requests == 1


def test_what_was_measured_is_remembered_for_the_same_machine_model_and_traffic(
    tmp_path: Path,
) -> None:
    path = tmp_path / "measured.json"
    key = SUBJECT.key(Candidate("torch"))
    Memory(path).put(key, numbers(7))
    assert Memory(path).get(key) == numbers(7)
    for other in (
        Subject(*("a", "", "", "content", "other machine", SHAPE), SUBJECT.versions),
        Subject(*("a", "", "", "other content", "a machine", SHAPE), SUBJECT.versions),
        Subject(*("a", "", "", "content", "a machine", Shape(1, 8, 4)), SUBJECT.versions),
        Subject(*("a", "", "", "content", "a machine", SHAPE), {"torch": "2.14"}),
    ):
        assert Memory(path).get(other.key(Candidate("torch"))) is None
    path.write_text("no JSON")
    assert Memory(path).get(key) is None
