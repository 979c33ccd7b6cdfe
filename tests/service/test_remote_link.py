"""A gateway's connection to a router that does not want it."""

from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc.aio import _call as aio_call

from router.link import Link, LinkDownError, MistrustError
from router.remote_link import GREETINGS_MAX, RefusedError, RouterLink
from tests.service.test_rest_router import house_in


@pytest.mark.parametrize("lost", [0, 1, GREETINGS_MAX - 1, GREETINGS_MAX])
async def test_a_refusal_is_heard_though_grpc_may_hide_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    """As if so many first words crossed the end of their call: grpc then says INTERNAL."""
    write, lost_left = aio_call.StreamStreamCall.write, [None] * lost

    async def crossed(self: aio_call.StreamStreamCall, message: Any) -> None:
        if not lost_left:
            return await write(self, message)
        lost_left.pop()
        none = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(grpc.StatusCode.INTERNAL, none, none, "Internal error from Core")

    async with house_in(tmp_path, api_key="inner") as house:
        monkeypatch.setattr(aio_call.StreamStreamCall, "write", crossed)
        link = RouterLink(house.grpc, "wrong")
        heard = lost < GREETINGS_MAX
        told = "--router-api-key" if heard else "INTERNAL: Internal error from Core"
        try:
            with pytest.raises(LinkDownError, match=told) as caught:
                await link.attach("test")
            assert isinstance(caught.value, RefusedError) == heard
        finally:
            monkeypatch.undo()
            await link.close()


async def test_the_port_of_rest_is_called_that(tmp_path: Path) -> None:
    """For gateways, and for routers that take it for a worker."""
    async with house_in(tmp_path) as house:
        address = house.url.removeprefix("http://")
        gateway, router = RouterLink(address, None), Link(address, 1, None)
        try:
            with pytest.raises(RefusedError, match="port of REST does: give its port of gRPC"):
                await gateway.attach("test")
            with pytest.raises(MistrustError, match="port of REST does: give its port of gRPC"):
                await router.describe()
        finally:
            await gateway.close()
            await router.close()
