"""A group on this machine as processes: how each of its ranks is started, and where it listens."""

import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.groups import LocalGroup
from deploy.interpreters import interpreter_of
from deploy.keeper import WorkerSpec
from deploy.workers import worker_command
from router.config import GroupSpec


def first_ranks(groups: Sequence[LocalGroup], folder: Path) -> dict[str, list[WorkerSpec]]:
    """The workers of the groups to begin with, by name; a single one's goes without saying."""
    shown = [group.name if len(groups) > 1 else "" for group in groups]
    return {
        group.name: worker_specs(group, folder, place, shown[place])
        for place, group in enumerate(groups)
    }


def worker_specs(group: LocalGroup, folder: Path, place: int, shown: str) -> list[WorkerSpec]:
    """The workers of a group in order of rank, on sockets in ``folder``.

    ``place`` is a number that no other group has there, or has had: a worker that does not end must
    not be taken for another. ``shown`` goes before their names in reports.
    """
    specs = []
    for rank in range(group.workers.world):
        socket = folder / f"{place}-{rank}.sock"
        command = worker_command(group.workers, group.model, f"unix://{socket}", rank)
        env = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(group.workers.world)}
        name = f"{shown} worker {rank}".lstrip()
        doubt = doubt_of(group.workers.interpreter, group.workers.engine)
        specs.append(WorkerSpec(name, (*command, "--exit-with-parent"), socket, env, doubt))
    return specs


def doubt_of(interpreter: str, engine: str) -> str:
    """What is wrong with an interpreter that does not even begin to run a worker; "" of ours."""
    if interpreter == sys.executable:
        return ""
    if interpreter == interpreter_of(engine):
        return f"roundhouse engines install {engine} --again makes its environment anew"
    return (
        f"{interpreter} must be a Python of 3.11 or newer that has this project: put it there by"
        f" {interpreter} -m pip install roundhouse-llm, or give --worker-python another one"
    )


def group_spec(group: LocalGroup, ranks: Sequence[WorkerSpec]) -> GroupSpec:
    """A group as the router is told of it."""
    addresses = tuple(f"unix://{rank.socket}" for rank in ranks)
    return GroupSpec(group.name, group.model.model_id, addresses)
