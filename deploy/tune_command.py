"""``roundhouse tune``: which engine, with which settings, is fastest here for this traffic."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import Coroutine, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.engine_probe import READY, Report, lacking, probe_all
from deploy.engines import ENGINES, Facts, format_of
from deploy.hardware import Hardware, detect
from deploy.models import Model, ModelNotFound, resolve
from deploy.options import UserError
from deploy.tune_progress import Progress
from deploy.tune_report import comment, config_text, svg, table
from deploy.tune_search import Candidate, Result, Search, Setting, Shape, base, parse, space, winner
from shards.interrupts import quietly

if TYPE_CHECKING:
    from deploy.tune import Subject

# From this share of the cores on, other programs are worth a warning: the load of the last minute.
BUSY_SHARE = 0.5


@click.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@click.option("--file", default="", metavar="NAME", help="Which GGUF file, as serve has it.")
@click.option(
    "--prompt-tokens", type=click.IntRange(1), default=128, show_default=True, metavar="P",
    help="Tokens of each prompt.",
)  # fmt: skip
@click.option(
    "--new-tokens", type=click.IntRange(2), default=128, show_default=True, metavar="N",
    help="Tokens of each answer.",
)  # fmt: skip
@click.option(
    "--concurrency", type=click.IntRange(1, 1024), default=8, show_default=True, metavar="C",
    help="Requests at once.",
)  # fmt: skip
@click.option(
    "--engine", "names", multiple=True, type=click.Choice(list(ENGINES)),
    help="Try this engine and its settings; repeatable. Default: all that can serve the model.",
)  # fmt: skip
@click.option(
    "--try", "tries", multiple=True, metavar="ENGINE[,OPTION=VALUE...]",
    help="Try exactly this as well; repeatable. Without --engine, nothing else is tried.",
)  # fmt: skip
@click.option(
    "--minutes", type=click.FloatRange(0.1), default=10.0, show_default=True, metavar="M",
    help="Longest time for everything.",
)  # fmt: skip
@click.option(
    "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="The config file to write; the plot (.svg) and the measurements (.json) go beside it. "
    "Default: roundhouse-MODEL.toml",
)  # fmt: skip
def tune(models: tuple[str, ...], **options: Any) -> None:
    """Find the fastest engine and settings for MODEL, on this machine, with your traffic.

    Starts a server for each candidate in turn, loads it with streaming requests, and measures what
    clients get. Writes the winner as a file for 'roundhouse serve --config'. A second call measures
    only what is new. Needs the machine for itself.

    Engines read different formats: give several MODELs, which are copies of one, to compare them
    all.

    \b
    Examples:
      roundhouse tune ./model.gguf --prompt-tokens 500 --new-tokens 200 --concurrency 16
      roundhouse tune ./model ./model-Q8_0.gguf
      roundhouse tune ./model --engine torch --engine vllm --minutes 20
      roundhouse tune ./model.gguf --try llamacpp,threads=4 --try llamacpp,engine-option=flash=off
    """
    progress = Progress(sys.stderr)
    shape = Shape(options["prompt_tokens"], options["new_tokens"], options["concurrency"])
    names: tuple[str, ...] = options["names"]
    hardware = detect()
    copies = copies_of(models, options["file"])
    asked = [on_a_copy(_parsed(text), copies) for text in options["tries"]]
    progress.say("asking each engine in its own interpreter ...")
    reports = _usable(copies, names, asked, hardware)
    ready = [report for report in reports if report.state == READY]
    chosen = names or (() if asked else tuple(report.facts.name for report in ready))
    subject = _subject(copies, options["file"], shape, hardware, ready, asked)
    output = options["output"] or Path(f"roundhouse-{_plain(subject.name)}.toml")
    if not os.access(output.absolute().parent, os.W_OK):
        raise UserError(f"cannot write into folder {output.absolute().parent}; choose --output")
    minutes: float = options["minutes"]
    progress.say(f"{subject.name}, {shape}; at most {minutes:g} min")
    for line in (*_left_out(reports, hardware), *_busy(hardware)):
        progress.say(line)
    bases = [*bases_of(copies, chosen, shape), *asked]

    def settings(engine: str) -> Sequence[Setting]:
        on_cpu = not any(kind in ENGINES[engine].devices for kind in hardware.kinds[:-1])
        return space(engine, hardware.cores, shape, on_cpu=on_cpu) if engine in chosen else ()

    _run(subject, Search(bases, settings), minutes, output, progress)


def bases_of(copies: Mapping[str, str], chosen: Sequence[str], shape: Shape) -> list[Candidate]:
    """Each engine on each copy that it reads; only further copies are a setting."""
    first = next(iter(copies))
    return [
        base(name, shape, model if model != first else "")
        for name in chosen
        for model in _reads(ENGINES[name], copies)
    ]


def _left_out(reports: Sequence[Report], hardware: Hardware) -> list[str]:
    """The engines that could run on this machine, and what hinders them."""
    return [
        f"without {report.facts.name}: {report.why}; {report.mend}"
        for report in reports
        if report.state != READY and not lacking(report.facts, hardware)
    ]


def _busy(hardware: Hardware) -> list[str]:
    load = os.getloadavg()[0]
    if load <= BUSY_SHARE * hardware.cores:
        return []
    return [
        f"this machine is busy (load {load:.1f} on {hardware.cores} cores); what else runs takes"
        " its share of every number"
    ]


def _parsed(text: str) -> Candidate:
    try:
        candidate = parse(text)
    except ValueError as error:
        raise click.UsageError(f"--try {text}: {error}") from error
    if candidate.engine not in ENGINES:
        raise click.UsageError(f"--try {text}: there is no engine {candidate.engine}")
    return candidate.adding("model", _typed(candidate.model)) if candidate.model else candidate


def _typed(model: str) -> str:
    """A model as any folder understands it: a path in full, or the id on the hub."""
    path = Path(model).expanduser()
    return str(path.resolve()) if model and path.exists() else model


def copies_of(models: Sequence[str], file: str) -> dict[str, str]:
    """The copies of the model, each with its format. Raises ``UserError`` if one is not there.

    The first one's name is "" if none is given, which is the embedded model.
    """
    first, *more = models or ("",)
    try:
        formats = [format_of(first or None, file or None), *map(format_of, more)]
        return dict(zip(map(_typed, (first, *more)), formats, strict=True))
    except ModelNotFound as error:
        raise UserError(str(error)) from error


def on_a_copy(candidate: Candidate, copies: Mapping[str, str]) -> Candidate:
    """A candidate that was typed without a copy, on the first one that its engine reads."""
    readable = _reads(ENGINES[candidate.engine], copies)
    if candidate.model or not readable or readable[0] == next(iter(copies)):
        return candidate
    return candidate.adding("model", readable[0])


def _reads(facts: Facts, copies: Mapping[str, str]) -> list[str]:
    """The copies that an engine can read; one without formats takes anything, so the first."""
    able = [one for one, model_format in copies.items() if model_format in facts.formats]
    return able if facts.formats else list(copies)[:1]


def _usable(
    copies: Mapping[str, str], names: Sequence[str], tried: Sequence[Candidate], hardware: Hardware
) -> list[Report]:
    """The engines that were asked for, or all that read the model; at least one of them is ready.

    Raises ``UserError`` if one that was asked for cannot serve the model here, or if none can.
    """
    asked = list(dict.fromkeys((*names, *(one.engine for one in tried))))
    able = [name for name, facts in ENGINES.items() if facts.formats and _reads(facts, copies)]
    reports = probe_all(hardware, asked or able)
    # What has a copy of its own is read from there.
    elsewhere = {one.engine for one in tried if one.model}
    formats = " or ".join(dict.fromkeys(copies.values()))
    for report in reports:
        facts = report.facts
        if asked and report.state != READY:
            raise UserError(f"{facts.name} cannot run here: {report.why}; {report.mend}")
        needed = facts.name in names or facts.name not in elsewhere
        if asked and needed and not _reads(facts, copies):
            raise UserError(f"{facts.name} does not read {formats} models")
    if not any(report.state == READY for report in reports):
        raise UserError(
            f"no engine that reads {formats} models can run here; 'roundhouse engines' says why"
        )
    return reports


def _subject(
    copies: Mapping[str, str],
    file: str,
    shape: Shape,
    hardware: Hardware,
    ready: Sequence[Report],
    tried: Sequence[Candidate],
) -> "Subject":
    """What is tuned; a model is downloaded now if it is on the hub, not in a candidate's time."""
    with quietly():
        from deploy.tune import Subject

    first, *more = copies
    found = _found(first, _reader(first, copies, ready), file)
    own = {one: _reader(one, copies, ready) for one in more}
    own |= {one.model: one.engine for one in tried if one.model}
    ours = version("roundhouse-llm")
    return Subject(
        found.model_id,
        first,
        file,
        _identity(found.path) if found.path else first,
        hardware.fingerprint(),
        shape,
        {one.facts.name: f"{one.version} in {ours}" for one in ready},
        {one: _identity(_found(one, engine).path or Path(one)) for one, engine in own.items()},
    )


def _reader(model: str, copies: Mapping[str, str], ready: Sequence[Report]) -> str:
    """An engine that reads a copy; of one that nothing reads, any: only tries are served then."""
    names = [report.facts.name for report in ready]
    return next((name for name in names if model in _reads(ENGINES[name], copies)), names[0])


def _found(model: str, engine: str, file: str = "") -> Model:
    """A model on this machine. Raises ``UserError``."""
    try:
        return resolve(model or None, engine=engine, file=file or None, revision=None)
    except ModelNotFound as error:
        raise UserError(str(error)) from error


def _identity(path: Path) -> str:
    """Tells a model's content from another's of the same name: its files' sizes and times."""
    files = [path] if path.is_file() else sorted(one for one in path.iterdir() if one.is_file())
    facts = [f"{one.name} {one.stat().st_size} {one.stat().st_mtime_ns}" for one in files]
    return f"{path}: {'; '.join(facts)}"


def _plain(model: str) -> str:
    """A model's name as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", Path(model).name.removesuffix(".gguf")).strip("-")


def _run(
    subject: "Subject", search: Search, minutes: float, output: Path, progress: Progress
) -> None:
    """Measures, and says and writes what came of it, after an interrupt too."""
    with quietly():
        from deploy.tune import Memory, Tuner, unfinished

    memory = output.with_suffix(".json")
    tuner = Tuner(subject, search, Memory(memory), minutes, progress)
    try:
        asyncio.run(_until_signalled(tuner.run()))
    except asyncio.CancelledError:
        if tuner.results:
            click.echo("\n".join(table(tuner.results, None)))
        progress.say(f"interrupted; what was measured is kept in {memory}")
        raise click.Abort from None
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from error
    best = winner(tuner.results)
    if best is None:
        raise UserError(f"nothing could be measured: {_first_problem(tuner.results)}")
    click.echo("\n".join(table(tuner.results, best)))
    if unfinished(tuner.results):
        progress.say("the time was up; --minutes gives more, and goes on from here")
    _write(subject, tuner.results, best, output)


async def _until_signalled(measuring: Coroutine[Any, Any, object]) -> None:
    """Runs until it is done, or a first SIGINT or SIGTERM cancels it.

    Later ones change nothing: the server that runs is being ended, which takes seconds at most.
    """
    task, loop = asyncio.ensure_future(measuring), asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: task.cancelling() or task.cancel())
    await task


def _first_problem(results: Sequence[Result]) -> str:
    return next((result.problem for result in results if result.problem), "there was no candidate")


def _write(subject: "Subject", results: Sequence[Result], best: Result, output: Path) -> None:
    """The winner's config file, and the plot."""
    plot = output.with_suffix(".svg")
    try:
        output.write_text(config_text(subject, best.candidate, comment(subject, best)))
        plot.write_text(svg(subject, results, best))
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from error
    click.echo(f"\nplot: {plot}\nserve it with: roundhouse serve --config {output}")
