"""``text-generation-launcher``: TGI's flags and environment variables, and Roundhouse behind them.

It is for deployments that are written already; ``roundhouse serve`` is the command for new ones.
What only tunes is named in one warning, what would change answers is refused (``tgi_flags``).
"""

import os
import platform
import shlex
from collections.abc import Sequence
from typing import Any

import click
from click.core import ParameterSource

from deploy.folders import folder_for_run
from deploy.hardware import detect
from deploy.options import SectionedCommand
from deploy.tgi_flags import FLAGS, SECTIONS
from deploy.tgi_translate import Translation, translate
from shards.interrupts import quietly
from shards.pages import page

NAME = "text-generation-launcher"
SECRET = "--api-key"
EPILOG = f"What differs from TGI, and why: {page('tgi-compatibility.md')}."
HELP = """Serve a model with the flags of text-generation-inference.

Every flag has an environment variable; what is typed wins over it. Options that TGI does not have
are taken from the variables of `roundhouse serve`, which its --help names: ENGINE, GRPC_PORT,
MODEL_FILE and others.

\b
Examples:
  text-generation-launcher --model-id HuggingFaceTB/SmolLM2-135M-Instruct --port 8080
  text-generation-launcher --model-id ./model.gguf --max-total-tokens 4096
  MODEL_ID=Qwen/Qwen3-8B NUM_SHARD=2 ENGINE=vllm text-generation-launcher
"""


class LauncherCommand(SectionedCommand):
    """The command, whose help groups flags by what becomes of them."""

    sections = SECTIONS


def launch(**values: Any) -> None:
    """Translates the flags and serves. Raises ``click.ClickException`` for what cannot be."""
    context = click.get_current_context()
    given = {
        key
        for key in values
        if context.get_parameter_source(key)
        in (ParameterSource.COMMANDLINE, ParameterSource.ENVIRONMENT)
    }
    chosen = {key: value for key, value in values.items() if key in given}
    with folder_for_run() as folder:
        found = translate(chosen, os.environ, folder)
        if values["env"]:
            click.echo(environment(found), err=True)
        _warn(found, as_json="--json-output" in found.arguments)
        _serve(found)


def _warn(found: Translation, *, as_json: bool) -> None:
    """Says in one line what has no effect."""
    with quietly():
        from deploy.console import Console

    if found.ignored:
        names = ", ".join(found.ignored)
        Console(as_json=as_json).say(f"{NAME}: warning: without effect here: {names}")


def _serve(found: Translation) -> None:
    """Runs ``roundhouse serve`` in this process, until it has ended."""
    os.environ.update(found.variables)
    # Imported now: the hub's library reads its variables when it is.
    with quietly():
        from deploy.serve_command import serve

    serve.main(args=list(found.arguments), prog_name=NAME, standalone_mode=False)


def environment(found: Translation) -> str:
    """What to put into a report: versions, devices, and the command that this one stands for."""
    from deploy.commands import installed_version

    here = detect()
    lines = [
        "Runtime environment:",
        f"Roundhouse: {installed_version()}",
        f"Python: {platform.python_version()} on {platform.platform()}",
        f"Devices: {here.fingerprint()}",
        f"Command: {shown_command(found.arguments)}",
    ]
    return "\n".join(lines)


def shown_command(arguments: Sequence[str]) -> str:
    """The arguments as a command line of ``roundhouse serve``, without the API key."""
    shown = list(arguments)
    if SECRET in shown:
        shown[shown.index(SECRET) + 1] = "..."
    return shlex.join(["roundhouse", "serve", *shown])


def _show_version(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    from deploy.commands import installed_version

    if wanted:
        click.echo(f"{NAME} {installed_version()}")
        context.exit()


VERSION = click.Option(
    ["-V", "--version"],
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_show_version,
    help="Show the version and exit.",
)
command = LauncherCommand(
    NAME,
    params=[*(flag.option() for flag in FLAGS), VERSION],
    callback=launch,
    help=HELP,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
