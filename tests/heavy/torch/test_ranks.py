"""Tensor parallelism in real processes: equal digests, the tokens of one rank, and losses."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import pytest
import torch

from shards.engines import load
from shards.engines.base import Admit, EngineOptions, ModelError, Plan, SamplingParams
from shards.engines.torch_devices import Device
from shards.engines.torch_ranks import Ranks, load_slice
from shards.engines.torch_weights import Checkpoint, count_bytes
from shards.v1 import shard_pb2 as pb
from tests.heavy.models import smollm2_folder, tiny_llama_folder
from tests.heavy.torch.constrained import BROKEN, Interrupted, two_ranks_keep_to_constraints
from tests.heavy.torch.group import Group, group, seconds_until
from tests.heavy.torch.made import make

SIZES = ("--kv-tokens", "1024", "--sequences-max", "8", "--step-tokens-max", "256")
# A machine that tests run on may be so busy that a rank is seconds behind.
PATIENT = (*SIZES, "--engine-option", "peer_timeout_s=40")
# From the death of a rank until no process of its group is left.
GONE_S = 5.0


def prompts(vocabulary: int, count: int) -> list[list[int]]:
    random = np.random.default_rng(5)
    return [random.integers(3, vocabulary, 12 + 9 * n).tolist() for n in range(count)]


@pytest.fixture(scope="class")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Group, Group]]:
    """One rank, and two ranks of the same model, which draw as accelerators do."""
    folder, model = tmp_path_factory.mktemp("pair"), tiny_llama_folder()
    drawing = ("--engine-option", "sample=device")
    with (
        group(folder / "one", model, 1, *SIZES) as one,
        group(folder / "two", model, 2, *PATIENT, *drawing) as two,
    ):
        yield one, two


class TestTwoRanks:
    def test_they_draw_what_one_draws(self, pair: tuple[Group, Group]) -> None:
        one, two = pair
        assert [rank.info.rank for rank in two.ranks] == [0, 1]
        assert two.ranks[0].info.weight_bytes < one.ranks[0].info.weight_bytes
        alone, together = (made.generate(prompts(250, 6), 24) for made in pair)
        assert together == alone
        for made in pair:
            made.step(drops=range(1, 7))

    def test_they_keep_to_constraints(self, pair: tuple[Group, Group]) -> None:
        two_ranks_keep_to_constraints(tiny_llama_folder(), *pair)


def test_three_ranks_hold_a_third_of_smollm2(tmp_path: Path) -> None:
    """Nine heads and three KV heads; the head is cut from the embedding that it is tied to."""
    model, asked = smollm2_folder(), prompts(49000, 3)
    with group(tmp_path / "three", model, 3, "--dtype", "float32", *PATIENT) as three:
        together = three.generate(asked, 12)
    engine = make(model, dtype="float32")
    margins = margins_along(engine, asked, together)
    engine.close()
    for tokens, row in zip(together, margins, strict=True):
        assert len(row) == len(tokens)
        assert max(row) < 1e-3, "a token that is not the likeliest by more than rounding"


def margins_along(engine, asked: list[list[int]], answers: list[list[int]]) -> list[list[float]]:
    """How far below the likeliest each answered token is, for one rank that reads them all."""
    found = []
    for number, (prompt, tokens) in enumerate(zip(asked, answers, strict=True), start=1):
        row = []
        if number % 3 == 0:  # seeded, and so not the likeliest
            found.append([0.0] * len(tokens))
            continue
        for length in range(len(tokens)):
            known = [*prompt, *tokens[:length]]
            sampling = SamplingParams(logprobs=True, top_logprobs=200)
            outcome = engine.step(
                Plan(admits=[Admit(1, known, len(known), sampling)], work=[(1, len(known))])
            )
            engine.reset()
            told = outcome.logprobs[1]
            by_token = dict(zip(told.top_tokens, told.top_values, strict=True))
            row.append(told.top_values[0] - by_token[tokens[length]])
        found.append(row)
    return found


def first_plan(number: int, *tokens: int) -> dict[str, object]:
    return {
        "admits": [pb.Admit(sequence=number, tokens=tokens, prompt_len=len(tokens))],
        "work_sequences": [number],
        "work_tokens": [len(tokens)],
    }


def test_a_killed_rank_takes_the_group_down_and_a_new_one_goes_on(tmp_path: Path) -> None:
    model, asked = tiny_llama_folder(), prompts(250, 2)
    constrained = Interrupted(model)
    with group(tmp_path / "first", model, 2, *PATIENT) as made:
        before = made.generate(asked, 6)
        constrained.begin(made)
        made.ranks[1].process.send_signal(signal.SIGKILL)
        made.send(work_sequences=[1, 2, BROKEN], work_tokens=[1, 1, 1])
        survivor = made.ranks[0]
        took = seconds_until(lambda: survivor.process.poll() is not None, GONE_S)
        assert took < GONE_S
        assert survivor.process.returncode == 3
        with pytest.raises(grpc.RpcError) as caught:
            next(survivor.outcomes)
        assert caught.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE)
        assert "rank 0 of 2" in survivor.error()
    with group(tmp_path / "second", model, 2, *PATIENT) as made:
        assert made.generate(asked, 6) == before
        constrained.go_on(made)


def test_an_idle_group_ends_with_its_first_loss(tmp_path: Path) -> None:
    with group(tmp_path / "group", tiny_llama_folder(), 2, *PATIENT) as made:
        made.step(**first_plan(1, 5, 6, 7))
        made.ranks[0].process.send_signal(signal.SIGKILL)
        survivor = made.ranks[1].process
        assert seconds_until(lambda: survivor.poll() is not None, GONE_S) < GONE_S
        assert survivor.returncode == 3


def test_a_stopped_rank_is_given_up(tmp_path: Path) -> None:
    """A peer that neither answers nor closes its connections is found by the time limit."""
    limit = ("--engine-option", "peer_timeout_s=4")
    with group(tmp_path / "group", tiny_llama_folder(), 2, *SIZES, *limit) as made:
        made.step(**first_plan(1, 5, 6, 7))
        made.ranks[1].process.send_signal(signal.SIGSTOP)
        made.send(work_sequences=[1], work_tokens=[1])
        survivor = made.ranks[0]
        assert seconds_until(lambda: survivor.process.poll() is not None, 4.0 + GONE_S) > 3.0
        assert "another rank" in survivor.error()
        made.ranks[1].process.kill()


def send_apart(made: Group, zero: dict[str, object], one: dict[str, object]) -> None:
    made.send(to=[0], **zero)
    made.send(to=[1], **one)


def test_a_rank_that_hears_another_log_is_caught(tmp_path: Path) -> None:
    with group(tmp_path / "group", tiny_llama_folder(), 2, *PATIENT) as made:
        made.step(**first_plan(1, 5, 6, 7))
        send_apart(made, first_plan(2, 9, 10, 11), first_plan(2, 9, 10, 12))
        zero, one = made.hear()
        assert zero.digest != one.digest


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_own_part_of_the_weights_alone(
    rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each tensor of a safetensors file: a model need not fit into the memory of one rank."""
    ranks = object.__new__(Ranks)  # nobody is met
    ranks.rank, ranks.world = rank, 2
    read: list[int] = []

    class Part:
        def __init__(self, part: Any) -> None:
            self.get_shape, self._part = part.get_shape, part

        def __getitem__(self, index: Any) -> torch.Tensor:
            found = self._part[index]
            read.append(found.numel() * found.element_size())
            return found

    opened = Checkpoint.opened

    @contextmanager
    def watched(self: Checkpoint, part: Path) -> Iterator[Any]:
        with opened(self, part) as file:
            yield SimpleNamespace(keys=file.keys, get_slice=lambda name: Part(file.get_slice(name)))

    monkeypatch.setattr(Checkpoint, "opened", watched)
    checkpoint, cpu = Checkpoint(tiny_llama_folder()), Device(torch.device("cpu"), "cpu")
    model = load_slice(checkpoint, torch.float32, cpu, ranks, lambda _fraction: None)
    assert sum(read) == count_bytes(model)
    assert sum(read) < 0.6 * (tiny_llama_folder() / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rendezvous": ""}, "needs --rendezvous"),
        (
            {"rendezvous": "127.0.0.1:1", "world": 3},
            "cannot be split evenly over 3 ranks; --num-shard can be 1, 2$",
        ),
    ],
)
def test_what_cannot_be_split_is_refused(options: dict[str, object], reason: str) -> None:
    asked = EngineOptions(
        **{"model": tiny_llama_folder(), "model_id": "m", "rank": 0, "world": 2, **options}
    )
    with pytest.raises(ModelError, match=reason) as caught:
        load("torch", asked, lambda _fraction: None)
    assert "\n" not in str(caught.value)
