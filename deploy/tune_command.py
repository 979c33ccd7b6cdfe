"""``roundhouse tune``: which engine, with which settings, is fastest here for this traffic."""

import asyncio
import os
import re
import signal
from collections.abc import Coroutine, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.engine_probe import READY, Report, probe_all
from deploy.engines import ENGINES, format_of
from deploy.hardware import Hardware, detect
from deploy.models import ModelNotFound, resolve
from deploy.options import UserError
from deploy.tune_report import comment, config_text, svg, table
from deploy.tune_search import Candidate, Result, Search, Setting, Shape, base, parse, space, winner

if TYPE_CHECKING:
    from deploy.tune import Subject

# From this share of the cores on, other programs are worth a warning: the load of the last minute.
BUSY_SHARE = 0.5


@click.command()
@click.argument("model", required=False)
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
def tune(model: str | None, **options: Any) -> None:
    """Find the fastest engine and settings for MODEL, on this machine, with your traffic.

    Starts a server for each candidate in turn, loads it with streaming requests, and measures what
    clients get. Writes the winner as a file for 'roundhouse serve --config'. A second call measures
    only what is new. Needs the machine for itself.

    \b
    Examples:
      roundhouse tune ./model.gguf --prompt-tokens 500 --new-tokens 200 --concurrency 16
      roundhouse tune ./model --engine torch --engine vllm --minutes 20
      roundhouse tune ./model.gguf --try llamacpp,threads=4 --try llamacpp,engine-option=flash=off
    """
    shape = Shape(options["prompt_tokens"], options["new_tokens"], options["concurrency"])
    hardware = detect()
    asked = [_parsed(text) for text in options["tries"]]
    names: tuple[str, ...] = options["names"]
    reports = _usable(model, options["file"], names, [one.engine for one in asked], hardware)
    subject = _subject(model, options["file"], shape, hardware, reports)
    chosen = names or (() if asked else tuple(report.facts.name for report in reports))
    bases = [*(base(name, shape) for name in chosen), *asked]
    output = options["output"] or Path(f"roundhouse-{_plain(subject.name)}.toml")

    if not os.access(output.absolute().parent, os.W_OK):
        raise UserError(f"cannot write into folder {output.absolute().parent}; choose --output")

    def settings(engine: str) -> Sequence[Setting]:
        on_cpu = not any(kind in ENGINES[engine].devices for kind in hardware.kinds[:-1])
        return space(engine, hardware.cores, shape, on_cpu=on_cpu) if engine in chosen else ()

    click.echo(f"tune: {subject.name}, {shape}", err=True)
    load = os.getloadavg()[0]
    if load > BUSY_SHARE * hardware.cores:
        busy = f"tune: this machine is busy (load {load:.1f} on {hardware.cores} cores); "
        click.echo(busy + "what else runs takes its share of every number", err=True)
    _run(subject, Search(bases, settings), options["minutes"], output)


def _parsed(text: str) -> Candidate:
    try:
        candidate = parse(text)
    except ValueError as error:
        raise click.UsageError(f"--try {text}: {error}") from error
    if candidate.engine not in ENGINES:
        raise click.UsageError(f"--try {text}: there is no engine {candidate.engine}")
    return candidate


def _usable(
    model: str | None, file: str, names: Sequence[str], tried: Sequence[str], hardware: Hardware
) -> list[Report]:
    """The engines that can serve the model here.

    Raises ``UserError`` if one that was asked for cannot, or if none can.
    """
    asked = list(dict.fromkeys((*names, *tried)))
    if asked == ["scripted"]:
        return probe_all(hardware, asked)
    try:
        model_format = format_of(model, file or None)
    except ModelNotFound as error:
        raise UserError(str(error)) from error
    able = [name for name, facts in ENGINES.items() if model_format in facts.formats]
    reports = probe_all(hardware, asked or able)
    for report in reports:
        facts = report.facts
        if asked and report.state != READY:
            raise UserError(f"{facts.name} cannot run here: {report.why}; {report.mend}")
        if asked and facts.formats and facts.name not in able:
            raise UserError(f"{facts.name} does not read {model_format} models")
    ready = [report for report in reports if report.state == READY]
    if not ready:
        raise UserError(
            f"no engine that reads {model_format} models can run here;"
            " 'roundhouse engines' says why"
        )
    return ready


def _subject(
    model: str | None, file: str, shape: Shape, hardware: Hardware, reports: Sequence[Report]
) -> "Subject":
    """What is tuned; the model is downloaded now if it is on the hub, not in a candidate's time."""
    from deploy.tune import Subject

    engine = reports[0].facts.name
    try:
        found = resolve(model, engine=engine, file=file or None, revision=None)
    except ModelNotFound as error:
        raise UserError(str(error)) from error
    local = model is not None and found.path is not None and Path(model).expanduser().exists()
    typed = str(Path(model).expanduser().resolve()) if model is not None and local else model or ""
    ours = version("roundhouse-llm")
    return Subject(
        found.model_id,
        typed,
        file,
        _identity(found.path) if found.path else typed,
        hardware.fingerprint(),
        shape,
        {one.facts.name: f"{one.version} in {ours}" for one in reports},
    )


def _identity(path: Path) -> str:
    """Tells a model's content from another's of the same name: its files' sizes and times."""
    files = [path] if path.is_file() else sorted(one for one in path.iterdir() if one.is_file())
    facts = [f"{one.name} {one.stat().st_size} {one.stat().st_mtime_ns}" for one in files]
    return f"{path}: {'; '.join(facts)}"


def _plain(model: str) -> str:
    """A model's name as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9.-]+", "-", Path(model).name.removesuffix(".gguf")).strip("-")


def _run(subject: "Subject", search: Search, minutes: float, output: Path) -> None:
    """Measures, and says and writes what came of it, after an interrupt too."""
    from deploy.tune import Memory, Tuner, unfinished

    memory = output.with_suffix(".json")
    tuner = Tuner(
        subject, search, Memory(memory), minutes, lambda line: click.echo(f"tune: {line}", err=True)
    )
    try:
        asyncio.run(_until_signalled(tuner.run()))
    except asyncio.CancelledError:
        if tuner.results:
            click.echo("\n".join(table(tuner.results, None)))
        click.echo(f"tune: interrupted; what was measured is kept in {memory}", err=True)
        raise click.Abort from None
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}") from error
    best = winner(tuner.results)
    if best is None:
        raise UserError(f"nothing could be measured: {_first_problem(tuner.results)}")
    click.echo("\n".join(table(tuner.results, best)))
    if unfinished(tuner.results):
        click.echo("tune: the time was up; --minutes gives more, and goes on from here", err=True)
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
