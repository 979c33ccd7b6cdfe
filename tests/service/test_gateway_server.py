"""The router's side of a gateway's stream, with a scripted core and a client that reads it raw."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc.aio
import pytest
from grpc_status import rpc_status

from router.api import gateway_outbox, gateway_server, grpc_server
from router.api.gateway_server import Gateways
from router.config import Settings
from router.core.effects import Close, Deliver
from router.core.events import Ended, Reason
from router.faces import _free_port
from router.gateway_wire import PROTOCOL, REASON_TO_WIRE
from router.remote_link import RouterLink
from router.text.tokenizer import Tokenizer
from router.v1 import gateway_pb2 as pb
from router.v1.gateway_pb2_grpc import GatewayStub
from shards.v1.shard_pb2 import TokenLogprobs
from tests.service.fakes import PATIENCE_S, until
from tests.service.scripted_core import House, Said, group_card, house
from tests.service.vocabularies import SPECIALS, byte_level

TOKENIZER = Tokenizer(byte_level())
EOS = byte_level().token_to_id(SPECIALS[0])
HELLO = pb.FromGateway(hello=pb.Hello(protocol=PROTOCOL, version="test"))


def submit(request: int, **changes: Any) -> pb.Submit:
    fields: dict[str, Any] = {"model": "small", "prompt": [65], "max_tokens": 20, "priority": 1}
    return pb.Submit(request=request, **(fields | changes))


def closes(delivery: pb.Delivery) -> dict[int, int]:
    return {one.request: one.reason for one in delivery.closes}


class Wire:
    """A gateway's stream, message by message."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.welcome = pb.Welcome()

    async def send(self, *submits: pb.Submit, ends: Sequence[pb.End] = ()) -> None:
        await self.call.write(pb.FromGateway(submits=submits, ends=ends))

    async def read(self) -> pb.ToGateway:
        async with asyncio.timeout(PATIENCE_S):
            message = await self.call.read()
        assert isinstance(message, pb.ToGateway)
        return message

    async def delivery(self) -> pb.Delivery:
        message = await self.read()
        assert message.WhichOneof("message") == "delivery"
        return message.delivery


class Place:
    """A router's gRPC port, with what is behind it."""

    def __init__(
        self, small: House, gateways: Gateways, address: str, channel: grpc.aio.Channel
    ) -> None:
        self.small = small
        self.address = address
        self.gateways = gateways
        self.channel = channel
        self.stub = GatewayStub(channel)  # type: ignore[no-untyped-call]

    @asynccontextmanager
    async def attached(self, **options: Any) -> AsyncIterator[Wire]:
        wire = Wire(self.stub.Attach(**options))
        await wire.call.write(HELLO)
        wire.welcome = (await wire.read()).welcome
        try:
            yield wire
        finally:
            wire.call.cancel()

    def ids(self) -> list[int]:
        """The router's numbers of what has been submitted, in order."""
        return [one.request for one in self.small.core.submitted]

    async def submitted(self, number: int) -> list[int]:
        await until(lambda: len(self.small.core.submitted) >= number)
        return self.ids()


@asynccontextmanager
async def place(**given: Any) -> AsyncIterator[Place]:
    settings = Settings(host="127.0.0.1", grpc_port=_free_port("127.0.0.1"), **given)
    async with house(TOKENIZER, (EOS,), settings=settings) as small:
        gateways = Gateways(small.driver, small.fleet, settings)
        server = await grpc_server.start(small.service, small.fleet, settings, gateways=gateways)
        try:
            address = f"127.0.0.1:{settings.grpc_port}"
            async with grpc.aio.insecure_channel(address) as channel:
                yield Place(small, gateways, address, channel)
        finally:
            await server.stop(0)


async def failure(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert rpc_status.from_call(caught.value) is not None  # type: ignore[arg-type]
    return caught.value.code(), caught.value.details() or ""


async def test_the_welcome_tells_limits_and_fleet() -> None:
    async with place(max_stop_sequences=9) as here, here.attached() as wire:
        assert wire.welcome.limits.max_stop_sequences == 9
        (group,) = wire.welcome.fleet.groups
        assert (group.name, group.card.ready, group.card.model) == ("g0", True, "small")
        here.small.fleet.down("g0")
        (group,) = (await wire.read()).fleet.groups
        assert not group.card.ready


@pytest.mark.parametrize("number", [1, 3, 300])
async def test_all_tokens_of_a_step_are_one_message(number: int) -> None:
    async with place(max_concurrent_requests=500) as here, here.attached() as wire:
        await wire.send(*(submit(1000 + place) for place in range(number)))
        ids = await here.submitted(number)
        for step in range(5):
            here.small.driver.post(Said([Deliver(ids, [70 + step] * number, [])]))
            delivery = await wire.delivery()
            assert list(delivery.requests) == [1000 + place for place in range(number)]
            assert list(delivery.tokens) == [70 + step] * number
            assert len(delivery.starts) == (number if step == 0 else 0)
        ends = [Close(one, Reason.LENGTH) for one in ids]
        here.small.driver.post(Said([Deliver(ids, [9] * number, []), *ends]))
        delivery = await wire.delivery()
        assert len(delivery.tokens) == number
        assert set(closes(delivery).values()) == {REASON_TO_WIRE[Reason.LENGTH]}
        assert here.small.driver.open_requests == 0


async def test_steps_that_come_while_a_message_is_written_join_the_next_one() -> None:
    async with place() as here, here.attached() as wire:
        await wire.send(submit(1), submit(2))
        one, two = await here.submitted(2)
        effects = [
            Deliver([one, two], [3, 4], []),
            Deliver([one], [5], []),
            Deliver([one], [6], []),
        ]
        here.small.driver.post(Said(list(effects)))
        delivery = await wire.delivery()
        assert list(delivery.requests) == [1, 2, 1, 1]
        assert list(delivery.tokens) == [3, 4, 5, 6]


async def test_log_probabilities_are_sparse() -> None:
    async with place() as here, here.attached() as wire:
        await wire.send(submit(1), submit(2))
        one, two = await here.submitted(2)
        entry = TokenLogprobs(sequence=two, logprob=-1.5, top_tokens=[8], top_values=[-1.0])
        here.small.driver.post(Said([Deliver([one, two], [3, 4], [None, entry])]))
        delivery = await wire.delivery()
        assert list(delivery.logprobs_at) == [1]
        assert delivery.logprobs[0] == entry


async def test_log_probabilities_of_a_prompt_come_with_it() -> None:
    async with place() as here, here.attached() as wire:
        await wire.send(submit(1, prompt=[65, 66, 67]))
        (one,) = await here.submitted(1)
        values: list[object] = [TokenLogprobs(logprob=-1.0), TokenLogprobs(logprob=-2.0)]
        here.small.driver.post(Said([Deliver([one], [3], [], [(one, values)])]))
        delivery = await wire.delivery()
        assert [(score.request, len(score.values)) for score in delivery.prompts] == [(1, 2)]
        assert delivery.prompts[0].values[1].logprob == -2.0


async def test_an_end_reaches_the_core_and_what_still_comes_does_not_matter() -> None:
    async with place() as here, here.attached() as wire:
        await wire.send(submit(1), submit(2))
        one, two = await here.submitted(2)
        end = pb.End(request=1, reason=REASON_TO_WIRE[Reason.STOP_STRING])
        await wire.send(ends=[end, pb.End(request=77)])
        await until(lambda: here.small.core.ended)
        assert here.small.core.ended == [Ended(one, Reason.STOP_STRING)]
        here.small.driver.post(Said([Deliver([one, two], [3, 4], [])]))
        assert list((await wire.delivery()).requests) == [2]


async def test_a_gateway_that_leaves_takes_its_requests_along(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    async with place() as here, here.attached() as other:
        await other.send(submit(1))
        await here.submitted(1)
        async with here.attached() as wire:
            await wire.send(submit(1), submit(2))
            ids = await here.submitted(3)
        await until(lambda: len(here.small.core.ended) == 2)
        assert here.small.core.ended == [Ended(one, Reason.CANCELLED) for one in ids[1:]]
        assert here.small.driver.open_requests == 1
        await until(lambda: "has left; 2 requests ended" in caplog.text)
        here.small.driver.post(Said([Deliver(ids[:1], [5], [])]))
        assert list((await other.delivery()).tokens) == [5]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "other"}, Reason.UNSUPPORTED),
        ({"prompt": []}, Reason.TOO_LONG),
        ({"prompt": [10**6]}, Reason.TOO_LONG),
        ({"prompt": [65] * 150, "max_tokens": 51}, Reason.TOO_LONG),
        ({"max_tokens": 0}, Reason.TOO_LONG),
        ({"adapter": "verse"}, Reason.TOO_LONG),
        ({"priority": 4}, Reason.TOO_LONG),
    ],
)
async def test_what_does_not_fit_the_fleet_is_refused(changes: Any, reason: Reason) -> None:
    async with place() as here, here.attached() as wire:
        await wire.send(submit(1, **changes), submit(2))
        delivery = await wire.delivery()
        assert closes(delivery) == {1: REASON_TO_WIRE[reason]}
        assert delivery.closes[0].detail
        assert len(await here.submitted(1)) == 1


async def test_a_full_router_refuses_and_a_closing_one_lets_open_requests_end() -> None:
    async with place(max_concurrent_requests=1) as here, here.attached() as wire:
        await wire.send(submit(1))
        (one,) = await here.submitted(1)
        await wire.send(submit(2))
        assert closes(await wire.delivery()) == {2: REASON_TO_WIRE[Reason.OVERLOADED]}
        here.gateways.close()
        assert (await wire.read()).HasField("closing")
        late = here.stub.Attach()
        with suppress(grpc.aio.AioRpcError):  # the refusal may come first
            await late.write(HELLO)
        assert (await failure(late))[0] is grpc.StatusCode.UNAVAILABLE
        here.small.driver.post(Said([Deliver([one], [5], []), Close(one, Reason.LENGTH)]))
        assert closes(await wire.delivery()) == {1: REASON_TO_WIRE[Reason.LENGTH]}
        assert await wire.call.read() is grpc.aio.EOF
        assert await wire.call.code() is grpc.StatusCode.OK


async def test_a_gateway_that_breaks_the_rules_is_thrown_out() -> None:
    async with place() as here:
        for first, code in (
            (pb.FromGateway(), grpc.StatusCode.INVALID_ARGUMENT),
            (pb.FromGateway(hello=pb.Hello(protocol=2)), grpc.StatusCode.UNIMPLEMENTED),
        ):
            call = here.stub.Attach()
            await call.write(first)
            assert (await failure(call))[0] is code
        async with here.attached() as wire:
            await wire.send(submit(1), submit(1))
            code, details = await failure(wire.call)
            assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert "submitted twice" in details
        await until(lambda: here.small.driver.open_requests == 0)


async def test_bytes_that_are_no_message_end_a_stream_with_an_error() -> None:
    async with place() as here:
        raw = here.channel.stream_stream("/router.v1.Gateway/Attach")
        for first in (b"\xff", HELLO.SerializeToString()):
            call = raw()
            await call.write(first)
            if first != b"\xff":
                assert pb.ToGateway.FromString(await call.read()).HasField("welcome")
                await call.write(b"\xff")
            assert (await failure(call))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_one_that_says_nothing_or_is_one_too_many_is_turned_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with place() as here:
        monkeypatch.setattr(gateway_server, "HELLO_DEADLINE_S", 0.05)
        assert (await failure(here.stub.Attach()))[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        monkeypatch.setattr(gateway_server, "HELLO_DEADLINE_S", PATIENCE_S)
        monkeypatch.setattr(gateway_server, "GATEWAYS_MAX", 1)
        async with here.attached() as wire:
            call = here.stub.Attach()
            with contextlib.suppress(grpc.aio.AioRpcError):  # it may come at once
                await call.write(HELLO)
            assert (await failure(call))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
            await wire.send(submit(1))
            await here.submitted(1)


async def test_files_of_any_size_arrive_whole() -> None:
    async with place(api_key="secret") as here:
        files = {"tokenizer.json": bytes(range(256)) * 10_000, "chat_template.jinja": b""}
        here.small.fleet.keep_files("ab", files)
        link = RouterLink(here.address, "secret")
        try:
            assert await link.tokenizer_files("ab") == files
        finally:
            await link.close()


async def test_calls_beside_the_stream_are_bounded_and_name_what_is_not_there() -> None:
    async with place(max_concurrent_requests=1) as here:
        called = asyncio.Event()

        async def embed(_: Sequence[Sequence[int]]) -> list[Sequence[float]]:
            called.set()
            return await asyncio.Future()

        card = group_card(TOKENIZER, (EOS,), features=("embeddings",))
        here.small.fleet.up(card, TOKENIZER, embed)
        request = pb.GroupEmbedRequest(group="g0", request={"inputs": [{"tokens": [1]}]})
        waiting = here.stub.Embed(request)
        await called.wait()
        for call, code in (
            (here.stub.Embed(request), grpc.StatusCode.RESOURCE_EXHAUSTED),
            (here.stub.Embed(pb.GroupEmbedRequest(group="h")), grpc.StatusCode.NOT_FOUND),
            (here.stub.Prepare(pb.GroupPrepareRequest(group="g0")), grpc.StatusCode.NOT_FOUND),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is code
        waiting.cancel()
        missing = here.stub.GetTokenizer(pb.GetTokenizerRequest(sha256="x"))
        assert (await failure(missing))[0] is grpc.StatusCode.NOT_FOUND


async def test_keys_are_asked_for() -> None:
    async with place(api_key="secret") as here:
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            call = here.stub.Attach(metadata=metadata)
            with suppress(grpc.aio.AioRpcError):  # the refusal may be here already
                await call.write(HELLO)
            assert (await failure(call))[0] is grpc.StatusCode.UNAUTHENTICATED
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await here.stub.Embed(pb.GroupEmbedRequest(), metadata=metadata)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        async with here.attached(metadata=(("authorization", "Bearer secret"),)) as wire:
            assert wire.welcome.fleet.groups


@pytest.mark.parametrize("limit", ["weight", "time"])
async def test_a_gateway_that_stands_still_loses_its_requests_and_stalls_nobody(
    monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    if limit == "weight":
        monkeypatch.setattr(gateway_outbox, "WEIGHT_MAX", 200_000)
    else:
        monkeypatch.setattr(gateway_server, "WRITE_DEADLINE_S", 0.2)
        monkeypatch.setattr(gateway_server, "WATCH_S", 0.05)
    # Some 600 kB for each step: the stream holds a few megabytes before it makes its writer wait.
    top = TokenLogprobs(logprob=-1, top_tokens=range(1000), top_values=[-1.0] * 1000)
    async with place() as here, here.attached() as still, here.attached() as other:
        await still.send(*(submit(number, max_tokens=60) for number in range(100)))
        ids = await here.submitted(100)
        await other.send(submit(7, max_tokens=60))
        mine = (await here.submitted(101))[-1]
        for step in range(50):
            here.small.driver.post(Said([Deliver(ids, [5] * 100, [top] * 100)]))
            here.small.driver.post(Said([Deliver([mine], [step], [])]))
            assert list((await other.delivery()).tokens) == [step]
        await until(lambda: here.small.driver.open_requests == 1)
        assert {one.reason for one in here.small.core.ended} == {Reason.CANCELLED}
        assert "too slowly" in (await last_words(still.call))


async def last_words(call: Any) -> str:
    """What the router says at the end of a stream, behind all that it had sent."""
    async with asyncio.timeout(PATIENCE_S):
        with contextlib.suppress(grpc.aio.AioRpcError):
            while await call.read() is not grpc.aio.EOF:
                pass
        assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        return str(await call.details())
