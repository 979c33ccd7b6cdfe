"""The way of one request's tokens from the driver to whoever reads them.

A channel needs no limit of its own: it never holds more than the request's ``max_tokens`` and what
there is to say of its prompt, so a client that reads slowly costs memory that was granted to it and
stalls nobody.
"""

import asyncio
from collections.abc import Sequence
from itertools import repeat
from typing import NamedTuple

from router.core.effects import Close
from router.metrics import Lifetime


class Batch(NamedTuple):
    """What has arrived for a request since the last look.

    ``logprobs`` is empty if no token has any; else parallel to ``tokens``, with None or a
    ``shards.v1.TokenLogprobs`` for each. ``close`` is set once the request has ended, and nothing
    follows it. ``prompt`` has a ``shards.v1.TokenLogprobs`` for each of the next tokens of the
    prompt, the first one left out, if these were asked for; all have come by the first token.
    """

    tokens: list[int]
    logprobs: list[object]
    close: Close | None
    prompt: Sequence[object] = ()


class Channel:
    """The way of one request's tokens from the driver to the service. One reader.

    ``life`` is what metrics want to know; ``last_ms`` is when the latest token came, -1 before any.
    ``due`` is the driver's: whether the channel stands in its line of readers to wake. A request
    that is not ``counted`` is in the metrics of another process.
    """

    counted = True
    __slots__ = (
        "_close",
        "_logprobs",
        "_loop",
        "_prompt",
        "_room",
        "_tokens",
        "_waiter",
        "due",
        "last_ms",
        "life",
    )

    def __init__(self, life: Lifetime) -> None:
        self.life = life
        self.last_ms = -1
        self.due = False
        self._room = life.tokens_max
        self._tokens: list[int] = []
        self._logprobs: list[object] = []
        self._prompt: list[object] = []
        self._close: Close | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._loop = asyncio.get_running_loop()

    async def get(self) -> Batch:
        """Waits until something has arrived and returns all of it.

        It always comes: the core ends every request by its deadline or with its workers, and a
        driver that ends, in whatever way, closes all channels.
        """
        if not self._tokens and not self._prompt and self._close is None:
            assert self._waiter is None, "a channel has one reader"
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        batch = Batch(self._tokens, self._logprobs, self._close, self._prompt)
        self._tokens, self._logprobs = [], []
        if self._prompt:
            self._prompt = []
        return batch

    def push(self, token: int, logprob: object | None) -> None:
        """Appends a token. Never waits. The reader is woken by ``wake``."""
        self._room -= 1
        assert self._room >= 0, "more tokens than the request may have"
        if logprob is not None or self._logprobs:
            self._logprobs += repeat(None, len(self._tokens) - len(self._logprobs))
            self._logprobs.append(logprob)
        self._tokens.append(token)

    def push_prompt(self, values: Sequence[object]) -> None:
        """Appends log probabilities of the prompt. The reader is woken by ``wake``."""
        self._prompt += values
        assert len(self._prompt) < self.life.prompt_tokens, "more than the prompt has"

    def close(self, close: Close) -> None:
        """Says that nothing follows. The reader is woken by ``wake``."""
        self._close = close

    def wake(self) -> None:
        """Lets the reader go on, if it waits."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
