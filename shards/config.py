"""What a worker is told on its command line."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from shards.engines import NAMES
from shards.engines.base import EngineOptions
from tls.files import Files, cluster_files, incomplete

_NUMBERS = (
    ("--kv-tokens", 0, "KV cache size in tokens; 0: the engine chooses"),
    ("--sequences-max", 0, "resident sequences; 0: the engine chooses"),
    ("--step-tokens-max", 0, "tokens in one step; 0: the engine chooses"),
    ("--threads", 0, "compute threads; 0: follows what else the machine is doing"),
    ("--rank", 0, "tensor-parallel rank of this worker"),
    ("--world", 1, "ranks in the group"),
)
# As the router's own, which is the one that is meant to end first.
GRACEFUL_TERMINATION_TIMEOUT_S = 90.0
CLUSTER = ("--cluster-ca", "--cluster-cert", "--cluster-key")
SECONDS_MAX = 86_400.0


class ConfigError(Exception):
    """The command line makes no sense. The text is one line."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """Which engine with which options, where to listen, and whether to end with the parent.

    ``chat_template`` is a file that takes the place of the model's own template.
    ``graceful_termination_timeout_s`` is how long a worker that is told to leave waits for the
    router of its open stream, in seconds. ``cluster`` is what it shows to routers over TCP, and
    whom it believes; None: nothing is encrypted.
    """

    engine: str
    options: EngineOptions
    listen: str
    exit_with_parent: bool
    chat_template: Path | None = None
    graceful_termination_timeout_s: float = GRACEFUL_TERMINATION_TIMEOUT_S
    cluster: Files | None = None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse(arguments: Sequence[str]) -> WorkerConfig:
    """Reads the command line. Raises ``ConfigError``; ``--help`` prints and exits."""
    given = _parser().parse_args(arguments)
    if not 0 <= given.rank < given.world:
        raise ConfigError(f"--rank {given.rank} is not below --world {given.world}")
    cluster = (given.cluster_ca, given.cluster_cert, given.cluster_key)
    if fault := incomplete(dict(zip(CLUSTER, cluster, strict=True))):
        raise ConfigError(fault)
    model: Path | None = given.model
    options = EngineOptions(
        model=model,
        model_id=given.model_id or (model.stem if model else given.engine),
        kv_tokens=given.kv_tokens,
        sequences_max=given.sequences_max,
        step_tokens_max=given.step_tokens_max,
        threads=given.threads,
        rank=given.rank,
        world=given.world,
        rendezvous=given.rendezvous or "",
        device=given.device,
        dtype=given.dtype,
        adapters=tuple((name, Path(path)) for name, path in given.adapter),
        extra=tuple(given.engine_option),
    )
    return WorkerConfig(
        given.engine,
        options,
        given.listen,
        given.exit_with_parent,
        given.chat_template,
        given.graceful_termination_timeout,
        cluster_files(*cluster),
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m shards", description="A shard worker: one engine over gRPC.")
    parser.add_argument("--engine", required=True, choices=NAMES, help="which engine to host")
    parser.add_argument("--model", type=Path, help="model file or folder")
    parser.add_argument("--model-id", default="", help="the name that clients use")
    parser.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="Jinja file to use for the model's own"
    )
    parser.add_argument("--listen", required=True, type=_address, help="unix:///path or HOST:PORT")
    for name, default, meaning in _NUMBERS:
        parser.add_argument(name, type=_count, default=default, metavar="N", help=meaning)
    parser.add_argument(
        "--rendezvous",
        type=_host_port,
        metavar="HOST:PORT",
        help="where the ranks of the group meet; rank 0 listens there",
    )
    parser.add_argument(
        "--device", default="", help="device, in the engine's words; default: its choice"
    )
    parser.add_argument("--dtype", default="", help="element type of weights and cache, likewise")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=_pair,
        metavar="NAME=PATH",
        help="LoRA adapter that requests may name; may be given several times",
    )
    parser.add_argument(
        "--engine-option",
        action="append",
        default=[],
        type=_pair,
        metavar="KEY=VALUE",
        help="option of that engine; may be given several times",
    )
    for name in CLUSTER:
        parser.add_argument(name, metavar="FILE", help="CA, certificate and key for routers on TCP")
    parser.add_argument(
        "--exit-with-parent",
        action="store_true",
        help="end when standard input closes, which is to be a pipe from the parent",
    )
    parser.add_argument(
        "--graceful-termination-timeout",
        type=_seconds,
        default=GRACEFUL_TERMINATION_TIMEOUT_S,
        metavar="SECONDS",
        help="after SIGTERM or SIGINT, how long the router has to move or end what runs here",
    )
    return parser


def _count(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,12}", text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number >= 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= SECONDS_MAX:  # NaN compares false
        raise argparse.ArgumentTypeError(f"{text} is not a number from 0 to {SECONDS_MAX:g}")
    return seconds


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text} is not key=value")
    return key, value


def _host_port(text: str) -> str:
    if not re.fullmatch(r".+:[0-9]{1,5}", text):
        raise argparse.ArgumentTypeError(f"{text} is not HOST:PORT")
    return text


def _address(text: str) -> str:
    if not re.fullmatch(r"unix:.+|unix-abstract:.+|.+:[0-9]{1,5}", text):
        raise argparse.ArgumentTypeError(f"{text} is neither unix:///path nor HOST:PORT")
    return text
