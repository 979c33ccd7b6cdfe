"""A gateway's core: what it sends to the router, and what it makes of what comes back."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from router.ask import Ask, Params
from router.config import GroupSpec, Settings
from router.core.events import Reason, Submitted
from router.driver import Driver
from router.errors import Fault, RequestError
from router.fleet import Fleet
from router.gateway_wire import MESSAGE_BYTES_MAX, REASON_TO_WIRE
from router.generation import Generation
from router.metrics import Metrics
from router.remote import BATCH_BYTES, RemoteCore, Uplink
from router.service import Service
from router.text.tokenizer import Tokenizer
from router.v1 import gateway_pb2 as pb
from shards.v1.shard_pb2 import TokenLogprobs
from tests.service.scripted_core import group_card
from tests.service.vocabularies import SPECIALS, byte_level

TOKENIZER = Tokenizer(byte_level())
EOS = byte_level().token_to_id(SPECIALS[0])


class Small:
    """A gateway's service, driver and core; the test plays the stream to the router."""

    def __init__(self) -> None:
        settings = Settings()
        self.core = RemoteCore()
        self.now_ms = 1_000
        self.driver = Driver(self.core, Metrics(), 100, lambda: self.now_ms)
        self.core.owner = self.driver
        fleet = Fleet(settings, [GroupSpec("g0", "small", ())])
        fleet.up(group_card(TOKENIZER, (EOS,)), TOKENIZER)
        self.service = Service(fleet, self.driver, settings)

    async def ask(self, **params: object) -> Generation:
        return await self.service.generate(Ask("a", Params(**params)))  # type: ignore[arg-type]

    def deliver(self, **fields: object) -> None:
        self.core.deliver(pb.Delivery(**fields), self.now_ms)  # type: ignore[arg-type]


@pytest.fixture
async def small() -> AsyncIterator[Small]:
    made = Small()
    running = asyncio.create_task(made.driver.run())
    yield made
    made.driver.stop()
    await running


def closed(request: int, reason: Reason, detail: str = "") -> pb.Close:
    return pb.Close(request=request, reason=REASON_TO_WIRE[reason], detail=detail)


async def fault_of(generation: Generation) -> RequestError:
    with pytest.raises(RequestError) as caught:
        async for _ in generation:
            pass
    return caught.value


async def test_without_a_router_requests_are_refused_at_once(small: Small) -> None:
    error = await fault_of(await small.ask())
    assert error.fault is Fault.UNAVAILABLE
    assert "router cannot be reached" in error.message


async def test_an_answer_comes_as_the_router_sends_it(small: Small) -> None:
    uplink = small.core.attached()
    generation = await small.ask(logprobs=True)
    (submit,) = (await uplink.get()).submits
    assert (submit.request, submit.model, submit.priority) == (generation.request, "small", 1)
    assert submit.sampling.logprobs
    request = submit.request
    small.now_ms += 700
    start = pb.Start(request=request, cached_tokens=1, queued_ms=300)
    ids = TOKENIZER.encode("is Paris", add_special_tokens=False)
    small.deliver(
        starts=[start],
        requests=[request] * len(ids),
        tokens=ids,
        logprobs_at=[1],
        logprobs=[TokenLogprobs(logprob=-0.5, top_tokens=[3], top_values=[-0.25])],
    )
    first = await anext(generation)
    assert first.text == "is Paris"
    assert [out.logprob for out in first.tokens] == [None, -0.5] + [None] * (len(ids) - 2)
    assert first.tokens[1].top[0][2] == -0.25
    life = small.driver.life(request)
    assert life is not None
    assert (life.submitted_ms, life.admitted_ms, life.first_ms) == (1_000, 1_300, 1_700)
    small.deliver(requests=[request], tokens=ids[:1], closes=[closed(request, Reason.LENGTH)])
    (last,) = [chunk async for chunk in generation]
    assert last.finish is not None
    assert (last.finish.reason, last.finish.cached_tokens) == (Reason.LENGTH, 1)
    assert small.driver.open_requests == 0
    shown = small.driver.metrics.render().decode()
    assert "tgi_request_queue_duration_sum 0.3\n" in shown
    assert "roundhouse_time_to_first_token_seconds_sum 0.7\n" in shown
    assert "roundhouse_groups" not in shown, "the router tells of groups"


@pytest.mark.parametrize("reason", [Reason.OVERLOADED, Reason.SHUTDOWN, Reason.ENGINE_FAILED])
async def test_the_routers_refusals_are_the_gateways(small: Small, reason: Reason) -> None:
    uplink = small.core.attached()
    generation = await small.ask()
    await uplink.get()
    small.deliver(closes=[closed(generation.request, reason, "not now")])
    error = await fault_of(generation)
    assert (error.fault, error.message) == (
        {"overloaded": Fault.OVERLOADED, "shutdown": Fault.UNAVAILABLE}.get(
            reason.value, Fault.ENGINE_FAILED
        ),
        "not now",
    )


async def test_a_lost_router_ends_what_is_open(small: Small) -> None:
    small.core.attached()
    begun, waiting = await small.ask(), await small.ask()
    await asyncio.sleep(0)
    small.deliver(starts=[pb.Start(request=begun.request)], requests=[begun.request], tokens=[70])
    assert (await anext(begun)).tokens
    small.core.detached()
    error = await fault_of(begun)
    assert error.fault is Fault.WORKER_LOST
    assert "connection to the router was lost" in error.message
    assert (await fault_of(waiting)).fault is Fault.UNAVAILABLE
    again = small.core.attached()
    generation = await small.ask()
    assert [one.request for one in (await again.get()).submits] == [generation.request]


async def test_a_closing_router_gets_no_more_requests_but_ends(small: Small) -> None:
    uplink = small.core.attached()
    generation = await small.ask()
    await uplink.get()
    small.core.closing()
    error = await fault_of(await small.ask())
    assert error.fault is Fault.UNAVAILABLE
    assert "shutting down" in error.message
    generation.cancel()
    message = await uplink.get()
    assert [one.request for one in message.ends] == [generation.request]
    assert not message.submits


async def test_a_request_that_ends_before_it_is_sent_never_is(small: Small) -> None:
    uplink = small.core.attached()
    gone, kept = await small.ask(), await small.ask()
    gone.cancel()
    message = await uplink.get()
    assert [one.request for one in message.submits] == [kept.request]
    assert not message.ends


async def test_a_request_that_is_too_long_for_a_message_is_refused(small: Small) -> None:
    small.core.attached()
    vast = Submitted(
        small.driver.next_request_id(), "small", (2**31,) * (MESSAGE_BYTES_MAX // 5), 1
    )
    batch = await small.driver.submit(vast).get()
    assert batch.close is not None
    assert batch.close.reason is Reason.TOO_LONG


async def test_messages_to_the_router_are_bounded() -> None:
    uplink = Uplink()
    sizes = [1, BATCH_BYTES, 1, BATCH_BYTES // 2, BATCH_BYTES // 2, 1, 1]
    for number, size in enumerate(sizes):
        uplink.submit(pb.Submit(request=number), size)
    uplink.end(0, Reason.CANCELLED)
    uplink.end(99, Reason.STOP_STRING)
    sent = [await uplink.get() for _ in range(3)]
    assert [one.request for one in sent[0].ends] == [99]
    submits = [[one.request for one in message.submits] for message in sent]
    assert submits == [[1], [2, 3], [4, 5, 6]]
