"""``roundhouse gateway``: the REST faces in a process of their own, before a router elsewhere."""

import socket
from typing import Any

import click

from deploy.options import (
    CLUSTER,
    ROUTER,
    SectionedCommand,
    UserError,
    option,
    some_router_options,
)
from deploy.running import run
from router.config import ConfigError, is_address
from router.options import LISTEN, settings_from
from shards.interrupts import quietly
from shards.service_manager import ServiceManager


@click.command(cls=SectionedCommand)
@option(
    ROUTER, "--router", metavar="HOST:PORT", required=True,
    help="The router's gRPC address: its host and --grpc-port, or its --cluster-port.",
)  # fmt: skip
@option(
    ROUTER, "--router-api-key", metavar="KEY",
    help="What the router's --api-key says. --api-key is what clients of this gateway must send.",
)  # fmt: skip
@option(
    LISTEN, "--reuse-port/--exclusive-port", default=True, show_default=True, envvar="REUSE_PORT",
    help="Share the port with other gateways of this user, or be the only one there.",
)  # fmt: skip
@option(
    LISTEN, "--own-port", type=click.IntRange(1, 65_535), metavar="PORT",
    help="A second port, of this gateway alone: for its /metrics, where it shares the first.",
)  # fmt: skip
@some_router_options(
    *("hostname", "port", "api-key", "cors-allow-origin"),
    *("tls-cert", "tls-key", "tls-client-ca", *CLUSTER),
    *("graceful-termination-timeout", "json-output", "log-level"),
    *("otlp-endpoint", "otlp-service-name"),
)
def gateway(
    router: str, router_api_key: str | None, reuse_port: bool, own_port: int | None, **options: Any
) -> None:
    """Serve REST before a router that runs elsewhere.

    The gateway parses, tokenises and writes answers, for which a busy router would have less time;
    the router goes on to schedule, and serves its own ports as well. Limits of requests are the
    router's. Start as many gateways as there are cores to spare: they share one port.

    \b
    Examples:
      roundhouse gateway --router gpu1:50051
      roundhouse gateway --router gpu1:50051 --port 8080 --api-key SECRET
      roundhouse gateway --router gpu1:50052 \\
          --cluster-ca ca.pem --cluster-cert web1.pem --cluster-key web1.key
      for i in 1 2 3 4; do roundhouse gateway --router localhost:50051 --port 8080 & done
    """
    if not is_address(router):
        raise UserError(f"--router must be host:port, not {router!r}")
    try:
        # A gateway has no port of gRPC, so its port of REST may be any.
        settings = settings_from({**options, "grpc_port": 0})
    except ConfigError as error:
        raise UserError(str(error)) from error
    with quietly():
        from deploy.console import Console, Urls
        from router.gateway import serve

    console = Console(as_json=settings.json_output, manager=ServiceManager.taken())
    listeners = [_listener(settings.host, settings.port, reuse_port, "--port")]
    if own_port is not None:
        listeners.append(_listener(settings.host, own_port, False, "--own-port"))

    def ready(port: int) -> None:
        urls = Urls.of(settings.host, port, None, tls=settings.tls is not None)
        console.ready(urls, "", settings.api_key, certificate=bool(settings.tls_client_ca))

    run(serve(settings, router, router_api_key, listeners, ready, console.stopping))


def _listener(host: str, port: int, reuse_port: bool, option_name: str) -> socket.socket:
    from router.faces import listen

    try:
        return listen(host, port, reuse_port=reuse_port)
    except OSError as error:
        hint = f"choose another port with {option_name}, or another address with --hostname"
        raise UserError(f"{error}; {hint}") from error
