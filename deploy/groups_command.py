"""``roundhouse groups`` and ``switch``: the groups of a running server, seen and changed."""

import json
from collections.abc import Callable
from typing import Any

import click

from deploy.options import Decorated
from router.config import Settings
from shards.interrupts import quietly

# Of a limit that a call gives, 0 means none; so "at once" is this.
AT_ONCE_S = 0.001
PORT = click.IntRange(1, 65_535)
SECONDS = click.FloatRange(0, 31_536_000)


def _timeout(text: str) -> Callable[[Decorated], Decorated]:
    return click.option("--timeout", type=SECONDS, metavar="SECONDS", help=text)


def _port(**attributes: Any) -> Callable[[Decorated], Decorated]:
    return click.option("--port", type=PORT, metavar="PORT", **attributes)


_OWN_PORT = _port(
    envvar="PORT", default=Settings().port, show_default=True, show_envvar=True,
    help="The server's port of REST, as its own --port says.",
)  # fmt: skip
# A command below takes what stands before its name, if nothing stands behind it.
_SAME_PORT = _port(help=f"The server's port of REST. Default: $PORT, or {Settings().port}.")


@click.group(invoke_without_command=True)
@_OWN_PORT
@click.option("--json", "as_json", is_flag=True, help="Everything, as JSON.")
@click.pass_context
def groups(context: click.Context, port: int, as_json: bool) -> None:
    """Show the groups of workers of the server that runs on this machine, or change them.

    Requests run on while groups come and go. The server is one that this user has started, by
    roundhouse serve or roundhouse router, in the same container if it is in one.

    \b
    Examples:
      roundhouse groups
      roundhouse groups --port 8080 --json
      roundhouse groups add torch,num-shard=2      another group beside those of roundhouse serve
      roundhouse groups add gpu3:50061             another worker of roundhouse router
      roundhouse groups remove group-0
      roundhouse switch torch                      another engine, in the place of all others
    """
    context.obj = port
    if context.invoked_subcommand is not None:
        return
    with quietly():
        from deploy.groups_client import as_dict, list_groups, table

    answer = list_groups(port)
    click.echo(json.dumps(as_dict(answer), indent=2) if as_json else "\n".join(table(answer)))


@groups.command()
@click.argument("group", metavar="GROUP")
@_SAME_PORT
@_timeout(
    "Seconds until it has to serve, downloads included; then it is taken away again, and what is "
    "being downloaded goes on. Default: no limit."
)
@click.pass_obj
def add(own_port: int, group: str, port: int | None, timeout: float | None) -> None:
    """Start a group beside the others, and wait until it serves.

    For roundhouse serve, GROUP is what its --group takes: ENGINE,KEY=VALUE,... For roundhouse
    router it is what its --worker takes: ADDR[,ADDR...], of workers that run already. Ctrl-C before
    it serves takes it away again.

    \b
    Examples:
      roundhouse groups add torch
      roundhouse groups add torch,num-shard=2,device=cuda:0,name=big --timeout 600
      roundhouse groups add gpu3:50061
      roundhouse groups add gpu3:50061,gpu4:50061      two ranks of one group
    """
    with quietly():
        from deploy.groups_client import change
        from router.v1.groups_pb2 import AddGroupRequest

    request = AddGroupRequest(group=group, limit_s=_limit_s(timeout))
    gone = "the group is taken away again, unless it serves already"
    click.echo(change(port or own_port, lambda server: server.AddGroup(request), gone))


@groups.command()
@click.argument("name", metavar="NAME")
@_SAME_PORT
@_timeout(
    "Seconds that requests may go on which no other group can take; after that they start again "
    "there. Default: the server's --graceful-termination-timeout."
)
@click.pass_obj
def remove(own_port: int, name: str, port: int | None, timeout: float | None) -> None:
    """Take a group away: it gets no new requests, and goes when it has none.

    What runs there moves to other groups as they have room, or ends there. Under roundhouse serve
    its workers are ended then. The only group of a model stays; put another one in its place by
    roundhouse switch. After Ctrl-C the group goes on leaving.

    \b
    Examples:
      roundhouse groups remove group-0
      roundhouse groups remove torch --timeout 10
    """
    with quietly():
        from deploy.groups_client import change
        from router.v1.groups_pb2 import RemoveGroupRequest

    request = RemoveGroupRequest(name=name, limit_s=_limit_s(timeout))
    gone = f"{name} goes on leaving"
    click.echo(change(port or own_port, lambda server: server.RemoveGroup(request), gone))


@click.command()
@click.argument("group", metavar="GROUP")
@_OWN_PORT
@click.option(
    "--stop-first", is_flag=True,
    help="End the others first, if a device cannot hold both; requests wait meanwhile.",
)  # fmt: skip
@_timeout("Seconds until the new group has to serve, downloads included. Default: no limit.")
def switch(group: str, port: int, stop_first: bool, timeout: float | None) -> None:
    """Put a new group in the place of all others that serve its model, while requests run.

    GROUP is as of roundhouse groups add. When the new group serves, what runs on the others moves
    there, and they are removed. If it cannot serve, or after Ctrl-C before it does, the others go
    on; those that --stop-first has ended are started again.

    \b
    Examples:
      roundhouse switch torch                          another engine
      roundhouse switch llamacpp,model=./new.gguf      another file of the model
      roundhouse switch torch,dtype=float32 --stop-first --timeout 600
      roundhouse switch gpu3:50061 --port 8080         another worker of roundhouse router
    """
    with quietly():
        from deploy.groups_client import change
        from router.v1.groups_pb2 import SwitchGroupsRequest

    request = SwitchGroupsRequest(group=group, stop_first=stop_first, limit_s=_limit_s(timeout))
    gone = "if the new group serves already the others go on leaving; if not, they go on serving"
    click.echo(change(port, lambda server: server.SwitchGroups(request), gone))


def _limit_s(timeout: float | None) -> float:
    """The limit of a call, in seconds, where 0 means that none is given."""
    return 0.0 if timeout is None else max(timeout, AT_ONCE_S)
