"""``roundhouse serve``, ``router`` and ``worker``: what computes, and what is in front of it."""

import os
from collections.abc import Mapping
from typing import Any

import click

from deploy.groups import local_groups, one_group
from deploy.model_options import model_options, serve_options
from deploy.options import (
    CLUSTER,
    WORKER,
    SectionedCommand,
    UserError,
    option,
    router_options,
    some_router_options,
)
from deploy.running import run
from deploy.workers import worker_command
from router.config import ConfigError, Settings, check_groups
from router.options import FAILURES, settings_from
from shards.config import GRACEFUL_TERMINATION_TIMEOUT_S, SECONDS_MAX
from shards.interrupts import quietly
from shards.service_manager import ServiceManager
from tls.files import TlsError, cluster_files, incomplete, read


def settings_of(options: Mapping[str, Any]) -> Settings:
    """The router's settings. Raises ``UserError`` with every fault in them."""
    try:
        return settings_from(options)
    except ConfigError as error:
        raise UserError(str(error)) from error


@click.command(cls=SectionedCommand)
@serve_options
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
      roundhouse serve Qwen/Qwen3-0.6B --engine torch --num-shard 2
      roundhouse serve ./model.gguf --group torch --group llamacpp,threads=1
      MAX_TOTAL_TOKENS=4096 roundhouse serve --config roundhouse.toml
    """
    settings = settings_of(options)
    groups = local_groups(options)
    with quietly():
        from deploy import local  # loads the router, which the other commands do not need
        from deploy.console import Console
        from deploy.further import FurtherGroups

    console = Console(as_json=settings.json_output, manager=ServiceManager.taken())
    console.serving(groups)
    further = FurtherGroups(click.get_current_context(), groups[0].model.model_id)
    run(local.serve(settings, groups, further, console))


@click.command(cls=SectionedCommand)
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
      roundhouse router --worker gpu1:50061 \\
          --cluster-ca ca.pem --cluster-cert head.pem --cluster-key head.key
    """
    settings = settings_of(options)
    with quietly():
        from deploy import local
        from deploy.console import Console
        from router.remote_workers import remote_group

    try:
        groups = check_groups(remote_group(*numbered) for numbered in enumerate(workers))
    except ConfigError as error:
        raise UserError(str(error)) from error
    console = Console(as_json=settings.json_output, manager=ServiceManager.taken())
    run(local.route(settings, groups, console))


@click.command(cls=SectionedCommand)
@model_options
@option(
    WORKER, "--listen", metavar="ADDR", default="0.0.0.0:50061", show_default=True,
    help="Where the router reaches it: host:port or unix:///path.",
)  # fmt: skip
@option(WORKER, "--rank", type=click.IntRange(0), default=0, metavar="R", help="Rank in the group.")
@option(WORKER, "--world", type=click.IntRange(1), default=1, metavar="W", help="Ranks in it.")
@option(
    WORKER, "--rendezvous", metavar="HOST:PORT", default="",
    help="Where the ranks of the group meet: a free port of rank 0's machine, the same for all.",
)  # fmt: skip
@option(
    FAILURES, "--graceful-termination-timeout", "graceful_termination_timeout_s",
    metavar="SECONDS", type=click.FloatRange(0, SECONDS_MAX),
    default=GRACEFUL_TERMINATION_TIMEOUT_S, show_default=True,
    help="Time for the router to move or end what runs here after SIGTERM or Ctrl-C; a second one "
    "ends at once.",
)  # fmt: skip
@some_router_options(*CLUSTER)
def worker(listen: str, rank: int, world: int, rendezvous: str, **options: Any) -> None:
    """Run one worker for a router elsewhere.

    \b
    Examples:
      roundhouse worker ./model.gguf --listen 0.0.0.0:50061
      roundhouse worker ./model --engine torch --rank 1 --world 2 --rendezvous gpu1:29400
      roundhouse worker ./model.gguf \\
          --cluster-ca ca.pem --cluster-cert gpu1.pem --cluster-key gpu1.key
    """
    cluster = _cluster_arguments(options)
    if world > 1 and not rendezvous:
        raise click.UsageError(
            f"--world {world} needs --rendezvous HOST:PORT, the same for every rank"
        )
    group = one_group(options, world)
    command = worker_command(group.workers, group.model, listen, rank, rendezvous) + cluster
    try:
        os.execv(command[0], command)  # noqa: S606 - the worker takes the place of this process
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {error.strerror}") from error


def _cluster_arguments(options: Mapping[str, Any]) -> list[str]:
    """The worker's certificate, as it is told of it. Raises ``UserError`` if that is unusable."""
    given = {f"--{name}": options[name.replace("-", "_")] for name in CLUSTER}
    if fault := incomplete(given):
        raise UserError(fault)
    files = cluster_files(*given.values())
    if files is None:
        return []
    try:
        read(files)
    except TlsError as error:
        raise UserError(str(error)) from error
    return [text for pair in given.items() for text in pair]
