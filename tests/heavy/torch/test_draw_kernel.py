"""Rows that a kernel draws: what is uploaded for it, and what is told beside its tokens.

The kernel itself needs a GPU (``tests/heavy/gpu``), or Triton's interpreter: with Triton installed,
``TRITON_INTERPRET=1`` has these tests run it. Without, operations of torch stand in for it.
"""

import os

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shards.engines import torch_choices, torch_filters, torch_sampling, torch_trial
from shards.engines.base import Plan, SamplingParams
from shards.engines.torch_engine import TorchEngine
from shards.engines.torch_rows import AT, CHANCE, COLUMNS, TEMPERATURE, Packer, uniforms
from shards.sampling import splitmix64, uniform
from tests.engines.driving import admit
from tests.heavy.drawing import BORDERS, KINDS, Row, random_logits, random_rows
from tests.heavy.models import tiny_llama_folder
from tests.heavy.torch.drawing import Both, Kernel, by_filters
from tests.heavy.torch.made import make

VOCAB = 2000
PROMPT = [(13 * k) % 250 for k in range(31)]
WARM = SamplingParams(temperature=0.9, seed=3)
NUCLEUS = SamplingParams(temperature=0.9, top_p=0.8, seed=4)
ASKED = {**KINDS, **BORDERS}
WORDS = st.integers(0, (1 << 64) - 1)


def weigh(logits: torch.Tensor, peak: torch.Tensor, warmth: torch.Tensor | None = None) -> object:
    """With the exponentials that the interpreter has."""
    weights = (logits - peak).numpy()
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.exp(weights if warmth is None else weights / warmth.numpy()))


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return by_filters(VOCAB)
    from shards.engines.torch_draw_kernel import DrawKernel

    monkeypatch.setattr(torch_filters, "weigh", weigh)
    monkeypatch.setattr(torch_sampling, "weigh", weigh)
    return DrawKernel(VOCAB)


@pytest.mark.parametrize("step", [0.0, 0.125, 1.0])
def test_a_kernel_changes_nothing_but_the_way(kernel: Kernel, step: float) -> None:
    """Rows of all kinds in a step, some of which only the host draws, and one is not finite."""
    random = np.random.default_rng(1)
    plain, fast = Both(VOCAB, 64), Both(VOCAB, 64, kernel=kernel)
    asked = [*ASKED.values(), {"temperature": 1.0, "presence_penalty": 1.0}]
    rows = [row for one in asked for row in random_rows(random, 2, **one)]
    logits = random_logits(random, len(rows), VOCAB, 2.0, step)
    logits[5, 3] = np.nan
    expected = plain.draw(logits, rows)
    assert list(expected.failures) == [5]
    assert fast.draw(logits, rows) == expected


def test_one_upload_for_all_kinds(kernel: Kernel) -> None:
    random, both = np.random.default_rng(2), Both(VOCAB, kernel=kernel)
    rows = [row for asked in KINDS.values() for row in random_rows(random, 2, **asked)]
    logits = torch.from_numpy(random_logits(random, len(rows), VOCAB, 2.0))
    drawing = both.here.begin(logits, rows)
    assert both.uploads == 1
    assert drawing.sure
    tokens = drawing.tokens.tolist()
    logits.zero_()  # as the next step's may take their place
    drawn = drawing.take()
    assert (drawn.tokens, both.uploads) == (tokens, 1)
    told = [index for index, row in enumerate(rows) if row.sampling.logprobs]
    assert sorted(drawn.logprobs) == told


def test_equals_beyond_those_at_hand_are_told_without_the_logits(kernel: Kernel) -> None:
    """All tokens are sorted then, of a copy."""
    both, random = Both(VOCAB, 64, kernel=kernel), np.random.default_rng(3)
    rows = random_rows(random, 5, temperature=1.0, logprobs=True, top_logprobs=3)
    logits = torch.ones(5, VOCAB)
    drawing = both.here.begin(logits, rows)
    logits.uniform_()
    drawn = drawing.take()
    assert drawing.sure
    assert [list(drawn.logprobs[index].top_tokens) for index in range(5)] == [[0, 1, 2]] * 5


def test_a_step_with_rows_of_the_host_is_not_sure(kernel: Kernel) -> None:
    random, both = np.random.default_rng(4), Both(VOCAB, kernel=kernel)
    rows = random_rows(random, 1, temperature=1.0) + random_rows(random, 1, repetition_penalty=1.2)
    drawing = both.here.begin(torch.from_numpy(random_logits(random, 2, VOCAB, 2.0)), rows)
    assert not drawing.sure
    assert len(drawing.take().tokens) == 2
    assert both.brought == [1]


def test_the_trial_covers_the_kernel(kernel: Kernel) -> None:
    def other(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = kernel(logits, rows)
        return torch.stack(((found[:, 0] + 1) % VOCAB, found[:, 1]), dim=1)

    here = torch.device("cpu")
    for drawn_by, fault in ((kernel, ""), (other, "it draws other tokens at temperature")):
        both = Both(VOCAB, kernel=drawn_by)
        seen = torch_trial.trouble(both.here, both.host, VOCAB, here, torch.float32)
        assert seen.startswith(fault)
        assert bool(seen) == bool(fault)


# The engine --------------------------------------------------------------------------------------


def start(monkeypatch: pytest.MonkeyPatch, kernel: object) -> TorchEngine:
    monkeypatch.setattr(torch_choices, "choose_draw_kernel", lambda _device, _vocab_size: kernel)
    engine = make(tiny_llama_folder(), extra={"sample": "device"})
    assert isinstance(engine, TorchEngine)
    return engine


def test_an_engine_draws_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = start(monkeypatch, None)
    used, within = [], by_filters(plain.describe().vocab_size)

    def counted(logits: torch.Tensor, rows: torch.Tensor) -> object:
        used.append(len(rows))
        return within(logits, rows)

    fast = start(monkeypatch, counted)
    assert fast.describe().warnings == ()
    used.clear()
    asked = [WARM, NUCLEUS, SamplingParams(temperature=1.0, presence_penalty=1.0)]
    admits = [admit(n, PROMPT, one) for n, one in enumerate(asked)]
    plans = [
        Plan(admits=admits, work=[(n, len(PROMPT)) for n in range(3)]),
        *[Plan(work=[(n, 1) for n in range(3)])] * 12,
    ]
    for plan in plans:
        assert fast.step(plan).tokens == plain.step(plan).tokens
    assert used == [2] * len(plans)
    fast.close()
    plain.close()


def broken(*_given: object) -> object:
    raise RuntimeError("its kernel does not compile: no such device\nand a long story")


def test_a_kernel_that_fails_leaves_the_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(monkeypatch, broken)
    (warning,) = engine.describe().warnings
    assert warning.startswith("tokens are drawn by torch's operations: it failed: its kernel does")
    assert "\n" not in warning
    plan = Plan(admits=[admit(1, PROMPT, NUCLEUS)], work=[(1, len(PROMPT))])
    assert engine._drawer is not None
    assert len(engine.step(plan).tokens) == 1
    engine.close()


# What is uploaded --------------------------------------------------------------------------------


@given(st.lists(st.tuples(WORDS, st.integers(0, 1 << 40)), min_size=1, max_size=20))
def test_uniform_numbers_are_the_hosts(asked: list[tuple[int, int]]) -> None:
    mixed = np.array([splitmix64(seed) for seed, _ in asked], np.uint64)
    positions = np.array([position for _, position in asked], np.uint64)
    seen = (uniforms(mixed, positions) * 2.0**-53).tolist()
    assert seen == [uniform(seed, position) for seed, position in asked]


def test_seeds_of_any_sign_are_the_hosts() -> None:
    rows = [Row(SamplingParams(seed=seed), range(7)) for seed in (-1, 0, 5, (1 << 64) - 1, 1 << 70)]
    packed = Packer(VOCAB).pack(rows, range(5))
    chances = (packed[:, CHANCE] << 31) + packed[:, CHANCE + 1]
    expected = [uniform(row.sampling.seed, 7) for row in rows]
    assert (chances * 2.0**-53).tolist() == expected


def test_what_is_kept_of_rows_is_bounded_and_never_mistaken() -> None:
    """Also where more rows than are kept come at once, and others take their identities."""
    packer = Packer(VOCAB)
    for count in (3, 900, 900, 5000, 3):
        warmths = [1.0 + at / 8 for at in range(count)]
        rows = [Row(SamplingParams(temperature=one), range(at)) for at, one in enumerate(warmths)]
        order = list(range(count))[::-1]
        for _again in range(2):
            packed = packer.pack(rows, order)
            assert packed.shape == (count, COLUMNS)
            assert packed[:, AT].tolist() == order
            seen = packed[:, TEMPERATURE].astype(np.int32).view(np.float32)
            assert seen.tolist() == warmths[::-1]
        assert len(packer._places) <= 5000
