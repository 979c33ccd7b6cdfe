"""Tensor parallelism in real processes: two ranks, two groups on one host, and the loss of one."""

import re
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch

from shards.engines import load
from shards.engines.base import EngineOptions, Plan, SamplingParams
from shards.engines.vllm_segments import SHARED_MEMORY
from shards.v1 import shard_pb2 as pb
from shards.v1 import shard_pb2_grpc
from shards.wire import plan_from_wire
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


def alone_options() -> EngineOptions:
    """Of one rank that has everything."""
    return EngineOptions(
        tiny_llama_folder(),
        "tiny",
        kv_tokens=1024,
        sequences_max=8,
        step_tokens_max=128,
        threads=1,
        dtype="float32",
        extra=(("eager", "1"),),
    )


@pytest.fixture(scope="module")
def alone() -> dict[int, list[int]]:
    """What one rank that has everything draws."""
    engine = load("vllm", alone_options(), lambda _fraction: None)
    found = {}
    for n, tokens in enumerate(prompts(), start=1):
        made = admit(n, tokens, SamplingParams() if n % 2 else SAMPLED)
        found[n] = engine.step(Plan(admits=[made], work=[(n, len(tokens))])).tokens
        for _ in range(NEW - 1):
            found[n] += engine.step(Plan(work=[(n, 1)])).tokens
    engine.close()
    return found


def check(told: list[list[pb.Outcome]], alone: dict[int, list[int]]) -> None:
    first, second = told
    assert len(first) == len(plans())
    assert [one.digest for one in first] == [one.digest for one in second]
    for sequence, tokens in drawn(first).items():
        assert tokens[:NEW] == alone[sequence][: len(tokens)]


OWN_SAMPLER = ("sampler", "vllm")
# One for each sequence of the plans; the last but one is the host's in the same batch.
OWN = [
    pb.Sampling(temperature=0.9, top_p=0.9, seed=3, logprobs=True, top_logprobs=2),
    pb.Sampling(temperature=0.8, top_k=40, seed=11, repetition_penalty=1.1),
    pb.Sampling(temperature=1.0, typical_p=0.9, seed=4),
    pb.Sampling(temperature=1.3, seed=5, constraint=pb.Constraint(regex="[a-z]{90}")),
]


def test_ranks_draw_alike_by_vllms_own_sampler(tmp_path: Path) -> None:
    """As one rank that has everything, which hears the same log."""
    log = plans()
    for number, sampling in enumerate(OWN):
        log[number].admits[0].sampling.CopyFrom(sampling)
    options = replace(alone_options(), extra=(("eager", "1"), OWN_SAMPLER))
    engine = load("vllm", options, lambda _fraction: None)
    expected = [engine.step(plan_from_wire(plan)) for plan in log]
    engine.close()
    assert not any(one.failures for one in expected)
    with group(
        tmp_path, "own", tiny_llama_folder(), 2, ["--engine-option", "=".join(OWN_SAMPLER)]
    ) as ranks:
        first, second = ranks.run(log)
    assert [one.digest for one in first] == [one.digest for one in second]
    assert [list(one.tokens) for one in first] == [one.tokens for one in expected]
    assert len(first) == len(log)
    assert [len(one.logprobs) for one in first] == [len(one.logprobs) for one in expected]


def test_groups_side_by_side_and_what_becomes_of_them(
    tmp_path: Path, alone: dict[int, list[int]]
) -> None:
    """One story, because starting ranks takes long: two groups of two, losses, and a new group."""
    with (
        group(tmp_path, "a", tiny_llama_folder(), 2) as one,
        group(tmp_path, "b", tiny_llama_folder(), 2) as other,
    ):
        for ranks in (one, other):
            assert [describe(rank).rank for rank in ranks.ranks] == [0, 1]
            assert {describe(rank).world for rank in ranks.ranks} == {2}
            check(ranks.run(plans()), alone)
        dead = ports(one) | ports(other)
        # Where vLLM has it, they reduce through shared memory, each group through its own.
        assert len(dead) == (2 if hasattr(torch.ops._C, "init_shm_manager") else 0)
        lose(one, 0)
        # The other group has not noticed.
        check(other.run(plans()), alone)
        lose(other, 1)
    with group(tmp_path, "c", tiny_llama_folder(), 2) as again:
        check(again.run(plans()), alone)
        # What the killed ranks left was removed; what is there belongs to those that live.
        assert not dead & ports(again)
        assert not dead & {name.partition("-")[0] for name in segments()}
        a_different_log_is_caught(again)


def lose(ranks: Group, victim: int) -> None:
    """Kills one rank: the other ends within 5 s and says why, even inside a step."""
    survivor = ranks.ranks[1 - victim]
    ranks.ranks[victim].process.send_signal(signal.SIGKILL)
    _send(survivor, plans()[0])
    assert survivor.process.wait(5.0) == 3
    assert any(f"rank {victim} is gone" in line for line in survivor.heard())


def a_different_log_is_caught(ranks: Group) -> None:
    log, other = plans(), plans()
    other[0].admits[0].tokens[-1] ^= 1
    first, second = ranks.run(log, other)
    assert first[0].digest != second[0].digest


def ports(ranks: Group) -> set[str]:
    """After which ports the shared memory is named through which the ranks of a group reduce."""
    maps = [Path(f"/proc/{rank.process.pid}/maps").read_text() for rank in ranks.ranks]
    first, *others = [set(re.findall(rf"{SHARED_MEMORY}/(\d+)-tp\S*-cpushm", one)) for one in maps]
    assert all(other == first for other in others)
    return first


def segments() -> list[str]:
    """Names of shared memory on this host that groups of vLLM's CPU ranks made."""
    return [path.name for path in SHARED_MEMORY.iterdir() if "-cpushm" in path.name]


def describe(rank: Rank) -> pb.DescribeResponse:
    with grpc.insecure_channel(rank.address) as channel:
        return shard_pb2_grpc.ShardStub(channel).Describe(pb.DescribeRequest(), timeout=10)


def _send(rank: Rank, plan: pb.Plan) -> None:
    with grpc.insecure_channel(rank.address) as channel:
        answers = shard_pb2_grpc.ShardStub(channel).Run(iter([plan]), timeout=5.0)
        with suppress(grpc.RpcError):
            next(answers)
