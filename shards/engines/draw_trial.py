"""Tries, when a model is loaded, whether its device draws the tokens that the host draws.

Nobody can test every accelerator beforehand, and a device whose whole numbers or order are not what
they should be would answer wrongly and say nothing. So each kind of row is drawn of random logits
both ways, in the model's vocabulary: likely tokens few and many, with and without equals.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from shards.allowed import Guiding
from shards.engines.base import Logprobs, SamplingParams
from shards.filters import Floats
from shards.residents import is_plain
from shards.sampling import Drawn, Row, Sampler

# Spreads of logits: likely tokens are few, or most of the vocabulary.
_SPREADS = (4.0, 0.5)
# Between two tokens that rounding exchanged there is no more than this share of the mass,
_SHARE_MAX = 1e-4
# and that happens to few rows: hardly to one in a hundred, in the flattest of large vocabularies.
_EXCHANGED_MAX = 2
_LOGPROB_NEAR = 1e-3
# More tokens than any device looks at before all others.
_MANY = 2048
_ASKED = (
    SamplingParams(),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.2, min_p=0.1),
    SamplingParams(temperature=1.3, top_p=0.9),
    SamplingParams(temperature=1.0, top_p=0.999, min_p=0.05),
    SamplingParams(temperature=1.0, top_p=1e-6),
    SamplingParams(temperature=2.0, top_k=1),
    SamplingParams(temperature=0.8, top_k=40, top_p=0.95, min_p=0.02),
    SamplingParams(temperature=1.0, top_k=_MANY, top_p=0.5),
    SamplingParams(logprobs=True, top_logprobs=20, ranks=True),
    SamplingParams(temperature=1.0, logprobs=True),
    SamplingParams(temperature=0.7, top_p=0.95, logprobs=True, top_logprobs=5, ranks=True),
)


@dataclass(frozen=True, slots=True)
class _Row:
    sampling: SamplingParams
    tokens: Sequence[int]
    prompt_len: int = 1
    guide: Guiding | None = None
    plain: bool = field(default=False)


def trouble(
    draw: Callable[[Floats, Sequence[Row]], Drawn],
    host: Sampler,
    vocab_size: int,
    rounded: Callable[[Floats], Floats] = lambda logits: logits,
) -> str:
    """Why a device cannot be trusted to draw, in one line; empty if it can.

    ``draw`` draws there, ``host`` is what it must equal. Logits are ``rounded`` beforehand to what
    the device can hold.
    """
    rows, made = _rows(vocab_size)
    try:
        logits = rounded(made)
        expected = host.draw(logits, rows)
        seen = draw(logits, rows)
        turned = draw(np.ascontiguousarray(logits[::-1]), rows[::-1])
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        return f"it failed: {(str(error).splitlines() or [repr(error)])[0]}"
    if turned.tokens != seen.tokens[::-1]:
        return "the order of the rows changes what they get"
    return _compare(logits.astype(np.float64), rows, seen, expected)


def _rows(vocab_size: int) -> tuple[list[_Row], NDArray[np.float32]]:
    """Every kind of row, of every kind of logits, the last of which are no numbers."""
    random = np.random.default_rng(0)
    rows: list[_Row] = []
    logits = []
    for spread in _SPREADS:
        for equals in (False, True):
            for sampling in _ASKED:
                row = random.normal(0.0, spread, vocab_size).astype(np.float32)
                logits.append(row.round(1) if equals else row)
                tokens = range(1 + len(rows))
                rows.append(_Row(sampling, tokens, plain=is_plain(sampling)))
    logits[-1][vocab_size // 2] = math.nan
    return rows, np.stack(logits)


def _compare(
    logits: NDArray[np.float64], rows: Sequence[_Row], seen: Drawn, expected: Drawn
) -> str:
    if seen.failures != expected.failures:
        return "it does not tell the same rows that are no numbers"
    exchanged = 0
    for index, (token, wanted) in enumerate(zip(seen.tokens, expected.tokens, strict=True)):
        if token != wanted:
            exchanged += 1
            share = _between(logits[index], rows[index].sampling.temperature, token, wanted)
            if share > _SHARE_MAX or exchanged > _EXCHANGED_MAX:
                return f"it draws other tokens at {_named(rows[index].sampling)}"
        elif not _alike(seen.logprobs.get(index), expected.logprobs.get(index)):
            return "its log probabilities are others"
    return ""


def _named(one: SamplingParams) -> str:
    return f"temperature {one.temperature}, top_k {one.top_k}, top_p {one.top_p}, min_p {one.min_p}"


def _between(logits: NDArray[np.float64], temperature: float, one: int, other: int) -> float:
    """The share of the mass from one token to another one, the later one left out."""
    if temperature == 0.0:
        return 1.0
    weights = np.exp((logits - logits.max()) / temperature)
    low, high = sorted((one, other))
    return float(weights[low:high].sum() / weights.sum())


def _alike(seen: Logprobs | None, expected: Logprobs | None) -> bool:
    if seen is None or expected is None:
        return seen is expected
    near = np.allclose(
        [seen.logprob, *seen.top_values],
        [expected.logprob, *expected.top_values],
        rtol=0.0,
        atol=_LOGPROB_NEAR,
    )
    tops = list(seen.top_tokens) == list(expected.top_tokens)
    return bool(near) and tops and seen.rank == expected.rank
