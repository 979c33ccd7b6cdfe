"""Whether a router can ever serve: one of its groups does, or all are known to be of no use."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from router.app import Router
from router.config import ConfigError, GroupSpec, Settings
from tests.service.fakes import Bench, Liar, bench_in, serving, until
from tests.service.test_driver_workers import submit


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench_in(tmp_path) as bench:
        yield bench


def useless() -> Liar:
    """A worker that answers, and can hold nothing."""
    liar = Liar(lambda _: pytest.fail("it was sent a plan"))
    liar.description.kv_tokens = 0
    return liar


def of(*addresses: str) -> Router:
    return Router(Settings(), [GroupSpec(f"g{n}", None, (one,)) for n, one in enumerate(addresses)])


async def test_the_only_group_is_of_no_use(tmp_path: Path) -> None:
    address = f"unix://{tmp_path}/liar.sock"
    told = "group g0 cannot serve: a worker says kv_tokens = 0, so it can hold nothing"
    async with serving(useless(), address), of(address) as router:
        with pytest.raises(ConfigError, match=told):
            await router.groups.wait_first()


async def test_each_of_several_is_named_once_none_is_left(tmp_path: Path) -> None:
    addresses = [f"unix://{tmp_path}/{name}.sock" for name in ("a", "b")]
    one, other = (serving(useless(), address) for address in addresses)
    async with one, of(*addresses) as router, other:
        with pytest.raises(ConfigError) as caught:
            await router.groups.wait_first()
    assert [fault[:8] for fault in sorted(caught.value.faults)] == ["group g0", "group g1"]


async def test_lengths_that_it_does_not_hold_are_told_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    limits = {"kv_tokens": 512}
    settings = Settings(max_input_tokens=900, max_total_tokens=1000)
    groups = [
        GroupSpec(name, None, (await bench.start(name, limits=limits),)) for name in ("a", "b")
    ]
    async with Router(settings, groups) as router:
        await until(lambda: all(router.fleet.groups_up().values()))
        told = [message for message in caplog.messages if "not 1000" in message]
    assert told == [
        "max_input_tokens is 511, not 900, max_total_tokens is 512, not 1000: that is what m and"
        " its workers hold"
    ]


async def test_lengths_that_it_holds_are_not_told(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    settings = Settings(max_total_tokens=512)
    address = await bench.start("a", limits={"kv_tokens": 512})
    async with Router(settings, [GroupSpec("a", None, (address,))]) as router:
        await router.fleet.wait_ready()
    assert not [message for message in caplog.messages if "max_total_tokens" in message]


async def test_one_that_serves_is_enough(bench: Bench, tmp_path: Path) -> None:
    address = f"unix://{tmp_path}/liar.sock"
    async with serving(useless(), address), of(address, await bench.start("good")) as router:
        await router.groups.wait_first()
        assert (await submit(router).get()).tokens
