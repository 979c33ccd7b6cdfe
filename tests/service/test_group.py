"""Groups, against real workers: joining ranks, losing them, and coming back."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import pytest

from router import link, turns
from router.config import GroupSpec, Settings
from router.core.effects import Abandon
from router.core.events import GroupDown, GroupUp, StepDone
from router.fleet import Fleet
from router.group import Group
from router.link import Link
from router.metrics import Metrics
from shards.v1 import shard_pb2
from tests.service.fakes import Bench, Liar, Post, bench_in, plan_for, serving, until

PROMPT = (5, 6, 7, 8)


class Scene:
    """Groups of one fleet, their inbox, and the bench that their workers are on."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.post = Post()
        self.metrics = Metrics()
        self.tasks: list[asyncio.Task[None]] = []
        self.silent: list[str] = []
        self._epochs = count(1)

    def group(self, *addresses: str, model: str | None = None) -> Group:
        return self.groups(GroupSpec("g", model, addresses))[0]

    def groups(self, *specs: GroupSpec) -> list[Group]:
        """Starts the groups."""
        self.fleet = Fleet(Settings(), specs)
        groups = [
            Group(
                spec,
                inbox=self.post,
                fleet=self.fleet,
                metrics=self.metrics,
                epochs=lambda: next(self._epochs),
                dial=lambda address: Link(address, 4),
                silent=self.silent.append,
                random=Random(0),
            )
            for spec in specs
        ]
        self.tasks += [asyncio.create_task(group.run()) for group in groups]
        return groups


@asynccontextmanager
async def scene_in(folder: Path) -> AsyncIterator[Scene]:
    async with bench_in(folder) as bench:
        scene = Scene(bench)
        try:
            yield scene
        finally:
            for task in scene.tasks:
                task.cancel()
            ends = await asyncio.gather(*scene.tasks, return_exceptions=True)
            assert all(isinstance(end, asyncio.CancelledError) for end in ends), ends


@pytest.fixture
async def scene(tmp_path: Path) -> AsyncIterator[Scene]:
    async with scene_in(tmp_path) as scene:
        yield scene


async def test_a_worker_comes_up_with_what_it_said(scene: Scene) -> None:
    scene.group(await scene.bench.start("a", limits={"kv_tokens": 1000}, length_max="600"))
    up = await scene.post.nth(GroupUp)
    assert (up.group, up.epoch, up.model, up.engine) == ("g", 1, "m", "scripted")
    assert (up.limits.kv_tokens, up.limits.length_max, up.limits.page_tokens) == (1000, 600, 1)
    assert up.limits.shares_prefix
    assert "logprobs" in up.features
    card = scene.fleet.model(None)
    assert (card.id, card.max_total_tokens, card.max_input_tokens) == ("m", 600, 599)
    assert card.tokenizer.decode(card.tokenizer.encode("the water", False), True) == "the water"
    assert scene.fleet.groups_up() == {"g": True}


async def test_steps_come_back_as_plain_lists(scene: Scene) -> None:
    group = scene.group(await scene.bench.start("a"))
    await scene.post.nth(GroupUp)
    group.write(plan_for(1, 1, prompt=PROMPT))
    group.write(plan_for(1, 2))
    first, second = await scene.post.nth(StepDone, 1), await scene.post.nth(StepDone, 2)
    assert (first.group, first.epoch, first.plan_id, first.sequences) == ("g", 1, 1, [7])
    assert (second.plan_id, second.sequences, second.failures) == (2, [7], ())
    assert type(first.sequences) is list
    assert type(first.tokens) is list
    assert first.logprobs == []
    script = scene.bench.engines["a"]._script
    assert first.tokens == [script.follow(PROMPT)]
    assert second.tokens == [script.follow((*PROMPT, *first.tokens))]
    assert b'roundhouse_step_seconds_count{group="g"} 2.0' in scene.metrics.render()


async def test_logprobs_run_parallel_to_the_tokens(scene: Scene) -> None:
    group = scene.group(await scene.bench.start("a"))
    await scene.post.nth(GroupUp)
    sampling = shard_pb2.Sampling(logprobs=True, top_logprobs=2)
    both = plan_for(1, 1, 1, prompt=PROMPT)
    asked = plan_for(1, 1, 2, prompt=PROMPT, sampling=sampling)
    group.write(
        type(both)("g", 1, 1, (), both.admits + asked.admits, (1, 2), (len(PROMPT), len(PROMPT)))
    )
    done = await scene.post.nth(StepDone)
    by_sequence = dict(zip(done.sequences, done.logprobs, strict=True))
    assert by_sequence[1] is None
    answer: Any = by_sequence[2]
    assert answer.sequence == 2
    assert answer.logprob < 0
    assert len(answer.top_tokens) == len(answer.top_values) == 2


async def test_a_step_is_done_when_every_rank_has_answered(scene: Scene) -> None:
    bench = scene.bench
    one = await bench.start("one", rank=1, world=2, limits={"kv_tokens": 900})
    zero = await bench.start("zero", rank=0, world=2, limits={"kv_tokens": 1000})
    group = scene.group(one, zero)  # not in order of rank
    up = await scene.post.nth(GroupUp)
    assert up.limits.kv_tokens == 900
    bench.gates["one"].clear()
    group.write(plan_for(1, 1, prompt=PROMPT))
    await until(lambda: group._life is not None and group._life._answers[0])
    assert bench.engines["one"].begun == 1
    assert scene.post.of(StepDone) == []
    bench.gates["one"].set()
    done = await scene.post.nth(StepDone)
    assert done.sequences == [7]
    assert scene.fleet.model("m").groups[0].world == 2


async def test_ranks_that_differ_end_the_life_of_the_group(scene: Scene) -> None:
    bench = scene.bench
    zero = await bench.start("zero", rank=0, world=2)
    one = await bench.start("one", rank=1, world=2, answer="water")
    group = scene.group(zero, one)
    await scene.post.nth(GroupUp)
    group.write(plan_for(1, 1, prompt=PROMPT))
    assert await scene.post.nth(GroupDown) == GroupDown("g", 1)
    assert scene.post.of(StepDone) == []
    assert (await scene.post.nth(GroupUp, 2)).epoch == 2


async def test_a_lost_rank_ends_the_epoch_and_its_return_begins_another(scene: Scene) -> None:
    bench = scene.bench
    zero = await bench.start("zero", rank=0, world=2)
    one = await bench.start("one", rank=1, world=2)
    group = scene.group(zero, one)
    await scene.post.nth(GroupUp)
    bench.gates["one"].clear()
    group.write(plan_for(1, 1, prompt=PROMPT))
    await until(lambda: bench.engines["one"].begun)
    await bench.kill("one")
    assert await scene.post.nth(GroupDown) == GroupDown("g", 1)
    assert not scene.fleet.groups_up()["g"]
    assert scene.fleet.model("m").groups[0].ready is False
    await bench.start("one", rank=1, world=2)
    assert (await scene.post.nth(GroupUp, 2)).epoch == 2
    group.write(plan_for(1, 2))  # of the former life: nobody gets it
    group.write(plan_for(2, 1, prompt=PROMPT))  # rank 0 has forgotten that it knew sequence 7
    done = await scene.post.nth(StepDone)
    assert (done.epoch, done.plan_id) == (2, 1)


async def test_a_wedged_worker_is_abandoned_and_is_up_again_only_once_it_moves(
    scene: Scene, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = scene.group(await scene.bench.start("a"))
    await scene.post.nth(GroupUp)
    scene.bench.gates["a"].clear()
    group.write(plan_for(1, 1, prompt=PROMPT))
    await until(lambda: scene.bench.engines["a"].begun)
    monkeypatch.setattr(link, "OPEN_DEADLINE_S", 0.3)
    group.abandon(Abandon("g", 99, "an epoch that is not"))
    group.abandon(Abandon("g", 1, "no answer to a plan"))
    group.abandon(Abandon("g", 1, "said twice"))
    assert await scene.post.nth(GroupDown) == GroupDown("g", 1)
    await until(lambda: "not ready for a new stream" in caplog.text)
    assert len(scene.post.of(GroupUp)) == 1
    monkeypatch.undo()
    scene.bench.gates["a"].set()
    assert (await scene.post.nth(GroupUp, 2)).epoch == 2
    group.write(plan_for(2, 1, prompt=PROMPT))
    assert (await scene.post.nth(StepDone)).epoch == 2
    assert "no answer to a plan" in caplog.text


async def test_a_worker_that_is_still_loading_is_waited_for(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(link, "DESCRIBE_DEADLINE_S", 0.05)
    loaded = threading.Event()
    scene.group(await scene.bench.start("a", load_after=loaded))
    await until(lambda: "it may be loading its model" in caplog.text)
    loaded.set()
    await scene.post.nth(GroupUp)
    assert caplog.text.count("it may be loading") == 1  # said once, though it was tried again


async def test_a_worker_may_start_after_the_router(scene: Scene) -> None:
    scene.group(scene.bench.address("late"))
    await scene.bench.start("late")
    await scene.post.nth(GroupUp)


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (lambda plan: shard_pb2.Outcome(epoch=plan.epoch, plan_id=2), "answered plan 2"),
        (lambda plan: shard_pb2.Outcome(epoch=9, plan_id=plan.plan_id), "of epoch 9"),
    ],
)
async def test_an_answer_to_another_plan_is_not_trusted(
    scene: Scene,
    caplog: pytest.LogCaptureFixture,
    answer: Callable[[shard_pb2.Plan], shard_pb2.Outcome],
    cause: str,
) -> None:
    address = scene.bench.address("liar")
    async with serving(Liar(answer), address):
        group = scene.group(address)
        await scene.post.nth(GroupUp)
        group.write(plan_for(1, 1, prompt=PROMPT))
        await scene.post.nth(GroupDown)
        await until(lambda: cause in caplog.text)
        assert scene.post.of(StepDone) == []


async def test_failures_of_sequences_are_told(scene: Scene) -> None:
    def failed(plan: shard_pb2.Plan) -> shard_pb2.Outcome:
        failure = shard_pb2.Failure(sequence=7, message="out of luck")
        return shard_pb2.Outcome(epoch=plan.epoch, plan_id=plan.plan_id, failures=[failure])

    address = scene.bench.address("liar")
    async with serving(Liar(failed), address):
        group = scene.group(address)
        await scene.post.nth(GroupUp)
        group.write(plan_for(1, 1, prompt=PROMPT, drops=(3,)))
        assert (await scene.post.nth(StepDone)).failures == ((7, "out of luck"),)


async def test_a_plan_travels_whole(scene: Scene) -> None:
    liar = Liar(lambda plan: shard_pb2.Outcome(epoch=plan.epoch, plan_id=plan.plan_id))
    address = scene.bench.address("liar")
    async with serving(liar, address):
        group = scene.group(address)
        await scene.post.nth(GroupUp)
        sampling = shard_pb2.Sampling(temperature=0.5, seed=2**64 - 1, logprobs=True)
        group.write(plan_for(1, 1, 2**40, prompt=PROMPT, drops=(3, 4), sampling=sampling))
        await scene.post.nth(StepDone)
    assert liar.plans == [
        shard_pb2.Plan(
            epoch=1,
            plan_id=1,
            drops=[3, 4],
            admits=[
                shard_pb2.Admit(sequence=2**40, tokens=PROMPT, prompt_len=4, sampling=sampling)
            ],
            work_sequences=[2**40],
            work_tokens=[4],
        )
    ]


async def test_the_tokenizer_is_fetched_once(scene: Scene) -> None:
    liar = Liar(lambda plan: shard_pb2.Outcome(epoch=0, plan_id=plan.plan_id))
    address = scene.bench.address("liar")
    async with serving(liar, address):
        group = scene.group(address)
        for epoch in (1, 2, 3):
            await scene.post.nth(GroupUp, epoch)
            group.write(plan_for(epoch, 1, prompt=PROMPT))
            await scene.post.nth(GroupDown, epoch)
    assert liar.tokenizers_sent == 1


async def test_a_worker_serves_one_group_only(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    address = await scene.bench.start("a")
    alias = scene.bench.folder / "alias.sock"
    alias.symlink_to(scene.bench.folder / "a.sock")
    scene.groups(GroupSpec("g", None, (address,)), GroupSpec("h", None, (f"unix://{alias}",)))
    await until(lambda: "already serves group" in caplog.text)
    await scene.post.nth(GroupUp)
    assert len(scene.post.of(GroupUp)) == 1
    assert scene.post.of(GroupDown) == []


async def test_two_models_and_two_replicas(scene: Scene) -> None:
    bench = scene.bench
    first = await bench.start("a", limits={"kv_tokens": 500})
    second = await bench.start("b", limits={"kv_tokens": 800})
    third = await bench.start("c", model="other")
    scene.groups(
        GroupSpec("g", None, (first,)),
        GroupSpec("h", None, (second,)),
        GroupSpec("i", "mine", (third,)),
    )
    await scene.post.nth(GroupUp, 3)
    fleet = scene.fleet
    assert [card.id for card in fleet.models()] == ["m", "mine"]
    assert fleet.model("tgi") is fleet.model("m")
    assert [group.name for group in fleet.model("m").groups] == ["g", "h"]
    assert fleet.model("m").max_total_tokens == 800  # as long as the roomier replica holds
    assert {up.group: up.model for up in scene.post.of(GroupUp)}["i"] == "mine"


class Late(Liar):
    """A worker that says who it is when others have come up, or have had the time for it."""

    def __init__(self, post: Post) -> None:
        super().__init__(lambda _plan: shard_pb2.Outcome())
        self._post = post

    async def Describe(self, request: Any, context: Any) -> shard_pb2.DescribeResponse:
        with suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await self._post.nth(GroupUp)
        return self.description


async def test_of_two_that_cannot_serve_together_the_first_one_named_does(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    fast = await scene.bench.start("a")
    slow = scene.bench.address("late")
    async with serving(Late(scene.post), slow):
        scene.groups(GroupSpec("g", None, (slow,)), GroupSpec("h", None, (fast,)))
        await until(lambda: "group h is down: group g serves m with 300 tokens" in caplog.text)
        assert (await scene.post.nth(GroupUp)).group == "g"


async def test_a_group_does_not_wait_for_one_whose_worker_is_not_there(scene: Scene) -> None:
    here, gone = await scene.bench.start("a"), scene.bench.address("gone")
    scene.groups(GroupSpec("g", None, (gone,)), GroupSpec("h", None, (here,)))
    async with asyncio.timeout(turns.WAIT_S / 2):
        assert (await scene.post.nth(GroupUp)).group == "h"


async def test_pauses_grow_to_a_limit_and_begin_anew() -> None:
    backoff = link.Backoff(Random(1), first_s=0.1, most_s=1.0, factor=2.0)
    pauses = [backoff.pause_s() for _ in range(12)]
    assert 0.08 <= pauses[0] <= 0.12
    assert pauses[1] > pauses[0]
    assert all(0.8 <= pause <= 1.2 for pause in pauses[4:])
    assert len(set(pauses)) == len(pauses)
    backoff.reset()
    assert backoff.pause_s() <= 0.12
