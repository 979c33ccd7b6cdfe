"""Embeddings: check, tokenise, and ask a group that can make vectors.

They have nothing to do with the core: they hold no memory from one call to the next, and a worker
computes at most one batch of them between two steps. What bounds them is here: how many inputs a
request has, how long each is, how many requests are open, and how long each may take.
"""

import asyncio
from collections import Counter
from collections.abc import Collection, Sequence
from math import isfinite

from router.ask import EmbedAsk, Embedded
from router.config import Settings
from router.driver import Driver
from router.errors import Fault, RequestError
from router.fleet import EmbedCall, Fleet, ModelCard
from router.link import LinkDownError, UnreachableError
from router.tracing import CALL
from router.validation import check_vocabulary, invalid

INPUTS_MAX = 2048
"""Inputs of one request, as many as OpenAI takes."""
CALL_INPUTS_MAX = 256
"""Inputs that a worker takes in one call; ``shards/wire.py`` has the same bound."""
DEADLINE_S = 300.0
"""What a request may take if nobody sets a shorter time."""
FEATURE = "embeddings"


class Embedder:
    """Runs embedding requests. ``driver`` says whether new ones are taken, and waits for them."""

    def __init__(self, fleet: Fleet, settings: Settings, driver: Driver) -> None:
        self._fleet = fleet
        self._settings = settings
        self._driver = driver
        self._open = 0
        self._at: Counter[str] = Counter()

    async def embed(self, ask: EmbedAsk) -> Embedded:
        """Returns a vector for each input. Cancelled, it cancels the worker's call.

        Raises RequestError: VALIDATION or UNSUPPORTED with the field at fault, MODEL_NOT_FOUND,
        OVERLOADED, UNAVAILABLE, DEADLINE, WORKER_LOST, ENGINE_FAILED.
        """
        if not self._driver.accepting:
            raise RequestError(Fault.UNAVAILABLE, "the server is shutting down")
        most = self._settings.max_concurrent_requests
        if self._open >= most:
            raise RequestError(
                Fault.OVERLOADED,
                f"{most} requests for embeddings are open, which is the most this server takes "
                "(max_concurrent_requests); try again later",
            )
        card = self._fleet.model(ask.model)
        check(ask, card, self._fleet.adapter(ask.model))
        self._open += 1
        try:
            with self._driver.beside():
                async with asyncio.timeout(self._limit_s(ask)):
                    inputs = await asyncio.to_thread(_tokenise, card, ask.inputs)
                    _check_lengths(inputs, card)
                    vectors = await self._all_vectors(card, inputs)
        except TimeoutError:
            text = "the deadline passed before the embeddings were complete"
            raise RequestError(Fault.DEADLINE, text) from None
        finally:
            self._open -= 1
        found = Embedded(vectors, sum(map(len, inputs)), card.id)
        CALL.get().embedded(found)
        return found

    def _limit_s(self, ask: EmbedAsk) -> float:
        given = (ask.deadline_s, self._settings.request_deadline_s, DEADLINE_S)
        return min(seconds for seconds in given if seconds is not None)

    async def _all_vectors(
        self, card: ModelCard, inputs: Sequence[Sequence[int]]
    ) -> list[Sequence[float]]:
        """One call after the other, so that a long list holds up nobody else's for long."""
        vectors: list[Sequence[float]] = []
        for start in range(0, len(inputs), CALL_INPUTS_MAX):
            vectors += await self._vectors(card, inputs[start : start + CALL_INPUTS_MAX])
        return vectors

    async def _vectors(
        self, card: ModelCard, inputs: Sequence[Sequence[int]]
    ) -> list[Sequence[float]]:
        """Asks the groups that are up, the one with fewest requests first, until one answers.

        One that takes the place of a lost group may have come up while that was asked.
        """
        asked, cause = set[str](), ""
        while calls := self._calls_beside(card, asked):
            name = min(calls, key=lambda name: self._at[name])
            asked.add(name)
            try:
                return await self._call(name, calls[name], inputs)
            except UnreachableError:
                continue  # it has gone before it heard of this
            except LinkDownError as error:
                cause = str(error)
        if cause:
            raise RequestError(Fault.WORKER_LOST, f"the worker was lost: {cause}")
        text = f"no worker that embeds for the model {card.id} is up; try again in a few seconds"
        raise RequestError(Fault.UNAVAILABLE, text)

    def _calls_beside(self, card: ModelCard, asked: Collection[str]) -> dict[str, EmbedCall]:
        """The groups that are up now and have not been asked, and how each is."""
        calls = self._fleet.embed_calls(card.id)
        return {name: call for name, call in calls.items() if name not in asked}

    async def _call(
        self, name: str, call: EmbedCall, inputs: Sequence[Sequence[int]]
    ) -> list[Sequence[float]]:
        self._at[name] += 1
        try:
            vectors = await call(inputs)
        finally:
            self._at[name] -= 1
        if len(vectors) != len(inputs) or not all(isfinite(sum(vector)) for vector in vectors):
            text = "the engine did not make one vector of numbers for each input"
            raise RequestError(Fault.ENGINE_FAILED, text)
        return vectors


def check(ask: EmbedAsk, card: ModelCard, adapter: str) -> None:
    """Checks everything that needs no tokenising. Raises RequestError."""
    if FEATURE not in card.features:
        engines = " and ".join(sorted({group.engine for group in card.groups})) or "none"
        raise RequestError(
            Fault.UNSUPPORTED,
            f"the model {card.id} is served by the engine {engines}, which does not support "
            f"{FEATURE}, or was started without them",
            "model",
        )
    if adapter:
        text = f"{adapter} is an adapter; embeddings are made by the model itself: name {card.id}"
        raise RequestError(Fault.UNSUPPORTED, text, "model")
    if not 0 < len(ask.inputs) <= INPUTS_MAX:
        text = f"`input` must have 1 to {INPUTS_MAX} entries. Given: {len(ask.inputs)}"
        raise invalid(text, "input")
    for one in ask.inputs:
        if not one:
            raise invalid("`input` holds an empty entry", "input")
        if not isinstance(one, str):
            check_vocabulary(one, card.vocab_size, "input")
    if ask.deadline_s is not None and not 0 < ask.deadline_s < float("inf"):
        text = f"the deadline must be a positive number of seconds. Given: {ask.deadline_s}"
        raise invalid(text, "deadline_s")


def _tokenise(card: ModelCard, inputs: Sequence[str | tuple[int, ...]]) -> list[Sequence[int]]:
    encode = card.tokenizer.encode
    try:
        return [encode(one, True) if isinstance(one, str) else one for one in inputs]
    except ValueError as error:
        raise invalid(f"`input` cannot be tokenised: {error}", "input") from error


def _check_lengths(inputs: Sequence[Sequence[int]], card: ModelCard) -> None:
    for number, ids in enumerate(inputs):
        if not 0 < len(ids) <= card.embed_tokens_max:
            raise invalid(
                f"`input` entry {number} must have 1 to {card.embed_tokens_max} tokens. "
                f"Given: {len(ids)}",
                "input",
            )
