"""``roundhouse engines``: what there is, what runs here, and environments for engines."""

import json
import sys
import textwrap
from typing import Any

import click

from deploy.engine_probe import READY, Report, probe_all
from deploy.engines import ALONE, ENGINES, INSIDE, WORKERS
from deploy.environment import SetupError
from deploy.hardware import detect
from deploy.interpreters import environment_of
from deploy.options import UserError
from deploy.patience import patience

WIDTH = 100
# Who decides what is computed in a step, in words.
KINDS = {"caller": "router", "stepped": "engine, when told", "self": "engine"}
RANKS = {WORKERS: "--num-shard", INSIDE: "own", ALONE: "-"}
DEVICES = sorted({kind for facts in ENGINES.values() for kind in facts.devices})
INSTALLABLE = [name for name, facts in ENGINES.items() if facts.module]


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
@click.pass_context
def engines(context: click.Context, as_json: bool) -> None:
    """Show every engine: what runs here, and what would make the others run.

    \b
    Examples:
      roundhouse engines
      roundhouse engines --json
      roundhouse engines install torch       an environment for that engine alone
      roundhouse engines remove torch
    """
    if context.invoked_subcommand is not None:
        return
    hardware = detect()
    with patience("asking each engine in its own interpreter ..."):
        reports = probe_all(hardware)
    if as_json:
        click.echo(json.dumps([as_dict(report) for report in reports], indent=2))
        return
    click.echo(f"this machine: {hardware.fingerprint()}\n")
    click.echo("\n".join(table(reports)))


@engines.command()
@click.argument("name", type=click.Choice(INSTALLABLE))
@click.option(
    "--python", metavar="PATH", default=sys.executable,
    help="Interpreter to build the environment on. Default: this one.",
)  # fmt: skip
@click.option(
    "--device", metavar="KIND", default="",
    type=click.Choice(["", *DEVICES]),
    help="Take the packages for this kind of device. Default: the best that is here.",
)  # fmt: skip
@click.option("--again", is_flag=True, help="Start from nothing, whatever is there.")
def install(name: str, python: str, device: str, again: bool) -> None:
    """Make an environment for one engine; workers of that engine use it from then on.

    An interrupted call is continued by the next one.
    """
    from deploy import engine_env

    try:
        engine_env.install(name, python=python, device=device, again=again)
    except SetupError as error:
        raise UserError(str(error)) from error
    except KeyboardInterrupt:
        click.echo("setup: interrupted; the next call goes on", err=True)
        raise
    click.echo(f"{name}: workers use the environment in {environment_of(name)}")


@engines.command()
@click.argument("name", type=click.Choice(INSTALLABLE))
def remove(name: str) -> None:
    """Remove an engine's environment."""
    from deploy import engine_env

    try:
        there = engine_env.remove(name)
    except SetupError as error:
        raise UserError(str(error)) from error
    if not there:
        raise UserError(f"{name} has no environment of its own")
    click.echo(f"{name}: its environment has been removed")


def as_dict(report: Report) -> dict[str, Any]:
    """A report as JSON has it."""
    facts = report.facts
    return {
        "engine": facts.name,
        "summary": facts.summary,
        "state": report.state,
        "runs": report.state == READY,
        "where": report.where,
        "version": report.version,
        "devices": list(report.devices),
        "why": report.why,
        "mend": report.mend,
        "note": report.note,
        "formats": list(facts.formats),
        "features": list(facts.features),
        "optional_features": list(facts.optional),
        "conditions": dict(facts.conditions),
        "scheduling": facts.kind,
        "ranks": facts.ranks,
        "can_use": list(facts.devices),
    }


def table(reports: list[Report]) -> list[str]:
    """The reports for people: one row each, and below it what it can do or what would mend it."""
    heads = ("engine", "state", "version", "formats", "steps made by", "ranks", "devices")
    rows = [heads, *map(_row, reports)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines: list[str] = []
    for report, row in zip((None, *reports), rows, strict=True):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join(cells).rstrip())
        if report is not None:
            lines += _below(report)
    return lines


def _row(report: Report) -> tuple[str, ...]:
    facts = report.facts
    return (
        facts.name,
        report.state,
        report.version or "-",
        ", ".join(facts.formats) or "-",
        KINDS[facts.kind],
        RANKS[facts.ranks],
        ", ".join(report.devices) or "-",
    )


def _below(report: Report) -> list[str]:
    """Lines under a row."""
    optional = report.facts.optional
    asked = f"; if asked for: {', '.join(optional)}" if optional else ""
    conditions = dict(report.facts.conditions)
    features = (
        f"{one} ({conditions[one]})" if one in conditions else one for one in report.facts.features
    )
    told = [f"{report.facts.summary}; {', '.join(features)}{asked}"]
    if report.where and report.where != sys.executable:
        told.append(f"environment: {report.where}")
    if report.why:
        told.append(f"cannot run here: {report.why}; {report.mend}")
    if report.note:
        told.append(f"note: {report.note}")
    wrap = textwrap.TextWrapper(WIDTH, initial_indent="  ", subsequent_indent="    ")
    return [line for text in told for line in wrap.wrap(text)]
