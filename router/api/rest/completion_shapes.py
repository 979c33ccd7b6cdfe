"""Completions in OpenAI's shapes: whole ones, and the events of a stream as prepared bytes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import orjson

from router.api.rest.collect import Whole
from router.api.rest.models_completions import CompletionRequest
from router.api.rest.openai_shapes import (
    FINISH_REASON,
    Head,
    Json,
    cut_tops,
    finite,
    ids_of,
    prompt_logprobs,
)
from router.ask import Chunk, TokenOut
from router.generation import Generation


@dataclass(frozen=True, slots=True)
class Style:
    """How answers to one request are written.

    ``tops`` is the number of likeliest tokens to report, or None for no log probabilities;
    ``scored`` says that the prompt's belong to the answer, ``silent`` that only the prompt does;
    ``special`` tokens are part of the text; ``prompt_tops`` is as ``tops``, in a list of its own;
    ``ids`` says that the ids of tokens are reported.
    """

    tops: int | None
    scored: bool
    silent: bool
    special: bool
    prompt_tops: int | None
    ids: bool

    @classmethod
    def of(cls, body: CompletionRequest) -> "Style":
        """The style that a request asks for."""
        return cls(
            tops=body.logprobs,
            scored=bool(body.echo) and body.logprobs is not None,
            silent=body.max_tokens == 0,
            special=body.skip_special_tokens is False,
            prompt_tops=body.prompt_logprobs,
            ids=bool(body.return_token_ids),
        )


def completion_choice(index: int, answer: Whole, echo: str, style: Style) -> Json:
    """Returns one whole completion; ``echo`` is what of the prompt goes in front of its text."""
    finish = answer.finish
    tokens = [] if style.silent else answer.tokens
    logprobs = None
    if style.scored:
        logprobs = Logprobs(0, style).of([*finish.prompt, *tokens])
    elif style.tops is not None:
        logprobs = Logprobs(len(echo), style).of(tokens)
    choice = {
        "index": index,
        "text": echo if style.silent else echo + finish.text,
        "logprobs": logprobs,
        "finish_reason": FINISH_REASON[finish.reason],
    }
    if style.prompt_tops is not None:
        choice["prompt_logprobs"] = prompt_logprobs(finish.prompt, style.prompt_tops)
    if style.ids:
        choice |= {"prompt_token_ids": answer.prompt_ids, "token_ids": ids_of(tokens)}
    return choice


class Logprobs:
    """Writes log probabilities as parallel lists; ``offset`` is where the next token's text is."""

    def __init__(self, offset: int, style: Style) -> None:
        self._offset = offset
        self._style = style

    def of(self, tokens: Iterable[TokenOut]) -> Json:
        """Returns the lists for tokens that follow those of the last call."""
        tops = self._style.tops or 0
        taken = cut_tops(tokens, tops)
        offsets = []
        for token in taken:
            offsets.append(self._offset)
            if self._style.special or not token.special:
                self._offset += len(token.text)
        return {
            "tokens": [token.text for token in taken],
            "token_logprobs": [_logprob(token) for token in taken],
            "top_logprobs": [_tops(token) for token in taken] if tops else None,
            "text_offset": offsets,
        }


def _logprob(token: TokenOut) -> float | None:
    """The token's own; nothing comes before the first one of a prompt, so it has none."""
    return None if token.logprob is None else finite(token.logprob)


def _tops(token: TokenOut) -> dict[str, float] | None:
    """The likeliest tokens by text, and the token itself wherever it comes.

    Of several with the same text, as parts of characters have, it is the likeliest.
    """
    if token.logprob is None:
        return None
    found: dict[str, float] = {}
    for _, text, logprob in token.top:
        found.setdefault(text, finite(logprob))
    return found | {token.text: finite(token.logprob)}


class CompletionEvents:
    """Makes the events of one choice; ``echo`` goes in front of the text of the first.

    All of an event but the text is the same from chunk to chunk, so it is prepared once.
    """

    def __init__(self, head: Head, index: int, echo: str, style: Style) -> None:
        self._head = head
        self._index = index
        self._echo = echo
        self._style = style
        offset = 0 if style.scored else len(echo)
        self._logprobs = None if style.tops is None else Logprobs(offset, style)
        self._answer: Generation | None = None
        self._prompt_ids: Sequence[int] = ()
        self._before, self._after = head.prepared(index, b'"text":', b"")

    def begin(self, answer: Generation) -> None:
        """Says which answer the chunks will be of."""
        self._answer = answer
        self._prompt_ids = answer.prompt_ids

    def of(self, chunk: Chunk) -> bytes:
        """Returns the event of a chunk; empty if it has nothing for the client."""
        if self._logprobs is not None or self._style.ids or chunk.finish is not None:
            return self._full(chunk)
        text = "" if self._style.silent else chunk.text
        if self._echo:
            text, self._echo = self._echo + text, ""
        return self._before + orjson.dumps(text) + self._after if text else b""

    def _full(self, chunk: Chunk) -> bytes:
        silent = self._style.silent
        text = self._echo if silent else self._echo + chunk.text
        tokens: Sequence[TokenOut] = () if silent else chunk.tokens
        ids = self._ids(tokens) if self._style.ids else {}
        self._echo = ""
        if self._style.scored and self._answer is not None:
            # All of the prompt has been scored when the first token comes.
            tokens, self._answer = (*self._answer.prompt, *tokens), None
        finish = chunk.finish
        choice = {
            "index": self._index,
            "text": text,
            "logprobs": None if self._logprobs is None else self._logprobs.of(tokens),
            "finish_reason": FINISH_REASON[finish.reason] if finish else None,
            **ids,
        }
        return self._head.event([choice])

    def _ids(self, tokens: Sequence[TokenOut]) -> Json:
        """The ids of an event's tokens, and on the first one those of the prompt."""
        before, self._prompt_ids = self._prompt_ids, ()
        first = {"prompt_token_ids": before} if before else {}
        return {**first, "token_ids": ids_of(tokens)}
