"""Certificates and keys as files in PEM form, read and checked before they are used."""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

# What gRPC's TLS does not take, by how it is written in a certificate (RFC 8410, RFC 5480).
_UNUSABLE = {
    bytes.fromhex("302a300506032b6570032100"): "Ed25519",
    bytes.fromhex("3043300506032b6571033a00"): "Ed448",
    bytes.fromhex("06052b81040023"): "the curve P-521",
}
_BEGIN, _END = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
# Permissions of a file for users who are neither its owner nor of its group.
_OTHERS = 0o007


class TlsError(Exception):
    """Files that cannot be used. The text is one line that names the file and says why."""


@dataclass(frozen=True, slots=True)
class Files:
    """The certificate that is shown, with those between it and its CA; its private key; and ``ca``.

    That one holds the certificates of which one must have signed what the other side shows. None:
    the other side need not show any. In a ``cluster`` the other side believes the same.
    """

    cert: Path
    key: Path
    ca: Path | None
    cluster: bool = False


@dataclass(frozen=True, slots=True)
class Material:
    """What the files hold: PEM texts, and the same as a context for servers of the ssl module."""

    cert: bytes
    key: bytes
    ca: bytes | None
    context: ssl.SSLContext


def incomplete(given: Mapping[str, object]) -> str | None:
    """Says what is missing of things that go together, by name; None if it is none or all."""
    missing = [name for name, value in given.items() if not value]
    if not missing or len(missing) == len(given):
        return None
    *names, last = given
    is_missing = "is missing" if len(missing) == 1 else "are missing"
    return f"{', '.join(names)} and {last} go together: {' and '.join(missing)} {is_missing}"


def cluster_files(ca: str | None, cert: str | None, key: str | None) -> Files | None:
    """The files of a member of a cluster; None if it is in none, as one that lacks any is."""
    return Files(Path(cert), Path(key), Path(ca), cluster=True) if ca and cert and key else None


def read(files: Files) -> Material:
    """What the files hold, if it fits together. Raises ``TlsError``."""
    cert, key = _bytes("certificate", files.cert), _bytes("private key", files.key)
    ca = None if files.ca is None else _bytes("CA", files.ca)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _show(context, files, cert, key)
    if ca is not None:
        _believe(context, files, ca)
    return Material(cert, key, ca, context)


def exposed(key: Path) -> str | None:
    """A warning if others than the owner and the group of a private key may read it, in a line."""
    try:
        mode = key.stat().st_mode & 0o777
    except OSError:
        return None
    if not mode & _OTHERS:
        return None
    return f"every user of this machine can use the private key {key} (mode {mode:o}): chmod 600 it"


def _bytes(what: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise TlsError(f"{what} file {path}: {error.strerror}") from error


def _show(context: ssl.SSLContext, files: Files, cert: bytes, key: bytes) -> None:
    """Lets the context show the certificate."""

    def no_passphrase() -> NoReturn:
        raise TlsError(f"private key file {files.key} has a passphrase: give one without")

    _check_kind(files.cert, cert)
    if b" PRIVATE KEY-----" not in key:
        raise TlsError(f"private key file {files.key} holds no private key in PEM form")
    try:
        context.load_cert_chain(files.cert, files.key, no_passphrase)
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise TlsError(f"private key {files.key} is not that of {files.cert}") from error
        cause = (error.reason or "cannot be read").replace("_", " ").lower()
        raise TlsError(f"certificate {files.cert} with key {files.key}: {cause}") from error
    except OSError as error:
        raise TlsError(f"certificate file {files.cert}: {error.strerror}") from error


def _check_kind(path: Path, cert: bytes) -> None:
    """Refuses what is no certificate, or has a key that half of the ports could not use."""
    try:
        text = cert.decode("ascii", errors="ignore")
        first = text[text.index(_BEGIN) : text.index(_END) + len(_END)]
        der = ssl.PEM_cert_to_DER_cert(first)
    except ValueError as error:
        raise TlsError(f"certificate file {path} holds no certificate in PEM form") from error
    for written, name in _UNUSABLE.items():
        if written in der:
            raise TlsError(
                f"certificate {path} has a key of {name}, which gRPC does not take: "
                "use ECDSA with P-256 or P-384, or RSA"
            )


def _believe(context: ssl.SSLContext, files: Files, ca: bytes) -> None:
    """Has the context ask for certificates, and believe those of this CA."""
    context.verify_mode = ssl.CERT_REQUIRED
    # A session that is resumed shows no certificate again, though the CA may be another by then.
    context.options |= ssl.OP_NO_TICKET
    context.num_tickets = 0
    try:  # what stands between the certificates may be in any script
        context.load_verify_locations(cadata=ca.decode("ascii", errors="ignore"))
    except (ssl.SSLError, ValueError) as error:
        raise TlsError(f"CA file {files.ca} holds no certificate in PEM form") from error
