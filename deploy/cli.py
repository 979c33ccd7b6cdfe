"""The ``roundhouse`` command."""

import asyncio
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deploy.models import Model, ModelNotFound, resolve
from deploy.options import (
    MODEL,
    WORKER,
    SectionedCommand,
    option,
    router_options,
    settings_from,
)
from router.config import ConfigError, GroupSpec, Settings, check_groups

if TYPE_CHECKING:
    from deploy.local import WorkerOptions

# gRPC prepares for forks that go on in Python; ours only start other programs. To be said before
# it is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

ENGINES = ("llamacpp", "scripted")


class UserError(click.ClickException):
    """Something that the user can mend; one line on standard error, exit status 1."""


def _version() -> str:
    """The version of the installed distribution."""
    try:
        return version("roundhouse-llm")
    except PackageNotFoundError:
        return "0 (not installed)"


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(_version(), message="roundhouse %(version)s")
def cli() -> None:
    """Roundhouse: one front end for every LLM inference engine.

    \b
    roundhouse serve                               the small embedded model, on this machine
    roundhouse serve ./model.gguf --port 8080      a local file
    roundhouse serve Qwen/Qwen3-0.6B-GGUF          a model from the hub
    """


def _count(name: str, text: str) -> Any:
    """An option of the worker that is a number; 0 leaves the choice to the engine."""
    return option(WORKER, f"--{name}", metavar="N", type=click.IntRange(0), default=0, help=text)


def model_options(command: Any) -> Any:
    """Options that say which model, in which engine."""
    for decorate in (
        click.argument("model", required=False, envvar="MODEL_ID"),
        option(
            MODEL, "--file", metavar="NAME",
            help="Which GGUF file of a folder or repository: its name or a part, such as Q8_0.",
            envvar="MODEL_FILE",
        ),
        option(MODEL, "--revision", metavar="REV", help="Branch, tag or commit on the hub."),
        option(
            MODEL, "--served-model-name", metavar="NAME", help="What clients call the model.",
        ),
        option(
            MODEL, "--chat-template", metavar="FILE", type=click.Path(path_type=Path),
            help="Jinja file to use in place of the model's own chat template.",
        ),
        option(
            WORKER, "--engine", type=click.Choice(ENGINES), default="llamacpp", show_default=True,
            help="What computes. 'scripted' needs no model: it makes up text, for tests.",
        ),
        option(
            WORKER, "--engine-option", metavar="KEY=VALUE", multiple=True, envvar="ENGINE_OPTION",
            help="Setting of the engine itself; repeatable.",
        ),
        _count("threads", "Compute threads of each worker. Default: follows the load."),
        _count("kv-tokens", "Size of each worker's cache, in tokens. Default: engine's choice."),
        _count("sequences-max", "Sequences that a worker can hold. Default: engine's choice."),
        _count("step-tokens-max", "Tokens that a worker computes at once. Default: likewise."),
    )[::-1]:  # fmt: skip
        command = decorate(command)
    return command


def find_model(options: Mapping[str, Any]) -> Model:
    """The model that the options name, on this machine. Raises ``UserError``."""
    try:
        found = resolve(
            options["model"],
            engine=options["engine"],
            file=options["file"],
            revision=options["revision"],
        )
    except ModelNotFound as error:
        raise UserError(str(error)) from error
    return replace(
        found,
        model_id=options["served_model_name"] or found.model_id,
        chat_template=options["chat_template"] or found.chat_template,
    )


def worker_options(options: Mapping[str, Any], world: int, interpreter: str) -> "WorkerOptions":
    """How to start the workers, as the options say."""
    from deploy.local import WorkerOptions

    return WorkerOptions(
        engine=options["engine"],
        world=world,
        threads=options["threads"],
        kv_tokens=options["kv_tokens"],
        sequences_max=options["sequences_max"],
        step_tokens_max=options["step_tokens_max"],
        engine_options=options["engine_option"],
        interpreter=interpreter,
    )


def settings_of(options: Mapping[str, Any]) -> Settings:
    """The router's settings. Raises ``UserError`` with every fault in them."""
    try:
        return settings_from(options)
    except ConfigError as error:
        raise UserError(str(error)) from error


@cli.command(cls=SectionedCommand)
@model_options
@option(
    WORKER, "--num-shard", metavar="N", type=click.IntRange(1), default=1, show_default=True,
    help="Workers that hold the model together (tensor parallelism), if the engine can.",
)  # fmt: skip
@option(
    WORKER, "--worker-python", metavar="PATH", default=sys.executable,
    help="Python interpreter of the workers. Default: this one.",
)  # fmt: skip
@router_options
def serve(**options: Any) -> None:
    """Serve MODEL on this machine: the router and its workers.

    MODEL is a GGUF file, a folder, or a hub id, which is downloaded once. Without MODEL the small
    embedded one is served.

    \b
    Examples:
      roundhouse serve
      roundhouse serve ./model.gguf --port 8080 --max-concurrent-requests 256
      roundhouse serve bartowski/Llama-3.2-1B-Instruct-GGUF --file Q8_0
      MAX_TOTAL_TOKENS=4096 roundhouse serve ./model.gguf
    """
    settings = settings_of(options)
    model = find_model(options)
    from deploy import local  # loads the router, which the other commands do not need
    from deploy.console import Console

    console = Console(as_json=settings.json_output)
    console.say(f"serving {model.model_id}" + (f" ({model.remark})" if model.remark else ""))
    chosen = worker_options(options, options["num_shard"], options["worker_python"])
    _run(local.serve(settings, model, chosen, console))


@cli.command(cls=SectionedCommand)
@option(
    WORKER, "--worker", "workers", metavar="ADDR[,ADDR...]", multiple=True, required=True,
    help="A worker, host:port or unix:///path; repeatable. Ranks of one group: joined by commas.",
)  # fmt: skip
@router_options
def router(workers: tuple[str, ...], **options: Any) -> None:
    """Serve the models of workers that run elsewhere.

    \b
    Examples:
      roundhouse router --worker gpu1:50061 --worker gpu2:50061      two replicas
      roundhouse router --worker gpu1:50061,gpu2:50061               two ranks of one replica
    """
    settings = settings_of(options)
    try:
        groups = check_groups(
            GroupSpec(f"group-{number}", None, tuple(filter(None, ranks.split(","))))
            for number, ranks in enumerate(workers)
        )
    except ConfigError as error:
        raise UserError(str(error)) from error
    from deploy import local
    from deploy.console import Console

    _run(local.route(settings, groups, Console(as_json=settings.json_output)))


@cli.command(cls=SectionedCommand)
@model_options
@option(
    WORKER, "--listen", metavar="ADDR", default="0.0.0.0:50061", show_default=True,
    help="Where the router reaches it: host:port or unix:///path.",
)  # fmt: skip
@option(WORKER, "--rank", type=click.IntRange(0), default=0, metavar="R", help="Rank in the group.")
@option(WORKER, "--world", type=click.IntRange(1), default=1, metavar="W", help="Ranks in it.")
def worker(listen: str, rank: int, world: int, **options: Any) -> None:
    """Run one worker for a router elsewhere.

    \b
    Example:
      roundhouse worker ./model.gguf --listen 0.0.0.0:50061
    """
    model = find_model(options)
    from deploy import local

    chosen = worker_options(options, world, sys.executable)
    command = local.worker_command(chosen, model, listen, rank)
    os.execv(command[0], command)  # noqa: S606 - the worker takes the place of this process


def _run(main: Any) -> None:
    """Runs until served out; what the user can mend becomes one line."""
    import uvloop

    from deploy.supervisor import StartError

    try:
        uvloop.run(main)
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    except (StartError, ConfigError, OSError) as error:
        raise UserError(str(error)) from error


def main() -> None:
    """Entry point: every error that the user can cause is one line on standard error."""
    try:
        status = cli.main(prog_name="roundhouse", standalone_mode=False)
    except click.ClickException as error:
        line = " ".join(error.format_message().split())
        click.echo(f"roundhouse: error: {line}", err=True)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
