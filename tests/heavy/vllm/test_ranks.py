"""Tensor parallelism in real processes: two ranks, two groups on one host, and the loss of one."""

import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import grpc
import numpy as np
import pytest

from shards.engines import load
from shards.engines.base import EngineOptions, Plan, SamplingParams
from shards.engines.vllm_segments import SHARED_MEMORY
from shards.v1 import shard_pb2 as pb
from shards.v1 import shard_pb2_grpc
from tests.engines.driving import admit
from tests.heavy.models import tiny_llama_folder
from tests.heavy.vllm.worker_processes import Group, Rank, group

# vLLM, PyTorch and transformers warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

NEW = 24
SAMPLED = SamplingParams(temperature=0.8, top_k=40, seed=11, repetition_penalty=1.1)


def prompts() -> list[list[int]]:
    draw = np.random.default_rng(3).integers
    return [draw(0, 256, 20 + 7 * n).tolist() for n in range(4)]


def plans() -> list[pb.Plan]:
    """Four sequences that come one after the other, half of them sampled, one in two chunks."""
    log = []
    for step in range(NEW + 4):
        work = {n + 1: 1 for n in range(4) if n < step}
        admits = []
        if step < 4:
            tokens = prompts()[step]
            sampling = pb.Sampling(temperature=0.8, top_k=40, seed=11, repetition_penalty=1.1)
            admits = [
                pb.Admit(
                    sequence=step + 1,
                    tokens=tokens,
                    prompt_len=len(tokens),
                    sampling=sampling if step % 2 else pb.Sampling(),
                )
            ]
            work[step + 1] = len(tokens) if step != 2 else 10
        if step == 3:
            work[3] = len(prompts()[2]) - 10
        log.append(
            pb.Plan(
                epoch=1,
                plan_id=step + 1,
                admits=admits,
                work_sequences=list(work),
                work_tokens=list(work.values()),
            )
        )
    return log


def drawn(outcomes: list[pb.Outcome]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for outcome in outcomes:
        for sequence, token in zip(outcome.sequences, outcome.tokens, strict=True):
            found.setdefault(sequence, []).append(token)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[int, list[int]]:
    """What one rank that has everything draws."""
    options = EngineOptions(
        tiny_llama_folder(),
        "tiny",
        kv_tokens=1024,
        sequences_max=8,
        step_tokens_max=128,
        threads=1,
        dtype="float32",
        extra=(("eager", "1"),),
    )
    engine = load("vllm", options, lambda _fraction: None)
    found = {}
    for n, tokens in enumerate(prompts(), start=1):
        made = admit(n, tokens, SamplingParams() if n % 2 else SAMPLED)
        found[n] = engine.step(Plan(admits=[made], work=[(n, len(tokens))])).tokens
        for _ in range(NEW - 1):
            found[n] += engine.step(Plan(work=[(n, 1)])).tokens
    engine.close()
    return found


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Group, Group]]:
    """Two groups of two ranks, side by side."""
    folder = tmp_path_factory.mktemp("groups")
    with (
        group(folder, "a", tiny_llama_folder(), 2) as one,
        group(folder, "b", tiny_llama_folder(), 2) as other,
    ):
        yield one, other


def check(told: list[list[pb.Outcome]], alone: dict[int, list[int]]) -> None:
    first, second = told
    assert len(first) == len(plans())
    assert [one.digest for one in first] == [one.digest for one in second]
    for sequence, tokens in drawn(first).items():
        assert tokens[:NEW] == alone[sequence][: len(tokens)]


def test_two_groups_with_two_ranks_each_draw_what_one_rank_draws(
    groups: tuple[Group, Group], alone: dict[int, list[int]]
) -> None:
    for one in groups:
        with grpc.insecure_channel(one.ranks[1].address) as channel:
            info = shard_pb2_grpc.ShardStub(channel).Describe(pb.DescribeRequest(), timeout=10)
        assert (info.rank, info.world) == (1, 2)
        check(one.run(plans()), alone)


def segments() -> list[str]:
    """Names of shared memory on this host that groups of vLLM's CPU ranks made."""
    return [path.name for path in SHARED_MEMORY.iterdir() if "-cpushm" in path.name]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_rank_ends_its_group_and_the_next_one_comes_up(
    tmp_path: Path, alone: dict[int, list[int]], victim: int
) -> None:
    with group(tmp_path, "a", tiny_llama_folder(), 2) as one:
        first = plans()[0]
        outcomes = one.run([first])
        assert [len(told) for told in outcomes] == [1, 1]
        survivor = one.ranks[1 - victim]
        one.ranks[victim].process.send_signal(signal.SIGKILL)
        # A step that waits for the dead rank, if the survivor takes it on in time.
        _send(survivor, first)
        assert survivor.process.wait(5.0) == 3
        assert any(f"rank {victim} is gone" in line for line in survivor.heard())
    with group(tmp_path, "b", tiny_llama_folder(), 2) as again:
        check(again.run(plans()), alone)
        # What the killed ranks left was removed; what is there belongs to those that live.
        assert len({name.partition("-")[0] for name in segments()}) <= 1


def _send(rank: Rank, plan: pb.Plan) -> None:
    with grpc.insecure_channel(rank.address) as channel:
        answers = shard_pb2_grpc.ShardStub(channel).Run(iter([plan]), timeout=5.0)
        with suppress(grpc.RpcError):
            next(answers)
