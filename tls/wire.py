"""gRPC's connections by an identity: what listens, and what calls.

gRPC speaks TLS 1.2 and later only, and with HTTP/2's ciphers.
"""

from ipaddress import ip_address

import grpc
import grpc.aio

from tls.files import Material
from tls.identity import Identity

NO_PROBES = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 2**20))
"""Options of both ends of a connection that lives long. To choose its windows grpc sends a ping
behind what it receives, which wakes both ends once more for each small message; windows of a MiB
need no choice."""


def listen(server: grpc.aio.Server, address: str, identity: Identity | None) -> int:
    """Binds ``host:port`` or ``unix:///path``, which needs no encryption; returns the port.

    Without an identity nothing is encrypted. Raises ``RuntimeError`` if it cannot be bound.
    """
    if identity is None or _local(address):
        return server.add_insecure_port(address)
    return server.add_secure_port(address, _server_credentials(identity))


def channel_to(
    address: str, identity: Identity | None, options: tuple[tuple[str, int], ...]
) -> grpc.aio.Channel:
    """A channel to ``host:port`` or ``unix:///path``, which needs no encryption.

    The other side must show a certificate of the identity's CA, for that host. Without an identity
    nothing is encrypted.
    """
    if identity is None or _local(address):
        return grpc.aio.insecure_channel(address, options=options)
    now = identity.current()
    credentials = grpc.ssl_channel_credentials(now.ca, now.key, now.cert)
    return grpc.aio.secure_channel(address, credentials, options=options)


def stays_here(address: str) -> bool:
    """Whether only this machine can reach what listens at an address."""
    if _local(address):
        return True
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def _local(address: str) -> bool:
    return address.startswith(("unix:", "unix-abstract:"))


def _server_credentials(identity: Identity) -> grpc.ServerCredentials:
    shown = identity.current()

    def replaced() -> grpc.ServerCertificateConfiguration | None:
        """Asked by gRPC at each new connection; None: as before."""
        nonlocal shown
        now = identity.current()
        if now is shown:
            return None
        shown = now
        return _configuration(now)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(shown),
        replaced,  # type: ignore[arg-type]  # the stubs do not know that it may be None
        require_client_authentication=shown.ca is not None,
    )


def _configuration(material: Material) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration(
        [(material.key, material.cert)], root_certificates=material.ca
    )
