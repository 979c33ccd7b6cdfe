"""Authorities that sign certificates, and files with these, as tests use them."""

import ssl
from datetime import datetime
from pathlib import Path

import grpc
import trustme

from tls.files import Files
from tls.identity import Identity

HOSTS = ("localhost", "127.0.0.1")


class Authority:
    """A CA of its own, whose certificate is ``ca``, and the files of those it vouches for."""

    def __init__(self, folder: Path, name: str) -> None:
        self._ca = trustme.CA(organization_name=name)
        self._folder = folder
        self._name = name
        self.ca = folder / f"{name}-ca.pem"
        self._ca.cert_pem.write_to_path(self.ca)

    def files(self, name: str, *hosts: str, ca: Path | None = None) -> Files:
        """A certificate and key; with ``ca`` in place of this one to be believed."""
        prefix = f"{self._name}-{name}"
        files = Files(self._folder / f"{prefix}.pem", self._folder / f"{prefix}.key", ca or self.ca)
        self.renew(files, *hosts)
        return files

    def renew(self, files: Files, *hosts: str, not_after: datetime | None = None) -> None:
        """Puts another certificate of this CA into the files, and its key."""
        issued = self._ca.issue_cert(*(hosts or HOSTS), not_after=not_after)
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        for path, content in ((files.key, issued.private_key_pem.bytes()), (files.cert, chain)):
            fresh = path.with_suffix(".new")
            fresh.touch(mode=0o600)
            fresh.write_bytes(content)
            fresh.replace(path)

    def identity(self, name: str, *hosts: str, ca: Path | None = None) -> Identity:
        """What a process shows, and whom it believes."""
        return Identity(self.files(name, *hosts, ca=ca), fail)


def fail(warning: str) -> None:
    """For who expects no warning."""
    raise AssertionError(warning)


def options(files: Files, kind: str) -> dict[str, str]:
    """The files as settings: of the public ports (``tls``) or of the ``cluster``."""
    ca = "tls_client_ca" if kind == "tls" else "cluster_ca"
    given = {f"{kind}_cert": files.cert, f"{kind}_key": files.key, ca: files.ca}
    return {name: str(path) for name, path in given.items() if path is not None}


def flags(files: Files, kind: str) -> list[str]:
    """The same on a command line."""
    given = options(files, kind).items()
    return [text for name, path in given for text in (f"--{name.replace('_', '-')}", path)]


def client_context(ca: Path, own: Files | None = None) -> ssl.SSLContext:
    """What a client of REST believes, and shows."""
    context = ssl.create_default_context(cafile=str(ca))
    if own is not None:
        context.load_cert_chain(own.cert, own.key)
    return context


def client_credentials(ca: Path, own: Files | None = None) -> grpc.ChannelCredentials:
    """The same for gRPC."""
    if own is None:
        return grpc.ssl_channel_credentials(ca.read_bytes())
    return grpc.ssl_channel_credentials(
        ca.read_bytes(), own.key.read_bytes(), own.cert.read_bytes()
    )
