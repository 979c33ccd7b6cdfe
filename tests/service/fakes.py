"""Real workers with the scripted engine, in this process, and what tests watch them with."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio

from router.core.effects import Admit, RunPlan
from router.core.events import Event
from shards.engines.base import Engine, EngineOptions, Outcome, Plan, Vectors
from shards.engines.scripted_text import Script
from shards.v1 import shard_pb2, shard_pb2_grpc
from shards.worker import Worker
from tests.engines.skilled import SkilledEngine
from tls.identity import Identity

E = TypeVar("E", bound=Event)
PATIENCE_S = 20.0
"""What tests wait at most for something that must happen."""


async def until(condition: Callable[[], Any]) -> None:
    """Lets the loop run until the condition holds."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.001)


class GatedEngine(SkilledEngine):
    """A scripted engine that stops before a step while its gate is shut, as a wedged one would."""

    def __init__(self, options: EngineOptions, gate: threading.Event) -> None:
        super().__init__(options)
        self.gate = gate
        self.begun = 0

    def step(self, plan: Plan) -> Outcome:
        self.begun += 1
        self.gate.wait(PATIENCE_S)
        return super().step(plan)

    def embed(self, inputs: Sequence[Sequence[int]]) -> Vectors:
        self.begun += 1
        self.gate.wait(PATIENCE_S)
        return super().embed(inputs)


class Bench:
    """Starts workers on sockets in a folder and ends them all."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.engines: dict[str, GatedEngine] = {}
        self.gates: dict[str, threading.Event] = {}
        self._running: dict[str, Worker] = {}

    def address(self, name: str) -> str:
        return f"unix://{self.folder}/{name}.sock"

    async def start(
        self,
        name: str,
        *,
        rank: int = 0,
        world: int = 1,
        model: str = "m",
        load_after: threading.Event | None = None,
        limits: dict[str, int] | None = None,
        adapters: Sequence[str] = (),
        at: str = "",
        cluster: Identity | None = None,
        **extra: str,
    ) -> str:
        """Starts a worker and returns its address. Its gate is open.

        ``at`` is where it listens, if not on a socket in the folder.
        """
        gate = self.gates[name] = threading.Event()
        gate.set()
        options = EngineOptions(
            None,
            model,
            rank=rank,
            world=world,
            adapters=tuple((name, self.folder / name) for name in adapters),
            extra=tuple(extra.items()),
            **(limits or {}),
        )

        def make() -> Engine:
            if load_after is not None:
                load_after.wait(PATIENCE_S)
            self.engines[name] = GatedEngine(options, gate)
            return self.engines[name]

        worker = self._running[name] = Worker(make, at or self.address(name), cluster=cluster)
        await worker.start()
        return worker.address

    def worker(self, name: str) -> Worker:
        return self._running[name]

    async def kill(self, name: str) -> None:
        """Ends a worker without letting it say anything."""
        worker = self._running.pop(name)
        await worker._server.stop(None)
        self.gates[name].set()
        await worker.stop()

    async def end(self) -> None:
        for name in list(self._running):
            await self.kill(name)


@asynccontextmanager
async def bench_in(folder: Path) -> AsyncIterator[Bench]:
    bench = Bench(folder)
    try:
        yield bench
    finally:
        await bench.end()


class Post:
    """An inbox that keeps what was posted."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def post(self, event: Event) -> None:
        self.events.append(event)

    act = post

    async def nth(self, kind: type[E], number: int = 1) -> E:
        """Waits for the event of this kind that is the ``number``-th of them."""
        await until(lambda: len(self.of(kind)) >= number)
        return self.of(kind)[number - 1]

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]


class Liar(shard_pb2_grpc.ShardServicer):  # type: ignore[misc]
    """A worker that answers each plan with the outcome that ``answer`` makes of it."""

    def __init__(self, answer: Callable[[shard_pb2.Plan], shard_pb2.Outcome]) -> None:
        self._answer = answer
        self.tokenizers_sent = 0
        self.plans: list[shard_pb2.Plan] = []
        self.description = shard_pb2.DescribeResponse(
            engine="liar",
            model_id="m",
            scheduling=shard_pb2.SCHEDULING_KIND_CALLER,
            world=1,
            kv_tokens=1000,
            page_tokens=1,
            sequences_max=8,
            step_tokens_max=64,
            length_max=500,
            vocab_size=300,
            instance_id="liar",
            tokenizer_sha256="00",
        )

    async def Describe(self, request: Any, context: Any) -> shard_pb2.DescribeResponse:
        return self.description

    async def GetTokenizer(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.tokenizers_sent += 1
        for name, data in Script().files().items():
            for start in range(0, len(data), 1000):
                yield shard_pb2.TokenizerChunk(name=name, data=data[start : start + 1000])

    async def Run(self, plans: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
        await context.send_initial_metadata(())
        async for plan in plans:
            self.plans.append(plan)
            yield self._answer(plan)


def plan_for(
    epoch: int,
    plan_id: int,
    sequence: int = 7,
    *,
    group: str = "g",
    prompt: tuple[int, ...] = (),
    drops: tuple[int, ...] = (),
    sampling: object = None,
) -> RunPlan:
    """Admits a prompt and computes all of it, or, without one, decodes once."""
    admits = (Admit(sequence, prompt, len(prompt), 0, 0, sampling),) if prompt else ()
    work = max(1, len(prompt))
    return RunPlan(group, epoch, plan_id, drops, admits, (sequence,), (work,))


@asynccontextmanager
async def serving(servicer: Any, address: str) -> AsyncIterator[None]:
    """A servicer of ``shards.v1.Shard`` at an address."""
    server = grpc.aio.server()
    shard_pb2_grpc.add_ShardServicer_to_server(servicer, server)
    server.add_insecure_port(address)
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)
