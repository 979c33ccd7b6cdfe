"""Tokens drawn on the device: those of the host's sampler, whatever the neighbours.

The device is the CPU here; ``tests/heavy/gpu`` has the same for a GPU. The contract of an engine
that draws so is in ``test_contract.py``.
"""

from collections.abc import Iterator
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shards.engines import jax_filters, jax_sampling
from shards.engines.base import ModelError, Plan, SamplingParams
from shards.engines.device_draw import parts, serves
from shards.engines.jax_engine import JaxEngine
from shards.engines.jax_mesh import Group
from tests.engines.driving import admit
from tests.heavy.drawing import (
    BORDERS,
    EXCHANGED_PER_THOUSAND,
    KINDS,
    VOCAB,
    Row,
    random_logits,
    random_rows,
)
from tests.heavy.jax.drawing import Both
from tests.heavy.jax.test_contract import make

COUNTS = (1, 4, 32, 100)
PROMPTS = [[(7 * n + 13 * k) % 250 for k in range(24 + 7 * n)] for n in range(1, 5)]
# One shape of each kind is enough for engines that do not serve for long.
SMALL = {"sequences_max": 4, "step_tokens_max": 256}
DEVICE = (("page_tokens", "8"), ("sample", "device"))


@pytest.fixture(scope="module")
def both() -> Both:
    return Both(VOCAB, COUNTS)


@pytest.fixture(autouse=True)
def nothing_brought(request: pytest.FixtureRequest) -> None:
    """Tests count what comes to the host."""
    if "both" in request.fixturenames:
        request.getfixturevalue("both").brought.clear()


# The same tokens as on the host -----------------------------------------------------------------


@pytest.mark.parametrize("asked", KINDS.values(), ids=KINDS.keys())
def test_draws_what_the_host_draws(both: Both, asked: dict[str, object]) -> None:
    """Rows of all kinds, few likely tokens and many, with equals as 16-bit logits have them."""
    random = np.random.default_rng(len(str(asked)))
    spreads, steps = (0.2, 1.0, 3.0, 8.0), (0.0, 0.125, 1.0)
    exchanged, rows = both.all_exchanged(random, VOCAB, 25, spreads, steps, **asked)
    assert not both.brought
    assert exchanged <= rows * EXCHANGED_PER_THOUSAND / 1000


def test_draws_what_the_host_draws_of_a_large_vocabulary() -> None:
    size, random = 50_000, np.random.default_rng(3)
    both = Both(size, (4,))
    found = [both.all_exchanged(random, size, 4, (0.5, 3.0), **asked) for asked in KINDS.values()]
    assert sum(exchanged for exchanged, _ in found) <= 1


@pytest.mark.parametrize("barred", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("asked", BORDERS.values(), ids=BORDERS.keys())
def test_borders_are_the_hosts(both: Both, asked: dict[str, object], barred: float) -> None:
    """Also where most logits are minus infinity."""
    random = np.random.default_rng(5)
    for spread, step in ((0.3, 0.0), (3.0, 0.0), (3.0, 1.0)):
        logits = random_logits(random, 24, VOCAB, spread, step)
        logits[random.random(logits.shape) < barred] = -np.inf
        logits[:, 700] = np.maximum(logits[:, 700], 0.0)
        assert both.exchanged(logits, random_rows(random, 24, **asked)) == 0


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.95, 0.7, 0.99])
@pytest.mark.parametrize("top_k", [0, 40, 300, 1000])
def test_of_equal_tokens_the_smaller_ids_stay(both: Both, top_p: float, top_k: int) -> None:
    """All are equal, and what top_p asks for is a whole number of them, up to rounding."""
    random = np.random.default_rng(1)
    rows = random_rows(random, 100, temperature=1.7, top_p=top_p, top_k=top_k)
    logits = np.full((100, VOCAB), 3.25, np.float32)
    assert both.exchanged(logits, rows) == 0
    most = round((top_k or VOCAB) * top_p)
    assert most * 0.9 < max(both.draw(logits, rows).tokens) < most


def test_the_two_zeros_are_equals(both: Both) -> None:
    random = np.random.default_rng(12)
    logits = np.where(random.random((100, VOCAB)) < 0.5, np.float32(-0.0), np.float32(0.0))
    for asked in ({"top_k": 300}, {"logprobs": True, "top_logprobs": 20}):
        rows = random_rows(random, 100, temperature=1.0, **asked)
        assert both.exchanged(logits, rows) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("asked", KINDS.values(), ids=KINDS.keys())
def test_logits_that_are_not_finite_fail_their_row_only(
    both: Both, asked: dict[str, object], bad: float
) -> None:
    random = np.random.default_rng(2)
    logits, rows = random_logits(random, 6, VOCAB, 3.0), random_rows(random, 6, **asked)
    logits[2, 17] = bad
    logits[4] = -np.inf
    assert both.exchanged(logits, rows) == 0
    drawn = both.draw(logits, rows)
    assert drawn.failures == dict.fromkeys((2, 4), "the engine's logits are not finite numbers")
    assert (drawn.tokens[2], drawn.tokens[4]) == (0, 0)


# Neighbours -------------------------------------------------------------------------------------


def mixed(random: np.random.Generator) -> list[Row]:
    """Rows of every kind, shuffled, some of which only the host draws."""
    more: list[dict[str, object]] = [
        {"temperature": 1.0, "presence_penalty": 1.0},
        {"logit_bias": ((3, 50.0),)},
        {"temperature": 1.0, "typical_p": 0.9, "logprobs": True, "top_logprobs": 3},
        {"temperature": 1.0, "min_tokens": 400, "stop_tokens": (1, 2)},
        {"logprobs": True, "top_logprobs": 21},
    ]
    rows = [row for asked in (*KINDS.values(), *more) for row in random_rows(random, 3, **asked)]
    return [rows[index] for index in random.permutation(len(rows))]


def test_device_and_host_rows_of_one_step_keep_their_places(both: Both) -> None:
    random = np.random.default_rng(6)
    rows = mixed(random)
    logits = random_logits(random, len(rows), VOCAB, 3.0)
    there = [index for index, row in enumerate(rows) if not serves(row)]
    logits[there[0], 5] = np.nan
    assert both.exchanged(logits, rows) == 0
    assert both.brought == [15], "only the rows that ask for more come to the host"


def test_neighbours_change_nothing(both: Both) -> None:
    """Not a bit: alone, in another order, among others, and beside rows with other filters."""
    random = np.random.default_rng(7)
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


def test_few_rows_at_once_draw_what_many_do(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch memory is bounded."""
    random = np.random.default_rng(8)
    rows = mixed(random)
    logits = random_logits(random, len(rows), VOCAB, 3.0)
    whole = both.draw(logits, rows)
    monkeypatch.setattr(jax_filters, "AT_ONCE", 9 * VOCAB)
    few = Both(VOCAB, (100,))
    assert few.draw(logits, rows) == whole
    sizes = [
        one.here._draws[100, jax_sampling.FILTERS[-1]].memory_analysis().temp_size_in_bytes
        for one in (few, both)
    ]
    assert sizes[0] < sizes[1] / 3


def test_shares_of_a_mass_are_exact() -> None:
    random = np.random.default_rng(11)
    totals = [1, 2**31 - 1, 2**31, 2**62, *random.integers(1, 2**62, 500).tolist()]
    with jax.enable_x64(True):
        column = jnp.array(totals, jnp.int64)[:, None]
        for share in (0.0, 1.0, 1.0 - 2.0**-53, 2.0**-53, 0.9, *random.random(100).tolist()):
            upper, lower = (jnp.full(column.shape, part, jnp.int32) for part in parts(share))
            seen = jax_filters._portion(column, (upper, lower))[:, 0].tolist()
            assert seen == [int(Fraction(share) * total) for total in totals]


# The engine -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> Iterator[JaxEngine]:
    engine = make(extra=DEVICE, **SMALL)
    assert engine._drawer is not None
    yield engine
    engine.close()


def test_a_step_with_all_kinds_of_rows_draws_as_the_host_does(
    made: JaxEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = make(**SMALL)
    asked = [
        SamplingParams(temperature=0.8, seed=3),
        SamplingParams(prompt_logprobs=True),
        SamplingParams(temperature=1.0, frequency_penalty=1.0, seed=5),
        SamplingParams(temperature=1.0, top_p=0.9, logprobs=True, top_logprobs=3, seed=6),
    ]
    brought = []
    draw = made._sampler.draw

    def watched(logits: np.ndarray, rows: list[Row]) -> object:  # type: ignore[type-arg]
        brought.append(len(logits))
        return draw(logits, rows)

    monkeypatch.setattr(made._sampler, "draw", watched)
    admits = [admit(n, PROMPTS[n], one) for n, one in enumerate(asked)]
    first = Plan(admits=admits, work=[(n, len(PROMPTS[n])) for n in (2, 0, 3, 1)])
    plans = [first, *[Plan(work=[(n, 1) for n in (3, 1, 2, 0)])] * 20]
    made.reset()
    try:
        for plan in plans:
            seen, expected = made.step(plan), host.step(plan)
            assert (seen.sequences, seen.tokens) == (expected.sequences, expected.tokens)
            assert seen.prompt_logprobs.keys() == expected.prompt_logprobs.keys()
            told, wanted = seen.logprobs[3], expected.logprobs[3]
            assert told.logprob == pytest.approx(wanted.logprob, abs=1e-4)
            assert list(told.top_tokens) == list(wanted.top_tokens)
    finally:
        host.close()
    assert brought == [1] * 21, "the row with a penalty comes to the host, and no other"


def test_a_cpu_draws_on_the_host_unless_told_otherwise(made: JaxEngine) -> None:
    engine = make(sequences_max=1, step_tokens_max=32)
    assert engine._drawer is None
    assert engine.describe().warnings == made.describe().warnings == ()
    engine.close()
    with pytest.raises(ModelError, match="sample=moon is not one of host, device"):
        make(extra=(("sample", "moon"),))


def broken(*_given: object) -> None:
    raise RuntimeError("no such sum on this device\nand a long story")


def dependent(masses: jax.Array, _wanted: object) -> jax.Array:
    return (jnp.arange(len(masses), dtype=jnp.int32) % masses.shape[1])[:, None]


def unfiltered(_top_p: float) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("place", "name", "fault", "reason"),
    [
        (jax_filters, "_largest", broken, "it failed: no such sum on this device"),
        (jax_sampling.DeviceSampler, "_launch", broken, "it failed: no such sum on this device"),
        (jax_filters, "_first_beyond", dependent, "the order of the rows changes what they get"),
        (jax_sampling, "spare_share", unfiltered, "it draws other tokens at temperature"),
        (jax_sampling, "_UPPER", 3, "its log probabilities are others"),
        (jax_sampling, "NOT_FINITE", "fine", "it does not tell the same rows that are no"),
    ],
    ids=["does not compile", "fails", "depends", "differs", "misjudges", "overlooks"],
)
def test_a_device_that_draws_otherwise_is_not_used(
    monkeypatch: pytest.MonkeyPatch, place: object, name: str, fault: object, reason: str
) -> None:
    monkeypatch.setattr(place, name, fault)
    engine = make(extra=DEVICE, **SMALL)
    assert engine._drawer is None
    (warning,) = engine.describe().warnings
    assert warning.startswith(f"tokens are drawn on the host, not on cpu: {reason}")
    assert "\n" not in warning
    plan = Plan(admits=[admit(1, PROMPTS[0], SamplingParams(temperature=1.0))], work=[(1, 31)])
    assert len(engine.step(plan).tokens) == 1
    engine.close()


def test_one_rank_that_cannot_draw_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ranks must draw the same tokens."""
    given: dict[str, int] = {}

    def least(_self: Group, what: str, value: int) -> int:
        given[what] = value
        return 0 if what == "sample" else value

    monkeypatch.setattr(Group, "least", least)
    engine = make(extra=DEVICE, **SMALL)
    assert given["sample"] == 1, "this rank could"
    assert engine._drawer is None
    assert "another rank's device" in engine.describe().warnings[0]
    engine.close()
