"""An answer on its way from its channel to whoever asked: tokens become text, up to one end.

A ``Generation`` cancels its request however it is left before the end, so nothing is computed for a
client that has gone.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from router.ask import Chunk, Finish, Params, TokenOut
from router.channel import Batch, Channel
from router.core.effects import Close
from router.core.events import Reason, Submitted
from router.driver import Driver
from router.errors import FAULT_OF_REASON, RequestError
from router.fleet import ModelCard
from router.preparing import Blame
from router.scores import PromptScores, next_batch
from router.text.stop import StopMatcher

Outs = dict[int, TokenOut]


@dataclass(frozen=True, slots=True)
class Work:
    """A request as it was accepted. ``seed`` is None when greedy.

    ``named`` are the special tokens that stop strings name, which are no text to look for them in.
    ``outs`` are the tokens of this model's answers that have been seen, without log probabilities.
    """

    model: ModelCard
    submitted: Submitted
    params: Params
    seed: int | None
    named: Mapping[int, str]
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
        "_named",
        "_outs",
        "_over",
        "_params",
        "_prompt",
        "_seed",
        "_stop",
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
        self._named = work.named
        self._hide = params.skip_special_tokens
        self._kept = params.kept_tokens if self._hide else frozenset()
        self._writer = work.model.tokenizer.detokenizer()
        self._matcher = StopMatcher(params.stop, params.include_stop) if params.stop else None
        self._text: list[str] = []
        self._count = 0
        self._ended_by = Reason.EOS
        self._stop: str | None = None
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
        if not end and token in self._named:
            self._ended_by, self._stop = Reason.STOP_STRING, self._named[token]
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
        matcher = self._matcher
        self._text.append(text)
        finish = Finish(
            reason=reason,
            text="".join(self._text),
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self._count,
            cached_tokens=self._channel.life.cached_tokens,
            seed=self._seed,
            stop=self._stop if matcher is None else matcher.matched or self._stop,
            prompt=self.prompt,
            queued_ms=self._channel.life.queued_ms,
        )
        return Chunk(tokens, text, finish)
