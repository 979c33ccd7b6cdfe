"""The commands of ``roundhouse``. Each is imported when it is asked for: help is shown at once."""

from dataclasses import dataclass
from importlib import import_module

import tls.before_grpc  # noqa: F401 - before what imports grpc

# isort: split
import click

from shards.interrupts import quietly


@dataclass(frozen=True, slots=True)
class Place:
    """Where a command is to be found, and the first line of its help."""

    module: str
    name: str
    help: str


COMMANDS = {
    "engines": Place(
        "deploy.engines_command",
        "engines",
        "Show every engine: what runs here, and what would make the others run.",
    ),
    "gateway": Place(
        "deploy.gateway_command", "gateway", "Serve REST before a router that runs elsewhere."
    ),
    "groups": Place(
        "deploy.groups_command",
        "groups",
        "Show the groups of workers of the server that runs on this machine, or change them.",
    ),
    "router": Place(
        "deploy.serve_command", "router", "Serve the models of workers that run elsewhere."
    ),
    "serve": Place(
        "deploy.serve_command", "serve", "Serve MODEL on this machine: the router and its workers."
    ),
    "switch": Place(
        "deploy.groups_command",
        "switch",
        "Put a new group in the place of all others that serve its model, while requests run.",
    ),
    "tune": Place(
        "deploy.tune_command",
        "tune",
        "Find the fastest engine and settings for MODEL, on this machine, with your traffic.",
    ),
    "worker": Place("deploy.serve_command", "worker", "Run one worker for a router elsewhere."),
}


def command(name: str) -> click.Command:
    """The command of that name. Raises ``KeyError`` if there is none."""
    place = COMMANDS[name]
    with quietly():
        found: click.Command = getattr(import_module(place.module), place.name)
    return found


class Commands(click.Group):
    """The group of all commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name, if there is one."""
        return command(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes what there is, without importing any of it."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, place.help) for name, place in COMMANDS.items()])


def installed_version() -> str:
    """The version of the installed distribution."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("roundhouse-llm")
    except PackageNotFoundError:
        return "0 (not installed)"


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        click.echo(f"roundhouse {installed_version()}")
        context.exit()


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_show_version,
    help="Show the version and exit.",
)  # fmt: skip
def cli() -> None:
    """Roundhouse: one front end for every LLM inference engine.

    \b
    roundhouse serve                               the small embedded model, on this machine
    roundhouse serve ./model.gguf --port 8080      a local file
    roundhouse serve Qwen/Qwen3-0.6B-GGUF          a model from the hub
    """
