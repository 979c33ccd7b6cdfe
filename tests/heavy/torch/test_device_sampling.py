"""Tokens drawn on the device: those of the host's sampler, whatever the neighbours.

The device is the CPU here; ``tests/heavy/gpu`` has the same for a GPU.
"""

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shards.engines import draw_trial, torch_filters, torch_rows, torch_sampling
from shards.engines.base import Engine, ModelError, Plan, SamplingParams
from shards.engines.torch_filters import portion
from shards.engines.torch_ranks import Ranks
from shards.engines.torch_sampling import serves
from tests.engines.contract import EngineContract
from tests.engines.contract_grammar import GrammarContract
from tests.engines.driving import admit
from tests.heavy.drawing import (
    BORDERS,
    EXCHANGED_PER_THOUSAND,
    KINDS,
    Row,
    random_logits,
    random_rows,
)
from tests.heavy.models import tiny_llama_folder
from tests.heavy.torch.drawing import Both
from tests.heavy.torch.made import make

VOCAB = 2000
PROMPTS = [[(7 * n + 13 * k) % 250 for k in range(24 + 7 * n)] for n in range(1, 5)]


@pytest.fixture(scope="module")
def made() -> Iterator[Engine]:
    engine = make(tiny_llama_folder(), extra={"sample": "device"})
    assert engine._drawer is not None
    yield engine
    engine.close()


class TestContract(GrammarContract, EngineContract):
    @pytest.fixture
    def engine(self, made: Engine) -> Engine:
        made.reset()
        return made

    @pytest.fixture
    def prompts(self) -> list[list[int]]:
        return PROMPTS


# The same tokens as on the host -----------------------------------------------------------------


@pytest.mark.parametrize("width", [48, 1024])
@pytest.mark.parametrize("asked", KINDS.values(), ids=KINDS.keys())
def test_draws_what_the_host_draws(asked: dict[str, object], width: int) -> None:
    """Rows of all kinds, few likely tokens and many, with equals as 16-bit logits have them."""
    both = Both(VOCAB, width)
    random = np.random.default_rng(len(str(asked)))
    spreads, steps = (0.2, 1.0, 3.0, 8.0), (0.0, 0.125, 1.0)
    exchanged, rows = both.all_exchanged(random, VOCAB, 25, spreads, steps, **asked)
    assert not both.brought
    assert exchanged <= rows * EXCHANGED_PER_THOUSAND / 1000


def test_draws_what_the_host_draws_of_a_large_vocabulary() -> None:
    size, random = 50_000, np.random.default_rng(3)
    both = Both(size)
    found = [both.all_exchanged(random, size, 4, (0.5, 3.0), **asked) for asked in KINDS.values()]
    assert sum(exchanged for exchanged, _ in found) <= 1


@pytest.mark.parametrize("barred", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("asked", BORDERS.values(), ids=BORDERS.keys())
def test_borders_are_the_hosts(asked: dict[str, object], barred: float) -> None:
    """Also where most logits are minus infinity."""
    both, random = Both(VOCAB, 64), np.random.default_rng(5)
    for spread, step in ((0.3, 0.0), (3.0, 0.0), (3.0, 1.0)):
        logits = random_logits(random, 24, VOCAB, spread, step)
        logits[random.random(logits.shape) < barred] = -np.inf
        logits[:, 700] = np.maximum(logits[:, 700], 0.0)
        assert both.exchanged(logits, random_rows(random, 24, **asked)) == 0


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.95, 0.7, 0.99])
@pytest.mark.parametrize("top_k", [0, 40, 300, 1000])
def test_of_equal_tokens_the_smaller_ids_stay(top_p: float, top_k: int) -> None:
    """All are equal, and what top_p asks for is a whole number of them, up to rounding."""
    random = np.random.default_rng(1)
    rows = random_rows(random, 100, temperature=1.7, top_p=top_p, top_k=top_k)
    logits = np.full((100, VOCAB), 3.25, np.float32)
    both = Both(VOCAB, 64)
    assert both.exchanged(logits, rows) == 0
    most = round((top_k or VOCAB) * top_p)
    assert most * 0.9 < max(both.draw(logits, rows).tokens) < most


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("asked", KINDS.values(), ids=KINDS.keys())
def test_logits_that_are_not_finite_fail_their_row_only(
    asked: dict[str, object], bad: float
) -> None:
    random = np.random.default_rng(2)
    logits, rows = random_logits(random, 6, VOCAB, 3.0), random_rows(random, 6, **asked)
    logits[2, 17] = bad
    logits[4] = -np.inf
    both = Both(VOCAB, 64)
    assert both.exchanged(logits, rows) == 0
    drawn = both.draw(logits, rows)
    assert drawn.failures == dict.fromkeys((2, 4), "the engine's logits are not finite numbers")
    assert (drawn.tokens[2], drawn.tokens[4]) == (0, 0)


def test_16_bit_logits_are_drawn_as_they_are() -> None:
    random, both = np.random.default_rng(4), Both(VOCAB)
    rows = [row for asked in KINDS.values() for row in random_rows(random, 8, **asked)]
    logits = torch.from_numpy(random_logits(random, len(rows), VOCAB, 4.0)).bfloat16()
    seen = both.here.draw(logits, rows)
    expected = both.host.draw(logits.float().numpy(), rows)
    assert sum(one != other for one, other in zip(seen.tokens, expected.tokens, strict=True)) <= 1


# Neighbours -------------------------------------------------------------------------------------


def mixed(random: np.random.Generator) -> list[Row]:
    """Rows of every kind, shuffled, some of which only the host draws."""
    more: list[dict[str, object]] = [
        {"temperature": 1.0, "presence_penalty": 1.0},
        {"logit_bias": ((3, 50.0),)},
        {"temperature": 1.0, "typical_p": 0.9, "logprobs": True, "top_logprobs": 3},
        {"temperature": 1.0, "min_tokens": 400, "stop_tokens": (1, 2)},
    ]
    rows = [row for asked in (*KINDS.values(), *more) for row in random_rows(random, 3, **asked)]
    return [rows[index] for index in random.permutation(len(rows))]


def test_device_and_host_rows_of_one_step_keep_their_places() -> None:
    random, both = np.random.default_rng(6), Both(VOCAB)
    rows = mixed(random)
    logits = random_logits(random, len(rows), VOCAB, 3.0)
    there = [index for index, row in enumerate(rows) if not serves(row)]
    logits[there[0], 5] = np.nan
    assert len(there) == 12
    assert both.exchanged(logits, rows) == 0
    assert both.brought == [12], "only the rows that ask for more come to the host"


def test_nothing_comes_to_the_host_for_a_row_whose_penalties_are_off_by_now() -> None:
    sampling = SamplingParams(temperature=1.0, min_tokens=3, stop_tokens=(1,))
    assert not serves(Row(sampling, range(5), 3))
    assert serves(Row(sampling, range(6), 3))
    assert serves(Row(SamplingParams(typical_p=0.5), range(6), 3)), "greedy: nothing to filter"


def test_neighbours_change_nothing() -> None:
    """Not a bit: alone, in another order, among others, and many at once."""
    random, both = np.random.default_rng(7), Both(VOCAB, 128)
    rows = [row for row in mixed(random) if serves(row)]
    logits = random_logits(random, len(rows), VOCAB, 2.0)
    together = both.draw(logits, rows)
    order = random.permutation(len(rows))
    shuffled = both.draw(logits[order], [rows[index] for index in order])
    for place, index in enumerate(order):
        alone = both.draw(logits[index : index + 1], [rows[index]])
        assert alone.tokens[0] == together.tokens[index] == shuffled.tokens[place]
        told = together.logprobs.get(int(index))
        assert alone.logprobs.get(0) == told == shuffled.logprobs.get(place)


def test_few_rows_at_once_draw_what_many_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory is bounded."""
    random, both = np.random.default_rng(8), Both(VOCAB)
    rows = mixed(random)
    logits = random_logits(random, len(rows), VOCAB, 3.0)
    whole = both.draw(logits, rows)
    monkeypatch.setattr(torch_sampling, "AT_ONCE", 2 * VOCAB)
    monkeypatch.setattr(torch_sampling, "SORTED_AT_ONCE", 1)
    assert both.draw(logits, rows) == whole


@pytest.mark.parametrize("width", [1, 7, 300])
def test_few_tokens_decide_as_all_do(width: int) -> None:
    """However many are looked at first."""
    random = np.random.default_rng(9)
    rows = [row for asked in KINDS.values() for row in random_rows(random, 30, **asked)]
    logits = random_logits(random, len(rows), VOCAB, 1.5, 0.125)
    narrow, wide = Both(VOCAB, width), Both(VOCAB, VOCAB)
    assert narrow.draw(logits, rows) == wide.draw(logits, rows)
    assert (narrow.uploads, wide.uploads) == (2, 1)


class Operations(TorchDispatchMode):
    """Counts what is asked of the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_more_rows_are_not_more_operations() -> None:
    few = [asked for name, asked in KINDS.items() if name != "top_k of most"]
    counts = []
    for copies in (1, 16):
        random, both = np.random.default_rng(10), Both(VOCAB)
        rows = [row for asked in few for row in random_rows(random, copies, **asked)]
        logits = random_logits(random, len(rows), VOCAB, 4.0)
        with Operations() as operations:
            both.draw(logits, rows)
        assert both.uploads == 1, "the likeliest tokens decide all rows"
        counts.append(operations.count)
    assert counts[0] == counts[1] < 600, "all six kinds together"


def test_shares_of_a_mass_are_exact() -> None:
    random = np.random.default_rng(11)
    totals = [1, 2**31 - 1, 2**31, 2**62, *random.integers(1, 2**62, 500).tolist()]
    shares = [0.0, 1.0, 1.0 - 2.0**-53, 2.0**-53, 0.9, *random.random(400).tolist()]
    for share in shares:
        column = torch.tensor(totals)[:, None]
        parts = [torch.full_like(column, part) for part in torch_filters.parts(share)]
        seen = portion(column, (parts[0], parts[1]))[:, 0].tolist()
        assert seen == [int(Fraction(share) * total) for total in totals]


# The engine -------------------------------------------------------------------------------------


def test_a_step_with_all_kinds_of_rows_draws_as_the_host_does(made: Engine) -> None:
    host = make(tiny_llama_folder(), extra={"sample": "host"})
    asked = [
        SamplingParams(temperature=0.8, seed=3),
        SamplingParams(),
        SamplingParams(temperature=1.0, frequency_penalty=1.0, seed=5),
        SamplingParams(temperature=1.0, top_p=0.9, logprobs=True, top_logprobs=3, seed=6),
    ]
    admits = [admit(n, PROMPTS[n], one) for n, one in enumerate(asked)]
    first = Plan(admits=admits, work=[(n, len(PROMPTS[n])) for n in (2, 0, 3, 1)])
    plans = [first, *[Plan(work=[(n, 1) for n in (3, 1, 2, 0)])] * 20]
    made.reset()
    for plan in plans:
        seen, expected = made.step(plan), host.step(plan)
        assert (seen.sequences, seen.tokens) == (expected.sequences, expected.tokens)
        assert seen.logprobs[3].logprob == pytest.approx(expected.logprobs[3].logprob, abs=1e-4)
    host.close()


def test_a_cpu_draws_on_the_host_unless_told_otherwise(made: Engine) -> None:
    engine = make(tiny_llama_folder())
    assert engine._drawer is None
    assert engine.describe().warnings == made.describe().warnings == ()
    engine.close()
    with pytest.raises(ModelError, match="sample"):
        make(tiny_llama_folder(), extra={"sample": "moon"})


def broken(*_given: object) -> None:
    raise RuntimeError("no such sort on this device\nand a long story")


def dependent(weights: torch.Tensor, *_given: object) -> torch.Tensor:
    return (torch.arange(len(weights)) % weights.shape[1])[:, None]


def unfiltered(_top_p: float) -> float:
    return 0.0


def coarse(weights: torch.Tensor, bits: int) -> torch.Tensor:
    return (weights * 2.0**8).long() << (bits - 8)


@pytest.mark.parametrize(
    ("place", "name", "fault", "reason"),
    [
        (torch_filters.Near, "__init__", broken, "it failed: no such sort on this device"),
        (torch_sampling, "invert", dependent, "the order of the rows changes what they get"),
        (torch_rows, "spare_share", unfiltered, "it draws other tokens at temperature"),
        (torch_sampling, "units", coarse, "its log probabilities are others"),
        (torch_sampling, "NOT_FINITE", "fine", "it does not tell the same rows that are no"),
    ],
    ids=["fails", "depends", "differs", "misjudges", "overlooks"],
)
def test_a_device_that_draws_otherwise_is_not_used(
    monkeypatch: pytest.MonkeyPatch, place: object, name: str, fault: object, reason: str
) -> None:
    monkeypatch.setattr(place, name, fault)
    engine = make(tiny_llama_folder(), extra={"sample": "device"})
    assert engine._drawer is None
    (warning,) = engine.describe().warnings
    assert warning.startswith(f"tokens are drawn on the host, not on cpu: {reason}")
    assert "\n" not in warning
    plan = Plan(admits=[admit(1, PROMPTS[0], SamplingParams(temperature=1.0))], work=[(1, 31)])
    assert len(engine.step(plan).tokens) == 1
    engine.close()


def test_one_rank_that_cannot_draw_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks must draw the same tokens."""
    given: list[int] = []

    def least(_self: Ranks, value: int, _device: object) -> int:
        given.append(value)
        return 0 if value == 1 else value

    monkeypatch.setattr(Ranks, "least", least)
    engine = make(tiny_llama_folder(), extra={"sample": "device"})
    assert given[-1] == 1, "this rank could"
    assert engine._drawer is None
    assert "another rank's device" in engine.describe().warnings[0]
    engine.close()


def test_what_rounding_exchanges_is_forgiven_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no token that is far away in the distribution."""
    both = Both(VOCAB)
    rows, logits = draw_trial._rows(VOCAB)
    expected = both.host.draw(logits, rows)
    exact = logits.astype(np.float64)
    warm = [n for n, row in enumerate(rows) if row.sampling.temperature == 1.0][:3]

    def shifted(by: int, count: int) -> str:
        seen = both.host.draw(logits, rows)
        for index in warm[:count]:
            seen.tokens[index] += by
            seen.logprobs.pop(index, None)
        return draw_trial._compare(exact, rows, seen, expected)

    monkeypatch.setattr(draw_trial, "_SHARE_MAX", 1.0)
    assert shifted(1, 0) == shifted(1, 1) == shifted(1, 2) == ""
    assert shifted(1, 3).startswith("it draws other tokens")
    monkeypatch.setattr(draw_trial, "_SHARE_MAX", 1e-12)
    assert shifted(1, 1).startswith("it draws other tokens")
