"""Groups that come and go under a router that runs, over real workers with the scripted engine."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from router.app import Router
from router.ask import EmbedAsk
from router.config import ConfigError, GroupSpec
from router.core.events import Reason
from router.errors import Fault, RequestError
from router.groups import RefusedError, State
from tests.engines.skilled import vector_of
from tests.service.fakes import Bench, bench_in, until
from tests.service.test_driver_workers import answer, follow, routing, submit

LIMIT_S = 15.0


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench_in(tmp_path) as bench:
        yield bench


async def add(router: Router, bench: Bench, name: str, **extra: str) -> None:
    """A group with one worker comes and serves."""
    router.groups.add(GroupSpec(name, None, (await bench.start(name, **extra),)))
    await router.groups.wait_up(name)


def state(router: Router, name: str) -> State:
    return next(one for one in router.groups.states() if one.spec.name == name)


async def test_a_stream_moves_to_a_group_that_was_added(bench: Bench) -> None:
    async with routing((await bench.start("old", step_ms="1"),)) as router:
        channel = submit(router, 300)
        first = (await channel.get()).tokens
        await add(router, bench, "new")
        await router.groups.remove("g0", LIMIT_S)
        rest, close = await answer(channel)
        assert close.reason is Reason.LENGTH
        assert [*first, *rest] == follow(bench, "new", 300)
        assert router.groups.names() == ("new",)
        assert router.driver._core.snapshot().moved == 1
        assert router.driver._core.snapshot().resumed == 0
        assert "roundhouse_moves_total 1.0" in router.metrics.render().decode()


async def test_many_streams_lose_and_repeat_nothing_when_their_group_goes(bench: Bench) -> None:
    async with routing((await bench.start("old", step_ms="1"),)) as router:
        prompts = [tuple(range(5, 8 + number)) for number in range(12)]
        channels = [submit(router, 150, prompt) for prompt in prompts]
        answers = asyncio.gather(*map(answer, channels))
        await until(lambda: state(router, "g0").running == 12)
        await add(router, bench, "new", step_ms="1")
        await router.groups.remove("g0", LIMIT_S)
        for (tokens, close), prompt in zip(await answers, prompts, strict=True):
            assert close.reason is Reason.LENGTH
            assert tokens == follow(bench, "new", 150, prompt)


async def test_what_nobody_else_can_take_ends_where_it_is(bench: Bench) -> None:
    async with routing((await bench.start("old", step_ms="1"),)) as router:
        channel = submit(router, 60)
        first = (await channel.get()).tokens
        leaving = asyncio.create_task(router.groups.remove("g0", LIMIT_S))
        await until(lambda: state(router, "g0").state == "leaving")
        late = submit(router)
        rest, close = await answer(channel)
        assert [*first, *rest] == follow(bench, "old", 60)
        assert close.reason is Reason.LENGTH
        await leaving
        assert router.groups.names() == ()
        await add(router, bench, "new")
        tokens, close = await answer(late)
        assert (tokens, close.reason) == (follow(bench, "new", 8), Reason.LENGTH)


async def test_at_once_streams_wait_for_the_next_group(bench: Bench) -> None:
    async with routing((await bench.start("old", step_ms="1"),)) as router:
        channel = submit(router, 200)
        first = (await channel.get()).tokens
        await router.groups.remove("g0", LIMIT_S, at_once=True)
        assert router.groups.waiting == 1
        await add(router, bench, "new")
        rest, _ = await answer(channel)
        assert [*first, *rest] == follow(bench, "new", 200)
        assert router.driver._core.snapshot().resumed == 0


async def test_what_has_not_ended_within_the_limit_goes_on_elsewhere(bench: Bench) -> None:
    """Where the worker stands still, nothing can be moved out of a step."""
    async with routing((await bench.start("old"),)) as router:
        bench.gates["old"].clear()
        channel = submit(router, 8)
        await until(lambda: bench.engines["old"].begun == 1)
        await add(router, bench, "new")
        await router.groups.remove("g0", 0.05)
        tokens, close = await answer(channel)
        assert (tokens, close.reason) == (follow(bench, "new", 8), Reason.LENGTH)


async def test_a_worker_that_is_told_to_leave_loses_no_stream(bench: Bench) -> None:
    """And comes again when it is started again at its address."""
    addresses = [await bench.start(name, step_ms="1") for name in ("a", "b")]
    async with routing(*((address,) for address in addresses)) as router:
        await until(lambda: all(router.fleet.groups_up().values()))
        channels = [submit(router, 200, tuple(range(5, 9 + number))) for number in range(6)]
        answers = asyncio.gather(*map(answer, channels))
        await until(lambda: state(router, "g0").running and state(router, "g1").running)
        async with asyncio.timeout(LIMIT_S):
            await bench.worker("a").leave()
        assert state(router, "g0").state == "down"
        assert [close.reason for _, close in await answers] == [Reason.LENGTH] * 6
        assert router.driver._core.snapshot().resumed == 0
        assert b'roundhouse_group_losses_total{group="g0"} 0.0' in router.metrics.render()
        await bench.kill("a")
        await bench.start("a")
        await router.groups.wait_up("g0")
        await until(lambda: state(router, "g0").state == "up")


@pytest.mark.parametrize("at_once", [False, True])
async def test_what_is_being_embedded_is_waited_for(bench: Bench, at_once: bool) -> None:
    """Nobody else could do it, and the core does not know of it."""
    async with routing((await bench.start("old", adapters=("verse",)),)) as router:
        bench.gates["old"].clear()
        asked = asyncio.create_task(router.service.embed(EmbedAsk(((1, 2),))))
        await until(lambda: bench.engines["old"].begun == 1)
        leaving = asyncio.create_task(router.groups.remove("g0", LIMIT_S, at_once=at_once))
        await until(lambda: router.driver._core._groups["g0"].left)
        bench.gates["old"].set()
        (vector,) = (await asked).vectors
        assert list(vector) == pytest.approx(vector_of((1, 2)), abs=1e-6)
        await leaving
        assert router.groups.names() == ()


async def test_what_is_being_embedded_is_not_waited_for_longer_than_that(bench: Bench) -> None:
    async with routing((await bench.start("old", adapters=("verse",)),)) as router:
        bench.gates["old"].clear()
        asked = asyncio.create_task(router.service.embed(EmbedAsk(((1, 2),))))
        await until(lambda: bench.engines["old"].begun == 1)
        await router.groups.remove("g0", 0.05)
        with pytest.raises(RequestError) as caught:
            await asked
        assert caught.value.fault is Fault.WORKER_LOST


async def test_a_group_that_is_down_goes_without_waiting(bench: Bench) -> None:
    async with routing((await bench.start("a"),)) as router:
        router.groups.add(GroupSpec("absent", None, (bench.address("absent"),)))
        await router.groups.remove("absent", LIMIT_S)
        assert router.groups.names() == ("g0",)
        with pytest.raises(RefusedError, match="group absent has been removed"):
            await router.groups.wait_up("absent")
        with pytest.raises(KeyError):
            await router.groups.remove("absent", LIMIT_S)


async def test_a_removed_name_and_its_address_can_be_added_again(bench: Bench) -> None:
    async with routing((await bench.start("a"),)) as router:
        await add(router, bench, "b")
        spec = state(router, "b").spec
        with pytest.raises(ConfigError, match="two groups are called b"):
            router.groups.add(GroupSpec("b", None, (bench.address("other"),)))
        with pytest.raises(ConfigError, match="a worker serves one group"):
            router.groups.add(GroupSpec("c", None, spec.addresses))
        await router.groups.remove("b", LIMIT_S)
        router.groups.add(spec)
        await router.groups.wait_up("b")
        assert state(router, "b").state == "up"


async def test_a_group_that_cannot_serve_beside_the_others_is_refused(bench: Bench) -> None:
    async with routing((await bench.start("a"),)) as router:
        same = bench.address("a").replace("a.sock", "/a.sock")
        router.groups.add(GroupSpec("b", None, (same,)))
        with pytest.raises(RefusedError, match="a worker of this group already serves group g0"):
            await router.groups.wait_up("b")


async def test_a_model_is_gone_with_the_last_of_its_groups(bench: Bench) -> None:
    async with routing((await bench.start("a"),)) as router:
        assert router.groups.sole("g0") == "m"
        await add(router, bench, "b")
        assert router.groups.sole("g0") is None
        await bench.kill("b")
        await until(lambda: state(router, "b").state == "down")
        assert router.groups.sole("g0") == "m"
        await router.groups.remove("b", LIMIT_S)
        await router.groups.remove("g0", LIMIT_S)
        with pytest.raises(RequestError) as caught:
            router.fleet.model("m")
        assert caught.value.fault is Fault.UNAVAILABLE


async def test_removing_twice_at_a_time_is_removing_once(bench: Bench) -> None:
    async with routing((await bench.start("a"),)) as router:
        await add(router, bench, "b")
        both = (router.groups.remove("b", LIMIT_S), router.groups.remove("b", LIMIT_S))
        await asyncio.gather(*both)
        assert router.groups.names() == ("g0",)


async def test_a_removal_that_is_cancelled_goes_on_and_can_be_waited_for_again(
    bench: Bench,
) -> None:
    async with routing((await bench.start("a", step_ms="1"),)) as router:
        channel = submit(router, 300)
        await channel.get()
        leaving = asyncio.create_task(router.groups.remove("g0", LIMIT_S))
        await until(lambda: state(router, "g0").state == "leaving")
        leaving.cancel()
        await asyncio.wait((leaving,))
        assert state(router, "g0").state == "leaving"
        _, close = await answer(channel)
        assert close.reason is Reason.LENGTH
        await router.groups.remove("g0", LIMIT_S)
        assert router.groups.names() == ()


async def test_a_group_is_tried_out_before_it_serves(bench: Bench) -> None:
    """And is empty again when the first request comes."""
    async with routing((await bench.start("a"),)) as router:
        assert bench.engines["a"].begun == 0
        await add(router, bench, "b")
        assert bench.engines["b"].begun == 3, "a prompt, a decode, and the end of it"
        await router.groups.remove("g0", LIMIT_S)
        assert (await answer(submit(router)))[0] == follow(bench, "b", 8)


async def test_two_ranks_are_tried_out_together(bench: Bench) -> None:
    async with routing((await bench.start("a"),)) as router:
        ranks = [await bench.start(str(rank), rank=rank, world=2) for rank in (1, 0)]
        router.groups.add(GroupSpec("b", None, tuple(ranks)))
        await router.groups.wait_up("b")
        assert bench.engines["0"].begun == bench.engines["1"].begun == 3


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("lost_after_steps", "it fails at its first steps: .*the script loses its device"),
        ("fail_sequence_after", "it fails at its first steps: the script fails after 1 tokens"),
        ("wedge_after_steps", "its first steps were not answered within 0.3 s"),
    ],
)
async def test_a_group_that_cannot_compute_is_refused(bench: Bench, fault: str, why: str) -> None:
    async with routing((await bench.start("a"),), step_deadline_s=0.3) as router:
        address = await bench.start("b", **{fault: "1"})
        router.groups.add(GroupSpec("b", None, (address,)))
        with pytest.raises(RefusedError, match=why):
            await router.groups.wait_up("b")
        assert state(router, "b").state == "down"
        assert (await answer(submit(router)))[0] == follow(bench, "a", 8)
