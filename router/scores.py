"""The log probabilities of a prompt, put beside its tokens as they come."""

from collections.abc import Sequence
from typing import Any

from router.ask import TokenOut
from router.channel import Batch, Channel
from router.text.tokenizer import Tokenizer

LEAST = -9999.0
"""Stands for the logarithm of zero, which JSON has no number for. OpenAI's own value for it."""


class PromptScores:
    """The tokens of one prompt, in order; ``tokens`` is complete before the first generated one."""

    __slots__ = ("_ids", "_outs", "_tokenizer", "_writer")

    def __init__(self, tokenizer: Tokenizer, ids: Sequence[int]) -> None:
        self._ids = ids
        self._tokenizer = tokenizer
        self._writer = tokenizer.detokenizer()
        self._outs: list[TokenOut] = []
        self._add(None, ())

    @property
    def tokens(self) -> tuple[TokenOut, ...]:
        """The tokens so far. Nothing predicts the first, so it has no log probability."""
        return tuple(self._outs)

    def push(self, values: Sequence[object]) -> None:
        """Takes a ``shards.v1.TokenLogprobs`` for each of the next tokens."""
        for value in values:
            self._add(*_numbers(self._tokenizer, value))

    def _add(
        self, logprob: float | None, top: tuple[tuple[int, str, float], ...], rank: int = 0
    ) -> None:
        token = self._ids[len(self._outs)]
        text, _ = self._writer.push(token)
        special = self._tokenizer.is_special(token)
        self._outs.append(TokenOut(token, text, special, logprob, top, rank))


async def next_batch(channel: Channel, scores: PromptScores | None) -> Batch:
    """Waits for tokens or the end. What there is to say of the prompt meanwhile goes to ``scores``.

    It comes step by step, and is laid out as it comes: all at once would hold up other streams.
    """
    while True:
        batch = await channel.get()
        if scores is not None:
            scores.push(batch.prompt)
        if batch.tokens or batch.close is not None:
            return batch


def _numbers(
    tokenizer: Tokenizer, value: Any
) -> tuple[float, tuple[tuple[int, str, float], ...], int]:
    """What a ``shards.v1.TokenLogprobs`` says: of the token, of the likeliest ones, its rank."""
    pairs = zip(value.top_tokens, value.top_values, strict=True)
    text_of = tokenizer.token_text
    top = tuple((token, text_of(token), max(number, LEAST)) for token, number in pairs)
    return max(value.logprob, LEAST), top, value.rank
