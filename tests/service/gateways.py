"""Gateways in this process, over a real stream to their router, as tests use them."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from router.config import Settings
from router.faces import RestFace, listen
from router.gateway import Gateway
from tests.service.fakes import PATIENCE_S


@asynccontextmanager
async def gateway_before(
    router: str,
    *,
    router_key: str | None = None,
    port: int = 0,
    wait: bool = True,
    **settings: Any,
) -> AsyncIterator[tuple[Gateway, int]]:
    """A gateway that serves, and its port of REST. With ``wait``, it is attached already."""
    chosen = Settings(host="127.0.0.1", port=port, grpc_port=0, **settings)
    listener = listen(chosen.host, chosen.port, reuse_port=True)
    async with Gateway(chosen, router, router_key) as gateway:
        face = RestFace(gateway.front, listener, identity=gateway.identities.clients)
        rest = gateway.own(face.run(), "rest")
        try:
            if wait:
                async with asyncio.timeout(PATIENCE_S):
                    await gateway.ready.wait()
            yield gateway, face.port
        finally:
            gateway.driver.stop()
            face.close()
            await rest
