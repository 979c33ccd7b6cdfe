"""The options that say which model, in which engine, and how its workers are started."""

from pathlib import Path
from typing import Any

import click

from deploy import config_file
from deploy.groups import AUTO, GroupType
from deploy.options import MODEL, WORKER, option
from shards.engines import NAMES


def _count(name: str, text: str) -> Any:
    """An option of the worker that is a number; 0 leaves the choice to the engine."""
    return option(WORKER, f"--{name}", metavar="N", type=click.IntRange(0), default=0, help=text)


_MODEL_OPTIONS = (
    click.argument("model", required=False, envvar="MODEL_ID"),
    option(
        MODEL, "--file", metavar="NAME",
        help="Which GGUF file of a folder or repository: its name or a part, such as Q8_0.",
        envvar="MODEL_FILE",
    ),
    option(MODEL, "--revision", metavar="REV", help="Branch, tag or commit on the hub."),
    option(MODEL, "--served-model-name", metavar="NAME", help="What clients call the model."),
    option(
        MODEL, "--chat-template", metavar="FILE", type=click.Path(path_type=Path),
        help="Jinja file to use in place of the model's own chat template.",
    ),
    option(
        MODEL, "--adapter", metavar="NAME=PATH", multiple=True,
        help="LoRA adapter that requests may name: a path or hub id; repeatable.",
    ),
    option(
        MODEL, "--lora-adapters", metavar="LIST", default="",
        help="The same as TGI has it: ID or NAME=PATH, joined by commas.",
    ),
    option(
        WORKER, "--engine", type=click.Choice((AUTO, *NAMES)), default=AUTO, show_default=True,
        help="What computes; auto takes the best installed one for the model and the machine. "
        "'scripted' needs no model: it makes up text, for tests.",
    ),
    option(
        WORKER, "--engine-option", metavar="KEY=VALUE", multiple=True,
        help="Setting of the engine itself; repeatable.",
    ),
    option(
        WORKER, "--device", metavar="NAME", default="",
        help="Device in the engine's words, such as cuda:1; one for each rank, joined by commas. "
        "Default: engine's choice, and rank r takes accelerator r.",
    ),
    option(
        WORKER, "--dtype", metavar="TYPE", default="",
        help="Element type of weights and cache, such as bfloat16. Default: engine's choice.",
    ),
    _count("threads", "Compute threads of each worker. Default: follows the load."),
    _count("kv-tokens", "Size of each worker's cache, in tokens. Default: engine's choice."),
    _count("sequences-max", "Sequences that a worker can hold. Default: engine's choice."),
    _count("step-tokens-max", "Tokens that a worker computes at once. Default: likewise."),
    option(
        WORKER, "--worker-python", metavar="PATH", default="",
        help="Python interpreter of the workers. Default: that of the engine's own environment, if "
        "it has one, or this one.",
    ),
)  # fmt: skip
_SERVE_OPTIONS = (
    *_MODEL_OPTIONS,
    option(
        WORKER, "--num-shard", metavar="N", type=click.IntRange(1, 1024), default=1,
        show_default=True,
        help="Ranks: workers that hold the model together (tensor parallelism), if the engine can.",
    ),
    option(
        WORKER, "--group", metavar="ENGINE[,KEY=VALUE...]", multiple=True, type=GroupType(),
        envvar="ROUNDHOUSE_GROUP",
        help="A group of workers with options of its own; repeatable, and all serve the model "
        "under one name. Keys are the names of the options under Model and Worker.",
    ),
    option(
        MODEL, "--config", metavar="FILE", type=click.Path(path_type=Path), is_eager=True,
        envvar="ROUNDHOUSE_CONFIG", expose_value=False,
        callback=lambda context, _, path: _read_config(context, path),
        help="TOML file with any of these options; what is typed, and the environment, win over "
        "it.",
    ),
)  # fmt: skip


def _read_config(context: click.Context, path: Path | None) -> None:
    """Makes the file's values the defaults of the command."""
    if path is not None:
        context.default_map = config_file.read(path, context.command)


def model_options(command: Any) -> Any:
    """Adds the options of any command that starts a worker."""
    for decorate in reversed(_MODEL_OPTIONS):
        command = decorate(command)
    return command


def serve_options(command: Any) -> Any:
    """Adds the options of a command that starts whole groups."""
    for decorate in reversed(_SERVE_OPTIONS):
        command = decorate(command)
    return command
