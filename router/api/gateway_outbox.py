"""What one gateway is to hear next: everything that has come of its requests, in one message.

The driver appends tokens while it performs a step, and wakes the one writer of the stream behind
it; so all tokens of a step leave in one message, and while a message is being written, those of the
next steps join. Nothing here is done once per token but an append.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

from router.channel import Channel
from router.core.effects import Close
from router.core.events import Reason
from router.gateway_wire import REASON_TO_WIRE
from router.metrics import Lifetime
from router.v1 import gateway_pb2 as pb

WEIGHT_MAX = 2**20
"""Tokens and ends that may wait for a gateway; a token counts once more for each alternative to it.

That is some ten megabytes, and seconds of not reading. What a gateway's clients have not read yet
waits in the gateway, request by request.
"""


class Outbox:
    """Appending never waits; one writer takes everything with ``get``.

    ``overflown`` is done once the gateway has read too slowly; from then on nothing is kept.
    """

    def __init__(self) -> None:
        self.overflown: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._delivery = pb.Delivery()
        self._requests: list[int] = []
        self._tokens: list[int] = []
        self._weight = 0
        self._news: list[pb.ToGateway] = []
        self._waiter: asyncio.Future[None] | None = None

    def token(self, request: int, token: int, logprob: Any) -> None:
        """A token of a request, and what is said of its probability."""
        weight = 1
        if logprob is not None:
            weight += len(logprob.top_tokens)
            self._delivery.logprobs_at.append(len(self._tokens))
            self._delivery.logprobs.append(logprob)
        self._requests.append(request)
        self._tokens.append(token)
        self._weigh(weight)

    def prompt(self, request: int, values: Sequence[Any]) -> None:
        """Log probabilities of the next tokens of a request's prompt."""
        self._delivery.prompts.add(request=request, values=values)
        self._weigh(sum(1 + len(value.top_tokens) for value in values))

    def start(self, request: int, life: Lifetime) -> None:
        """A worker has begun with a request."""
        queued_ms = max(0, life.admitted_ms - life.submitted_ms)
        self._delivery.starts.add(
            request=request, cached_tokens=life.cached_tokens, queued_ms=queued_ms
        )

    def close(self, request: int, reason: Reason, detail: str) -> None:
        """A request has ended."""
        self._delivery.closes.add(request=request, reason=REASON_TO_WIRE[reason], detail=detail)
        self._weigh(1)

    def tell(self, news: pb.ToGateway) -> None:
        """A message of another kind; it takes the place of one of its kind that still waits."""
        kind = news.WhichOneof("message")
        self._news = [one for one in self._news if one.WhichOneof("message") != kind]
        self._news.append(news)
        self.wake()

    def wake(self) -> None:
        """Lets the writer go on, if it waits."""
        waiter = self._waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    @property
    def empty(self) -> bool:
        """Whether there is nothing to say."""
        return not (self._weight or self._news)

    async def wait(self) -> None:
        """Waits for a ``wake``, unless there is something already."""
        if self.empty:
            assert self._waiter is None, "an outbox has one writer"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    def take(self) -> list[pb.ToGateway]:
        """Everything that there is to say, news first."""
        messages, self._news = self._news, []
        if self._weight:
            delivery = self._delivery
            delivery.requests.extend(self._requests)
            delivery.tokens.extend(self._tokens)
            messages.append(pb.ToGateway(delivery=delivery))
        self._clear()
        return messages

    def _weigh(self, weight: int) -> None:
        self._weight += weight
        if self._weight > WEIGHT_MAX:
            self._clear()
            if not self.overflown.done():
                self.overflown.set_result(None)

    def _clear(self) -> None:
        self._delivery = pb.Delivery()
        self._requests, self._tokens, self._weight = [], [], 0


class GatewayChannel(Channel):
    """The way of the tokens of one of a gateway's requests: into the outbox that all of them share.

    ``request`` is the gateway's number for it, ``open_ids`` the gateway's open requests, of which a
    closed one is none. The gateway counts it in its metrics.
    """

    counted = False
    __slots__ = ("_begun", "_open_ids", "_outbox", "_request")

    def __init__(
        self, outbox: Outbox, request: int, open_ids: dict[int, int], life: Lifetime
    ) -> None:
        super().__init__(life)
        self._outbox = outbox
        self._request = request
        self._open_ids = open_ids
        self._begun = False

    def push(self, token: int, logprob: object | None) -> None:
        """Appends a token."""
        if not self._begun:
            self._begin()
        self._outbox.token(self._request, token, logprob)

    def push_prompt(self, values: Sequence[object]) -> None:
        """Appends log probabilities of the prompt."""
        if not self._begun:
            self._begin()
        self._outbox.prompt(self._request, values)

    def close(self, close: Close) -> None:
        """Says that nothing follows."""
        if not self._begun and self.life.admitted_ms >= 0:
            self._begin()
        self._open_ids.pop(self._request, None)
        self._outbox.close(self._request, close.reason, close.detail)

    def wake(self) -> None:
        """Wakes the writer of the gateway's stream; once for all that were pushed before."""
        self._outbox.wake()

    def _begin(self) -> None:
        self._begun = True
        self._outbox.start(self._request, self.life)
        self.life.trace.begun()
