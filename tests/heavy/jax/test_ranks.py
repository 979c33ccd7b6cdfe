"""Tensor parallelism in real processes: equal digests, the tokens of one rank, and losses."""

import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest

from shards.engines.jax_native import processor_multiplies
from shards.v1 import shard_pb2 as pb
from tests.heavy import reference
from tests.heavy.models import TINY_VOCAB, smollm2_folder, tiny_llama_folder
from tests.heavy.torch.constrained import BROKEN, Interrupted, two_ranks_keep_to_constraints
from tests.heavy.torch.group import Group, group, seconds_until

# Every rank but the first compiles each shape at each start: no more of them than a test needs.
SIZES = ("--kv-tokens", "1024", "--sequences-max", "8", "--step-tokens-max", "128")
SMALL = (*SIZES, "--step-tokens-max", "64")
# For groups that compute a few tokens of one sequence.
LEAST = (*SIZES, "--sequences-max", "4", "--step-tokens-max", "32")
# Where accelerators draw.
DRAWING = ("--engine-option", "argmax=device", "--engine-option", "sample=device")
# From the death of a rank until no process of its group is left.
GONE_S = 5.0


@contextmanager
def ranks(folder: Path, model: Path, world: int, sizes: tuple[str, ...] = SIZES) -> Iterator[Group]:
    """Workers with this engine; each step asserts that all ranks tell the same digest."""
    device = ("--engine", "jax", "--device", "cpu", "--dtype", "float32")
    with group(folder, model, world, *device, *sizes) as made:
        yield made


def prompts() -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(3, 250, 12 + 9 * n).tolist() for n in range(6)]


def first_plan(number: int, *tokens: int) -> dict[str, object]:
    return {
        "admits": [pb.Admit(sequence=number, tokens=tokens, prompt_len=len(tokens))],
        "work_sequences": [number],
        "work_tokens": [len(tokens)],
    }


@pytest.fixture(scope="module")
def two_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], Group]]:
    """Two ranks of a model, which tests share: started when first asked for, empty between tests.

    They draw as accelerators do. No test may stop one of them; who does starts a group of its own.
    """
    started: dict[Path, Group] = {}
    with ExitStack() as stack:

        def two(model: Path) -> Group:
            if model not in started:
                folder = tmp_path_factory.mktemp("two")
                started[model] = stack.enter_context(ranks(folder, model, 2, (*SIZES, *DRAWING)))
            return started[model]

        yield two


@pytest.fixture(scope="class", params=[TINY_VOCAB, TINY_VOCAB + 1], ids=["even", "uneven"])
def model(request: pytest.FixtureRequest) -> Path:
    """Also with a vocabulary that cannot be cut evenly."""
    return tiny_llama_folder(vocab_size=request.param)


@pytest.fixture(scope="class")
def pair(
    model: Path, two_of: Callable[[Path], Group], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Group, Group]]:
    """One rank, and two ranks of the same model."""
    with ranks(tmp_path_factory.mktemp("one"), model, 1) as one:
        yield one, two_of(model)


class TestTwoRanks:
    def test_they_draw_what_one_draws(self, pair: tuple[Group, Group]) -> None:
        one, two = pair
        assert [rank.info.rank for rank in two.ranks] == [0, 1]
        assert two.ranks[1].info.weight_bytes < 0.6 * one.ranks[0].info.weight_bytes
        alone, together = (made.generate(prompts(), 24) for made in pair)
        assert together == alone
        for made in pair:
            made.step(drops=range(1, 7))

    def test_they_keep_to_constraints(self, model: Path, pair: tuple[Group, Group]) -> None:
        two_ranks_keep_to_constraints(model, *pair)


@pytest.mark.skipif(not processor_multiplies(), reason="there are no kernels for this processor")
def test_two_ranks_compute_by_kernels(tmp_path: Path) -> None:
    """Each by its own part of the packed weights; sums of bfloat16 may exchange near ties."""
    model = tiny_llama_folder(head_dim=64)
    sizes = (*SMALL, "--dtype", "bfloat16", "--engine-option", "native=on")
    found = []
    for world in (1, 2):
        with ranks(tmp_path / str(world), model, world, sizes) as made:
            found.append(made.generate(prompts(), 8))
            assert not any(rank.info.warnings for rank in made.ranks)
    same = [alone == together for alone, together in zip(*found, strict=True)]
    assert sum(same) >= 4


def test_three_ranks_answer_for_smollm2(tmp_path: Path) -> None:
    """Nine heads, three KV heads; the head is cut from the embedding that it is tied to."""
    entries = [entry for n, entry in enumerate(reference.read(), start=1) if n % 3][:4]
    asked = [entry["prompt"] for entry in entries]
    # Every third sequence of ``generate`` is sampled: it is asked once more, and left out.
    asked.insert(2, asked[0])
    with ranks(tmp_path / "three", smollm2_folder(), 3, SMALL) as three:
        found = three.generate(asked, 16)
    del found[2]
    assert sum(map(reference.agreed, found, entries)) > 48


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_takes_the_group_down_and_a_new_one_goes_on(
    tmp_path: Path, victim: int
) -> None:
    model = tiny_llama_folder()
    constrained = Interrupted(model)
    with ranks(tmp_path / "first", model, 2, SMALL) as made:
        before = made.generate(prompts()[:2], 6)
        constrained.begin(made)
        made.ranks[victim].process.send_signal(signal.SIGKILL)
        made.send(work_sequences=[1, 2, BROKEN], work_tokens=[1, 1, 1])
        survivor = made.ranks[1 - victim].process
        assert seconds_until(lambda: survivor.poll() is not None, GONE_S) < GONE_S
        # JAX's own service is in rank 0, and aborts the others when it notices the loss before us.
        assert survivor.returncode in ((3, -signal.SIGABRT) if victim == 0 else (3,))
    with ranks(tmp_path / "second", model, 2) as made:
        assert made.generate(prompts()[:2], 6) == before
        constrained.go_on(made)


def test_an_idle_group_notices_too(tmp_path: Path) -> None:
    with ranks(tmp_path / "group", tiny_llama_folder(), 2, LEAST) as made:
        made.ranks[1].process.send_signal(signal.SIGKILL)
        survivor = made.ranks[0].process
        assert seconds_until(lambda: survivor.poll() is not None, GONE_S) < GONE_S


def test_a_group_leaves_in_order(tmp_path: Path) -> None:
    """All are told to leave, and the router closes their streams: none takes that for a loss."""
    with ranks(tmp_path / "group", tiny_llama_folder(), 2, LEAST) as made:
        made.step(**first_plan(1, 5, 6, 7))
        for rank in made.ranks:
            rank.process.send_signal(signal.SIGTERM)
        assert all(outcome.leaving for outcome in made.hear())
        for rank in made.ranks:
            rank.plans.put(None)
        for rank in made.ranks:
            assert rank.process.wait(20) == 0


def test_a_rank_that_hears_another_log_is_caught(tmp_path: Path) -> None:
    with ranks(tmp_path / "group", tiny_llama_folder(), 2, LEAST) as made:
        made.step(**first_plan(1, 5, 6, 7))
        made.send(to=[0], **first_plan(2, 9, 10, 11))
        made.send(to=[1], **first_plan(2, 9, 10, 12))
        zero, one = made.hear()
        assert zero.digest != one.digest
