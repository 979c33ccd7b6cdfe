"""A language model that fits in a page, and an asynchronous engine around it.

The engine is a real one in all but the model: requests wait for memory and a place, run together,
each in one iteration at a time, and can be aborted; it keeps account of what it holds. Fakes of
engine packages put their own faces on it.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from shards.engines.base import Logprobs, SamplingParams
from shards.sampling import Sampler, splitmix64

VOCAB = 288
# How long an iteration takes: enough for the loop to serve others in between.
ITERATION_S = 0.0


def logits(tokens: Sequence[int]) -> np.ndarray:
    """Numbers in [0, 8) that depend on the last three tokens and the length; float32."""
    context = len(tokens)
    for token in tokens[-3:]:
        context = splitmix64(context ^ token)
    keys = np.arange(VOCAB, dtype=np.uint64) + np.uint64(context >> 1)
    keys *= np.uint64(0x9E3779B97F4A7C15)
    keys ^= keys >> np.uint64(29)
    keys *= np.uint64(0xBF58476D1CE4E5B9)
    return ((keys >> np.uint64(40)).astype(np.float32) / np.float32(1 << 21)).astype(np.float32)


class EngineDied(RuntimeError):
    """What a request hears when the engine's process is gone."""


@dataclass(eq=False)
class Running:
    """One request. ``pieces`` is what its stream reads: how many tokens there are, or its end."""

    key: str
    tokens: list[int]
    count: int
    sampling: SamplingParams
    bias: np.ndarray
    stops: frozenset[int]
    pieces: deque[int | Exception | None] = field(default_factory=deque)
    came: asyncio.Event = field(default_factory=asyncio.Event)
    made: list[int] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)
    reason: str = ""
    # As sampling parameters look to ``shards.sampling``.
    prompt_len: int = 0
    plain: bool = False
    guide: None = None

    def say(self, piece: int | Exception | None) -> None:
        """Adds to the stream; None ends it, an exception is raised by whoever reads."""
        self.pieces.append(piece)
        self.came.set()

    async def hear(self) -> int | None:
        """The next piece; of several counts the last."""
        while not self.pieces:
            self.came.clear()
            await self.came.wait()
        piece = self.pieces.popleft()
        while isinstance(piece, int) and self.pieces and isinstance(self.pieces[0], int):
            piece = self.pieces.popleft()
        if isinstance(piece, Exception):
            raise piece
        return piece

    @property
    def reserved(self) -> int:
        """Tokens of memory that the engine sets aside: it never evicts."""
        return len(self.tokens) - len(self.made) + self.count


class ToyEngine:
    """Runs requests on the event loop that submits the first one."""

    def __init__(self, pool_tokens: int, running_max: int) -> None:
        self.pool_tokens = pool_tokens
        self.running_max = running_max
        self.waiting: list[Running] = []
        self.running: list[Running] = []
        self.aborted: list[str] = []
        self.asked: list[Running] = []
        self.queued_most = 0
        self.fault: Callable[[Running], str] = lambda _request: ""
        self.stalled = False
        self.dies_after = 0
        self.iterations = 0
        self._sampler = Sampler(VOCAB)
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    def submit(self, request: Running) -> None:
        """Takes a request in; its first token comes in a later iteration."""
        request.prompt_len = len(request.tokens)
        self.asked.append(request)
        self.waiting.append(request)
        self._wake.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run())

    def abort(self, key: str) -> None:
        """Ends a request at the end of the iteration; an unknown one is none of its business."""
        for request in [*self.waiting, *self.running]:
            if request.key == key:
                self.aborted.append(key)
                self._end(request, "abort")

    def _end(self, request: Running, reason: str) -> None:
        request.reason = reason
        for line in (self.waiting, self.running):
            if request in line:
                line.remove(request)
        request.say(None)

    async def _run(self) -> None:
        while True:
            self._admit()
            if not self.running or self.stalled:
                self._wake.clear()
                await self._wake.wait()
                continue
            self.iterations += 1
            if 0 < self.dies_after < self.iterations:
                self._die()
                return
            for request in list(self.running):
                self._iterate(request)
            await asyncio.sleep(ITERATION_S)

    def _admit(self) -> None:
        while self.waiting:
            used = sum(request.reserved for request in self.running)
            full = len(self.running) >= self.running_max
            if full or used + self.waiting[0].reserved > self.pool_tokens:
                break
            self.running.append(self.waiting.pop(0))
        self.queued_most = max(self.queued_most, len(self.waiting))

    def _die(self) -> None:
        for request in [*self.waiting, *self.running]:
            request.say(EngineDied("the engine's process exited with code -9"))
        self.running, self.waiting = [], []

    def _iterate(self, request: Running) -> None:
        fault = self.fault(request)
        if fault:
            request.say(ValueError(fault))
            self._end(request, "abort")
            return
        row = logits(request.tokens) + request.bias
        drawn = self._sampler.draw(row[None, :], [request])
        token = drawn.tokens[0]
        request.tokens.append(token)
        request.made.append(token)
        if 0 in drawn.logprobs:
            request.logprobs.append(drawn.logprobs[0])
        request.say(len(request.made))
        if token in request.stops:
            self._end(request, "stop")
        elif len(request.made) == request.count:
            self._end(request, "length")
