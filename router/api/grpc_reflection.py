"""Reflection: ``grpcurl`` and the like ask a server what it serves, without ``.proto`` files."""

from collections.abc import Iterable
from typing import Any, cast

import grpc.aio
from google.protobuf import descriptor_pool
from grpc_reflection.v1alpha import reflection


class _Symbols:
    """The descriptors of this process, as the library's servicer asks for them.

    It asks for the file of any symbol, of which methods are one, and the pool does not find those.
    """

    def __init__(self) -> None:
        self._pool = descriptor_pool.Default()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:
        """The file that defines a message, a field, a service or a method. Raises ``KeyError``."""
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            return self._pool.FindMethodByName(symbol).containing_service.file


def reflect(services: Iterable[str], server: grpc.aio.Server) -> None:
    """Lets clients ask the server for these services, by full name."""
    names = (*services, reflection.SERVICE_NAME)
    symbols = cast(descriptor_pool.DescriptorPool, _Symbols())
    reflection.enable_server_reflection(names, server, pool=symbols)
