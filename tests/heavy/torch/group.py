"""The ranks of a group as real processes, driven over gRPC as the router does."""

import json
import math
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from shards.v1 import shard_pb2 as pb
from shards.v1 import shard_pb2_grpc

# A machine that does other things too may take long to load three processes.
LOAD_S = 180.0
STEP_S = 60.0
# Where two tokens are so near, in nats, rounding may choose either.
CLOSE = 1e-3


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Answer:
    """Drawn tokens, and for each the log probabilities of all that were asked for, by token."""

    tokens: list[int] = field(default_factory=list)
    told: list[dict[int, float]] = field(default_factory=list)

    def assert_same(self, tokens: Sequence[int]) -> None:
        """These are the same, up to a tie that rounding may decide, where greedy answers part."""
        for at, (seen, own) in enumerate(zip(tokens, self.tokens, strict=False)):
            if seen != own:
                told = self.told[at]
                assert abs(told.get(seen, -math.inf) - told[own]) < CLOSE, f"token {at} differs"
                return
        assert len(tokens) == len(self.tokens)


class Rank:
    """One process and one Run stream to it."""

    def __init__(self, folder: Path, number: int, arguments: Sequence[str]) -> None:
        self.address = f"unix://{folder}/rank{number}.sock"
        self.plans: queue.Queue[pb.Plan | None] = queue.Queue(maxsize=64)
        self.lines: list[dict[str, object]] = []
        fixed = f"--engine torch --listen {self.address} --rank {number} --threads 1"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "shards", *fixed.split(), "--exit-with-parent", *arguments],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GRPC_VERBOSITY": "NONE"},
        )
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if line.startswith("{"):
                self.lines.append(json.loads(line))
                if self.lines[-1]["event"] in ("ready", "error"):
                    self._ready.set()
        self._ready.set()

    def connect(self) -> None:
        assert self._ready.wait(LOAD_S), "the rank did not become ready in time"
        assert self.lines[-1]["event"] == "ready", self.lines[-1]
        self.channel = grpc.insecure_channel(self.address)
        stub = shard_pb2_grpc.ShardStub(self.channel)
        self.info = stub.Describe(pb.DescribeRequest(), timeout=STEP_S)
        self.outcomes = stub.Run(iter(self.plans.get, None))

    def error(self) -> str:
        """The last error that the process told."""
        return str([line for line in self.lines if line["event"] == "error"][-1]["message"])

    def close(self) -> None:
        if hasattr(self, "channel"):
            self.plans.put(None)
            self.channel.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        with self.process:  # waits, and closes the pipes once the reader is through
            self._reader.join(10)


class Group:
    """All ranks. Each plan goes to every rank, and each must answer with the same digest."""

    def __init__(self, folder: Path, model: Path, world: int, *more: str) -> None:
        arguments = ["--model", str(model), "--world", str(world), *more]
        if world > 1:
            arguments += ["--rendezvous", f"127.0.0.1:{free_port()}"]
        self.ranks = [Rank(folder, number, arguments) for number in range(world)]
        self._plan_id = 0

    def connect(self) -> None:
        for rank in self.ranks:
            rank.connect()

    def send(self, *, to: Sequence[int] | None = None, **fields: object) -> None:
        """Writes one plan to all ranks, or to some; ``fields`` are those of ``pb.Plan``."""
        if to is None or 0 in to:
            self._plan_id += 1
        plan = pb.Plan(epoch=1, plan_id=self._plan_id, **fields)
        for number, rank in enumerate(self.ranks):
            if to is None or number in to:
                rank.plans.put(plan)

    def hear(self) -> list[pb.Outcome]:
        """The next outcome of each rank."""
        return [next(rank.outcomes) for rank in self.ranks]

    def outcome(self, **fields: object) -> pb.Outcome:
        """What rank 0 tells of a step, after all ranks have told the same digest."""
        self.send(**fields)
        first, *others = self.hear()
        assert all(other.digest == first.digest for other in others)
        assert all(not other.tokens for other in others)
        return first

    def step(self, **fields: object) -> dict[int, int]:
        """What rank 0 drew, by sequence."""
        first = self.outcome(**fields)
        return dict(zip(first.sequences, first.tokens, strict=True))

    def generate(self, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
        """Admits and computes one prompt a step beside the earlier ones, then decodes all."""
        drawn: dict[int, list[int]] = {}

        def note(step: dict[int, int]) -> None:
            for sequence, token in step.items():
                drawn.setdefault(sequence, []).append(token)

        for number, prompt in enumerate(prompts, start=1):
            sampling = pb.Sampling(temperature=0.8, seed=number) if number % 3 == 0 else None
            admit = pb.Admit(
                sequence=number, tokens=prompt, prompt_len=len(prompt), sampling=sampling
            )
            work = [*drawn, number]
            sizes = [1] * len(drawn) + [len(prompt)]
            note(self.step(admits=[admit], work_sequences=work, work_tokens=sizes))
        while min(map(len, drawn.values())) < count:
            note(self.step(work_sequences=list(drawn), work_tokens=[1] * len(drawn)))
        return [tokens[:count] for _, tokens in sorted(drawn.items())]

    def answers(self, admits: Sequence[pb.Admit], counts: Mapping[int, int]) -> dict[int, Answer]:
        """Admits all at once; draws until each has ended, or has as many tokens as it may have.

        Answers by sequence. All sequences are dropped in the end, one by one as they end.
        """
        ends = self.ranks[0].info.eos_token_ids
        made = {admit.sequence: Answer() for admit in admits}
        sizes = {admit.sequence: len(admit.tokens) for admit in admits}
        fields: dict[str, object] = {"admits": admits}
        while sizes:
            work = {"work_sequences": list(sizes), "work_tokens": list(sizes.values())}
            outcome = self.outcome(**fields, **work)
            assert not outcome.failures
            for told in outcome.logprobs:
                values = dict(zip(told.top_tokens, told.top_values, strict=True))
                made[told.sequence].told.append(values)
            over = []
            for sequence, token in zip(outcome.sequences, outcome.tokens, strict=True):
                drawn = made[sequence].tokens
                drawn.append(token)
                if token in ends or len(drawn) == counts[sequence]:
                    over.append(sequence)
            fields = {"drops": over}
            sizes = {sequence: 1 for sequence in sizes if sequence not in over}
        self.step(**fields)
        return made


@contextmanager
def group(folder: Path, model: Path, world: int, *more: str) -> Iterator[Group]:
    folder.mkdir(exist_ok=True)
    made = Group(folder, model, world, *more)
    try:
        made.connect()
        yield made
    finally:
        for rank in made.ranks:
            rank.close()


def seconds_until(condition: object, limit_s: float) -> float:
    """How long it takes until a condition holds; fails after the limit."""
    assert callable(condition)
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < limit_s, "took too long"
        time.sleep(0.02)
    return time.monotonic() - began
