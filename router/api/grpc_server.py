"""The gRPC port: all services, health and reflection on one server; and that for gateways alone."""

import grpc.aio

from router.api import fmaas, grpc_health, grpc_inference, kserve
from router.api.gateway_server import Gateways
from router.api.grpc_health import Health
from router.api.grpc_inference import Inference
from router.api.grpc_reflection import reflect
from router.api.grpc_tracing import Traced
from router.auth import ApiKeys
from router.chat import ChatService
from router.config import Settings
from router.fleet import Fleet
from router.gateway_wire import MESSAGE_BYTES_MAX
from router.gateway_wire import SERVICE as GATEWAY
from router.identities import Identities
from router.metrics_models import Models
from router.service import Service
from router.tracing import OFF, Tracing
from tls.identity import Identity
from tls.wire import NO_PROBES, listen

PING_INTERVAL_MS = 10_000
"""How often clients may ping while nothing is said, gateways among them: grpc's own limit of five
minutes would end the connections of all that look after theirs."""

SERVICES = (grpc_inference.SERVICE, fmaas.SERVICE, kserve.SERVICE)


def _options(settings: Settings, bytes_max: int) -> list[tuple[str, int]]:
    return [
        # What clients may send, each method says for itself; this is the most of all.
        ("grpc.max_receive_message_length", max(settings.payload_limit, bytes_max)),
        ("grpc.max_send_message_length", -1),
        *NO_PROBES,
        ("grpc.so_reuseport", 0),  # a second router on the port is an error, not a lottery
        # Finds clients that vanished without closing, and lets idle ones ping.
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", PING_INTERVAL_MS),
    ]


async def start(
    service: Service,
    fleet: Fleet,
    settings: Settings,
    chats: ChatService | None = None,
    gateways: Gateways | None = None,
    models: Models | None = None,
    *,
    identities: Identities | None = None,
    tracing: Tracing = OFF,
) -> grpc.aio.Server:
    """Starts serving on ``settings.host`` and ``grpc_port``; the caller stops it.

    ``chats`` answers conversations; None means one on top of the service. ``gateways`` serves the
    processes that run REST faces elsewhere, if there may be any; ``models`` is what requests are
    counted in; ``identities`` are those of the settings, if they have been read already;
    ``tracing`` is told of calls. Raises OSError, with one line, if the port cannot be had.
    """
    shown = identities or Identities.of(settings)
    bytes_max = 0 if gateways is None else MESSAGE_BYTES_MAX
    watching = [Traced(tracing, SERVICES)] if tracing.on else []
    server = grpc.aio.server(interceptors=watching, options=_options(settings, bytes_max))
    keys = ApiKeys(settings.api_key)
    chats = chats or ChatService(service)
    handlers = {
        grpc_inference.SERVICE: Inference(service, chats, fleet, keys, settings).handlers(),
        fmaas.SERVICE: fmaas.GenerationService(service, fleet, keys, settings).handlers(),
        kserve.SERVICE: kserve.InferenceService(
            service, fleet, keys, settings, models or Models()
        ).handlers(),
        grpc_health.SERVICE: Health(fleet, SERVICES).handlers(),
    }
    if gateways is not None and shown.cluster is None:
        handlers[GATEWAY] = gateways.handlers()
    server.add_generic_rpc_handlers(
        tuple(grpc.method_handlers_generic_handler(*pair) for pair in handlers.items())
    )
    reflect(handlers, server)
    await _listen(server, settings.host, settings.grpc_port, shown.clients)
    return server


async def start_for_gateways(
    gateways: Gateways, settings: Settings, port: int, cluster: Identity
) -> grpc.aio.Server:
    """Starts serving gateways that belong to the cluster on ``settings.host`` and a port.

    The caller stops it. Raises OSError, with one line, if the port cannot be had.
    """
    server = grpc.aio.server(options=_options(settings, MESSAGE_BYTES_MAX))
    handlers = grpc.method_handlers_generic_handler(GATEWAY, gateways.handlers())
    server.add_generic_rpc_handlers((handlers,))
    await _listen(server, settings.host, port, cluster)
    return server


async def _listen(server: grpc.aio.Server, name: str, port: int, identity: Identity | None) -> None:
    """Starts a server at an address. Raises ``OSError`` with one line."""
    host = f"[{name}]" if ":" in name else name
    address = f"{host}:{port}"
    try:
        bound = listen(server, address, identity)
    except RuntimeError as error:
        raise OSError(f"cannot listen on {address}: the port is in use, or not allowed") from error
    if bound == 0:
        raise OSError(f"cannot listen on {address}")
    await server.start()
