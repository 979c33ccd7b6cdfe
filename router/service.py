"""One request: check, tokenise, submit, and a stream of chunks until its one end.

Every protocol comes through here.
"""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

from router.ask import Ask, EmbedAsk, Embedded
from router.config import Settings
from router.core.events import Submitted
from router.driver import Driver
from router.embedding import Embedder
from router.errors import Fault, RequestError
from router.fleet import Fleet, ModelCard
from router.generation import Generation, Outs, Work
from router.preparing import Preparer
from router.text.encoding import INLINE_CHARS, encoded
from router.text.messages import weight
from router.text.tokenizer import Tokenizer, TokenSpan
from router.tracing import CALL
from router.validation import (
    check_ask,
    check_vocabulary,
    invalid,
    is_greedy,
    needs_of,
    sampling_of,
    tokens_allowed,
    with_adapter,
)

INLINE_TOKENS = 4096


class Service:
    """Runs requests against the models of a fleet."""

    def __init__(self, fleet: Fleet, driver: Driver, settings: Settings) -> None:
        self._fleet = fleet
        self._driver = driver
        self._settings = settings
        self._embedder = Embedder(fleet, settings, driver)
        self._preparer = Preparer(fleet, settings)
        # A token without log probabilities looks the same each time: one object will do.
        self._outs: WeakKeyDictionary[Tokenizer, Outs] = WeakKeyDictionary()

    async def generate(self, ask: Ask) -> Generation:
        """Checks, tokenises and submits a request.

        Raises RequestError, with the field at fault if there is one.
        """
        began, trace = perf_counter(), CALL.get().answer()
        try:
            card = self._fleet.model(ask.model)
            ask = with_adapter(ask, self._fleet.adapter(ask.model))
            check_ask(ask, card, self._settings)
            prompt = await self._prompt(card, ask)
            trace.tokenised()
            work = self._work(card, ask, prompt)
            if ask.params.constraint is not None:
                await self._preparer.prepare(card.id, ask)
                trace.compiled()
            self._driver.metrics.validated(perf_counter() - began)
            channel = self._driver.submit(work.submitted, trace=trace)
        except RequestError as error:
            self._driver.refused(error)
            raise
        return Generation(self._driver, channel, work)

    async def embed(self, ask: EmbedAsk) -> Embedded:
        """Turns inputs into vectors. Raises RequestError, as ``Embedder.embed`` says."""
        try:
            return await self._embedder.embed(ask)
        except RequestError as error:
            self._driver.refused(error)
            raise

    def refused(self, error: RequestError) -> None:
        """Counts and logs a request that a layer above this one turns away."""
        self._driver.refused(error)

    async def render_chat(
        self,
        model: ModelCard | str | None,
        messages: Sequence[Mapping[str, Any]],
        name: str | None = None,
        /,
        **variables: Any,
    ) -> str:
        """Lays out a conversation with the model's own chat template, or the one of that name.

        ``variables`` are what the template may read beside the messages: ``tools``,
        ``add_generation_prompt`` and the model's own switches. Encode the result without special
        tokens: the template has written them.

        Raises RequestError: TEMPLATE if there is no template or it objects, VALIDATION for no
        messages or for a variable that cannot be set.
        """
        card = self.card(model)
        template = card.tokenizer.template(name)
        if template is None:
            raise RequestError(
                Fault.TEMPLATE,
                f"the model {card.id} has no chat template: send a finished prompt instead",
                "messages",
            )
        if not messages:
            raise invalid("`messages` cannot be empty", "messages")
        if weight(messages, variables) <= INLINE_CHARS:
            return template.render(messages, variables)
        return await asyncio.to_thread(template.render, messages, variables)

    async def tokenize(
        self, model: ModelCard | str | None, text: str, add_special_tokens: bool = True
    ) -> list[TokenSpan]:
        """The tokens of a text and where each is, in code points. Raises RequestError."""
        encode = self.card(model).tokenizer.encode_offsets
        return await encoded(encode, text, add_special_tokens, "text")

    async def detokenize(
        self, model: ModelCard | str | None, ids: Sequence[int], skip_special_tokens: bool = True
    ) -> str:
        """The text of these tokens. Raises RequestError for an id that the model has not."""
        card = self.card(model)
        check_vocabulary(ids, card.vocab_size, "token_ids")
        if len(ids) <= INLINE_TOKENS:
            return card.tokenizer.decode(ids, skip_special_tokens)
        return await asyncio.to_thread(card.tokenizer.decode, ids, skip_special_tokens)

    def card(self, model: ModelCard | str | None) -> ModelCard:
        """The model of this name, or the default one. Raises RequestError, MODEL_NOT_FOUND."""
        return self._fleet.model(model) if model is None or isinstance(model, str) else model

    async def _prompt(self, card: ModelCard, ask: Ask) -> tuple[int, ...]:
        """The prompt's token ids after truncation, which keeps the last ones."""
        ids: Sequence[int]
        if isinstance(ask.prompt, str):
            encode = card.tokenizer.encode
            ids = await encoded(encode, ask.prompt, ask.add_special_tokens, "prompt")
        else:
            ids = ask.prompt
        return tuple(ids if ask.truncate is None else ids[-ask.truncate :])

    def _work(self, card: ModelCard, ask: Ask, prompt: tuple[int, ...]) -> Work:
        """Everything about the request that is fixed from now on."""
        params = ask.params
        max_tokens = tokens_allowed(len(prompt), params, card)
        eos = () if params.ignore_eos else card.eos_token_ids
        named = card.tokenizer.special_named(params.stop)
        stop_tokens = frozenset((*eos, *params.stop_token_ids, *named))
        seed = None
        if not is_greedy(params):
            # 63 bits: a seed that is reported fits the signed integers of every client.
            seed = secrets.randbits(63) if params.seed is None else params.seed
        submitted = Submitted(
            request=self._driver.next_request_id(),
            model=card.id,
            prompt=prompt,
            max_tokens=max_tokens,
            stop_tokens=stop_tokens,
            needs=needs_of(params),
            priority=ask.priority,
            deadline_ms=self._deadline_ms(ask),
            sampling=sampling_of(params, seed, stop_tokens, self._settings),
            adapter=ask.adapter,
        )
        outs = self._outs.setdefault(card.tokenizer, {})
        blame = self._preparer.blame(card.id, ask)
        return Work(card, submitted, params, seed, named, outs, blame)

    def _deadline_ms(self, ask: Ask) -> int | None:
        limits = (ask.deadline_s, self._settings.request_deadline_s)
        given = [seconds for seconds in limits if seconds is not None]
        return self._driver.now_ms() + max(1, round(min(given) * 1000)) if given else None
