"""Talks to a worker without a router: the floor of the time to the first token.

``python -m benchmarks.direct`` takes a ``Direct`` as JSON on stdin; one sequence at a time, each
plan in lock step.
"""

import asyncio
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import grpc
import uvloop

from benchmarks.jobs import LoadError
from shards.v1 import shard_pb2, shard_pb2_grpc

Run = grpc.aio.StreamStreamCall[shard_pb2.Plan, shard_pb2.Outcome]


@dataclass(frozen=True, slots=True)
class Direct:
    """What to ask of the worker; ``think_s`` is the pause between sequences, in seconds."""

    address: str
    prompts: list[list[int]]
    tokens: int
    think_s: float


class Client:
    """One Run stream, in lock step."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._plans = 0

    async def step(self, **fields: object) -> shard_pb2.Outcome:
        """Sends one plan and waits for its outcome. Raises ``LoadError`` if the stream ends."""
        self._plans += 1
        await self._run.write(shard_pb2.Plan(epoch=1, plan_id=self._plans, **fields))  # type: ignore[arg-type]
        outcome = await self._run.read()
        if not isinstance(outcome, shard_pb2.Outcome):  # the end of the stream has its own marker
            raise LoadError(f"the worker ended the stream: {await self._run.details()}")
        return outcome

    async def sequence(self, number: int, prompt: list[int], tokens: int) -> float:
        """Generates one sequence and drops it; returns the time to its first token in seconds."""
        sent = time.perf_counter()
        admit = shard_pb2.Admit(sequence=number, tokens=prompt, prompt_len=len(prompt))
        admit.sampling.SetInParent()
        await self.step(admits=[admit], work_sequences=[number], work_tokens=[len(prompt)])
        first_s = time.perf_counter() - sent
        for _ in range(tokens - 1):
            outcome = await self.step(work_sequences=[number], work_tokens=[1])
            assert list(outcome.sequences) == [number], outcome
        await self.step(drops=[number])
        return first_s


async def first_token_times(job: Direct) -> list[float]:
    """Time to the first token of each sequence, in seconds."""
    async with grpc.aio.insecure_channel(job.address) as channel:
        stub: Callable[[], Run] = shard_pb2_grpc.ShardStub(channel).Run  # type: ignore[no-untyped-call]
        client = Client(stub())
        times = []
        for number, prompt in enumerate(job.prompts, start=1):
            times.append(await client.sequence(number, prompt, job.tokens))
            await asyncio.sleep(job.think_s)
        return times


def command() -> list[str]:
    """The command line of this client."""
    return [sys.executable, "-m", "benchmarks.direct"]


def encode(job: Direct) -> str:
    """What the client reads on stdin."""
    return json.dumps(asdict(job))


if __name__ == "__main__":
    json.dump(uvloop.run(first_token_times(Direct(**json.load(sys.stdin)))), sys.stdout)
