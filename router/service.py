"""One request: check, tokenise, submit, and a stream of chunks until its one end.

Every protocol comes through here. A ``Generation`` cancels its request however it is left before
the end, so nothing is computed for a client that has gone.
"""

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

from router.ask import Ask, Chunk, EmbedAsk, Embedded, Finish, Params, TokenOut
from router.channel import Batch, Channel
from router.config import Settings
from router.core.effects import Close
from router.core.events import Reason, Submitted
from router.driver import Driver
from router.embedding import Embedder
from router.errors import FAULT_OF_REASON, Fault, RequestError
from router.fleet import Fleet, ModelCard
from router.preparing import Blame, Preparer
from router.scores import PromptScores, next_batch
from router.text.encoding import INLINE_CHARS, encoded
from router.text.messages import weight
from router.text.stop import StopMatcher
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

Outs = dict[int, TokenOut]


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

    async def generate(self, ask: Ask) -> "Generation":
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

    def _work(self, card: ModelCard, ask: Ask, prompt: tuple[int, ...]) -> "Work":
        """Everything about the request that is fixed from now on."""
        params = ask.params
        max_tokens = tokens_allowed(len(prompt), params, card)
        eos = () if params.ignore_eos else card.eos_token_ids
        stop_tokens = frozenset((*eos, *params.stop_token_ids))
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
        return Work(card, submitted, params, seed, outs, self._preparer.blame(card.id, ask))

    def _deadline_ms(self, ask: Ask) -> int | None:
        limits = (ask.deadline_s, self._settings.request_deadline_s)
        given = [seconds for seconds in limits if seconds is not None]
        return self._driver.now_ms() + max(1, round(min(given) * 1000)) if given else None


@dataclass(frozen=True, slots=True)
class Work:
    """A request as it was accepted. ``seed`` is None when greedy.

    ``outs`` are the tokens of this model's answers that have been seen, without log probabilities.
    """

    model: ModelCard
    submitted: Submitted
    params: Params
    seed: int | None
    outs: Outs
    blame: Blame


class Generation:
    """An answer on its way: an async iterator of chunks, the last of which has the ``finish``.

    Use it as a context manager: leaving it before the end, in whatever way, cancels the request.
    Iteration raises RequestError if the answer breaks off, at once or after some chunks.
    """

    __slots__ = (
        "_blame",
        "_channel",
        "_count",
        "_driver",
        "_ended_by",
        "_hide",
        "_kept",
        "_matcher",
        "_outs",
        "_over",
        "_params",
        "_prompt",
        "_seed",
        "_stop_tokens",
        "_text",
        "_writer",
        "model",
        "prompt_ids",
        "prompt_tokens",
        "request",
    )

    def __init__(self, driver: Driver, channel: Channel, work: Work) -> None:
        params, submitted = work.params, work.submitted
        self.model, self.request = work.model, submitted.request
        self.prompt_ids, self.prompt_tokens = submitted.prompt, len(submitted.prompt)
        self._driver = driver
        self._channel = channel
        self._blame = work.blame
        self._params = params
        self._prompt: PromptScores | None = None
        if params.prompt_logprobs:
            self._prompt = PromptScores(work.model.tokenizer, submitted.prompt)
        self._seed = work.seed
        self._outs = work.outs
        self._stop_tokens = submitted.stop_tokens
        self._hide = params.skip_special_tokens
        self._kept = params.kept_tokens if self._hide else frozenset()
        self._writer = work.model.tokenizer.detokenizer()
        self._matcher = StopMatcher(params.stop, params.include_stop) if params.stop else None
        self._text: list[str] = []
        self._count = 0
        self._ended_by = Reason.EOS
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        """Waits for what comes next: everything that has arrived since the last call."""
        if self._over:
            raise StopAsyncIteration
        try:
            if self._prompt is None:
                return self._chunk(await self._channel.get())
            return self._chunk(await next_batch(self._channel, self._prompt))
        except RequestError as error:
            raise await self._blame(error) from None

    @property
    def prompt(self) -> tuple[TokenOut, ...]:
        """The prompt's tokens if their log probabilities were asked for; all by the first chunk."""
        return () if self._prompt is None else self._prompt.tokens

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Ends the request if it has not ended yet."""
        if not self._over:
            self._over = True
            self._driver.end(self.request, Reason.CANCELLED)

    def _chunk(self, batch: Batch) -> Chunk:
        close = batch.close
        if close is not None and close.reason in FAULT_OF_REASON:
            self._over = True
            detail = close.detail or f"the answer broke off: {close.reason.value}"
            error = RequestError(FAULT_OF_REASON[close.reason], detail)
            error.counted = True  # by the driver, when it closed the channel
            raise error
        tokens, text = self._take(batch)
        if self._matcher is not None and self._matcher.matched is not None:
            return self._stopped(tokens, text, close)
        if close is not None:
            return self._closed(tokens, text, close)
        if text:
            self._text.append(text)
        return Chunk(tokens, text)

    def _take(self, batch: Batch) -> tuple[tuple[TokenOut, ...], str]:
        """The batch's tokens, up to a stop string, and the text that they make final."""
        push, matcher, outs, hide = self._writer.push, self._matcher, self._outs, self._hide
        kept = self._kept
        taken: list[TokenOut] = []
        texts: list[str] = []
        for index, token in enumerate(batch.tokens):
            if token in self._stop_tokens:
                out, text = self._last(token)
            else:
                shown, plain = push(token)
                text = plain if hide else shown
                if token in kept:
                    text = plain + self.model.tokenizer.token_text(token)
                known = outs.get(token)
                # The tables of detokenizers give the same string object each time.
                if known is None or known.text is not shown:
                    special = self.model.tokenizer.is_special(token)
                    known = outs[token] = TokenOut(token, shown, special)
                out = known
            if batch.logprobs and batch.logprobs[index] is not None:
                out = self._with_logprobs(out, batch.logprobs[index])
            taken.append(out)
            if matcher is not None:
                text = matcher.push(text)
                if matcher.matched is not None:
                    texts.append(text)
                    break
            texts.append(text)
        self._count += len(taken)
        return tuple(taken), texts[0] if len(texts) == 1 else "".join(texts)

    def _last(self, token: int) -> tuple[TokenOut, str]:
        """A token that ends the answer by itself, and what of it is text.

        It is cut from the text like a stop string. One that is an end of sequence shows where
        special tokens do, whether or not the tokenizer lists it as special.
        """
        end = token in self.model.eos_token_ids
        self._ended_by = Reason.EOS if end else Reason.STOP_TOKEN
        special = end or self.model.tokenizer.is_special(token)
        kept = not self._hide if special else self._params.include_stop
        if kept and not special:
            shown, text = self._writer.push(token)
        else:
            shown = self._writer.hide(token)
            text = shown if kept else ""
        return TokenOut(token, shown, special), text

    def _with_logprobs(self, out: TokenOut, entry: Any) -> TokenOut:
        """The token with what a ``shards.v1.TokenLogprobs`` says of it."""
        tops = zip(entry.top_tokens, entry.top_values, strict=True)
        text_of = self.model.tokenizer.token_text
        top = tuple((token, text_of(token), value) for token, value in tops)
        return TokenOut(out.id, out.text, out.special, entry.logprob, top, entry.rank)

    def _stopped(self, tokens: tuple[TokenOut, ...], text: str, close: Close | None) -> Chunk:
        """The end by a stop string. If the worker has not ended by itself, it is told to."""
        self._over = True
        if close is None:
            self._driver.end(self.request, Reason.STOP_STRING)
        return self._finish(tokens, text, Reason.STOP_STRING)

    def _closed(self, tokens: tuple[TokenOut, ...], text: str, close: Close) -> Chunk:
        """The end that the core saw: what was held back comes out now."""
        self._over = True
        shown, plain = self._writer.flush()
        rest, matcher = plain if self._hide else shown, self._matcher
        # The core does not tell the model's own ends from those that the client named.
        reason = self._ended_by if close.reason is Reason.EOS else close.reason
        if matcher is not None:
            rest = matcher.push(rest)
            if matcher.matched is not None:
                reason = Reason.STOP_STRING
            else:
                rest += matcher.flush()
        return self._finish(tokens, text + rest, reason)

    def _finish(self, tokens: tuple[TokenOut, ...], text: str, reason: Reason) -> Chunk:
        self._text.append(text)
        finish = Finish(
            reason=reason,
            text="".join(self._text),
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self._count,
            cached_tokens=self._channel.life.cached_tokens,
            seed=self._seed,
            stop=None if self._matcher is None else self._matcher.matched,
            prompt=self.prompt,
            queued_ms=self._channel.life.queued_ms,
        )
        return Chunk(tokens, text, finish)
