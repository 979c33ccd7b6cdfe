"""Certificates and keys in files: what is wrong with them in a line, and what replaces them."""

import subprocess
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from router.config import ConfigError, Settings
from router.identities import Identities, check_files
from tests.service.certs import Authority, fail, options
from tls.files import Files, TlsError, exposed, incomplete, read
from tls.identity import Identity
from tls.wire import stays_here


def told(files: Files) -> str:
    with pytest.raises(TlsError) as caught:
        read(files)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_read_is_named(ours: Authority, tmp_path: Path) -> None:
    files, none = ours.files("a"), tmp_path / "none.pem"
    assert told(replace(files, cert=none)) == f"certificate file {none}: No such file or directory"
    assert told(replace(files, key=none)) == f"private key file {none}: No such file or directory"
    assert told(replace(files, ca=none)) == f"CA file {none}: No such file or directory"
    assert told(replace(files, key=tmp_path)) == f"private key file {tmp_path}: Is a directory"


def test_what_holds_something_else_is_named(ours: Authority, tmp_path: Path) -> None:
    files, junk = ours.files("a"), tmp_path / "junk.pem"
    for content in (b"", b"\xff\x00", b"-----BEGIN CERTIFICATE-----\nAAAA\n"):
        junk.write_bytes(content)
        assert told(replace(files, cert=junk)).startswith(f"certificate file {junk} holds no")
        assert told(replace(files, key=junk)).startswith(f"private key file {junk} holds no")
        assert told(replace(files, ca=junk)).startswith(f"CA file {junk} holds no")
    assert told(replace(files, cert=files.key)).startswith(f"certificate file {files.key} holds no")
    assert told(replace(files, ca=files.key)).startswith(f"CA file {files.key} holds no")
    junk.write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    assert told(replace(files, key=junk)).startswith(f"certificate {files.cert} with key {junk}: ")


def test_bundles_may_name_their_certificates_in_any_script(ours: Authority) -> None:
    files = ours.files("a")
    for path in (files.cert, ours.ca):
        path.write_bytes("Grüße, 証明書\n".encode() + path.read_bytes())
    assert read(files).ca == ours.ca.read_bytes()


def test_a_key_of_another_certificate_is_named(ours: Authority) -> None:
    one, other = ours.files("a"), ours.files("b")
    assert told(replace(one, key=other.key)) == f"private key {other.key} is not that of {one.cert}"


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        (("ed25519",), "Ed25519"),
        (("ed448",), "Ed448"),
        (("ec", "-pkeyopt", "ec_paramgen_curve:secp521r1"), "the curve P-521"),
        (("ec", "-pkeyopt", "ec_paramgen_curve:secp384r1"), ""),
        (("rsa:2048",), ""),
    ],
)
def test_keys_that_grpc_does_not_take_are_refused_by_name(
    tmp_path: Path, algorithm: tuple[str, ...], name: str
) -> None:
    files = Files(tmp_path / "a.pem", tmp_path / "a.key", None)
    made = ("-keyout", str(files.key), "-out", str(files.cert), "-subj", "/CN=a")
    subprocess.run(
        ["openssl", "req", "-x509", "-nodes", "-newkey", *algorithm, *made],
        check=True,
        capture_output=True,
    )
    if name:
        assert f"{files.cert} has a key of {name}, which gRPC does not take" in told(files)
    else:
        assert read(files).ca is None


def test_a_key_with_a_passphrase_is_refused(ours: Authority, tmp_path: Path) -> None:
    files, locked = ours.files("a"), tmp_path / "locked.key"
    subprocess.run(
        ["openssl", "pkey", "-in", files.key, "-out", locked, "-aes256", "-passout", "pass:secret"],
        check=True,
        capture_output=True,
    )
    assert told(replace(files, key=locked)).startswith(
        f"private key file {locked} has a passphrase"
    )


def test_a_key_that_others_may_read_is_a_warning(ours: Authority) -> None:
    files, warnings = ours.files("a"), list[str]()
    Identity(files, fail)
    assert exposed(files.key) is None
    files.key.chmod(0o640)  # as secrets of Kubernetes are for a group
    Identity(files, fail)
    files.key.chmod(0o644)
    Identity(files, warnings.append)
    (warning,) = warnings
    assert str(files.key) in warning
    assert "644" in warning
    assert "chmod 600" in warning


def test_replaced_files_are_used_and_unusable_ones_are_told_once(ours: Authority) -> None:
    files, warnings = ours.files("a"), list[str]()
    identity = Identity(files, warnings.append)
    first = identity.current()
    assert identity.current() is first
    ours.renew(files)
    second = identity.current()
    assert second.cert == files.cert.read_bytes() != first.cert
    assert identity.current() is second
    assert warnings == []

    other = ours.files("b")
    other.key.replace(files.key)
    assert identity.current() is second
    assert identity.current() is second
    assert warnings == [
        f"private key {files.key} is not that of {files.cert}; the former certificate stays in use"
    ]
    files.key.unlink()
    assert identity.current() is second
    assert warnings[1:] == [
        f"private key file {files.key}: No such file or directory; the former certificate stays in "
        "use"
    ]
    ours.renew(files)
    assert identity.current().key == files.key.read_bytes()
    assert len(warnings) == 2


def test_the_ca_may_be_replaced_alone(ours: Authority, tmp_path: Path) -> None:
    files = ours.files("a")
    identity = Identity(files, fail)
    before = identity.current()
    Authority(tmp_path, "theirs").ca.replace(ours.ca)
    after = identity.current()
    assert after.cert == before.cert
    assert after.ca == ours.ca.read_bytes() != before.ca


@pytest.mark.parametrize(
    ("given", "faults"),
    [
        ({"tls_cert": "a"}, ["tls_cert and tls_key go together: tls_key is missing"]),
        ({"tls_key": "a"}, ["tls_cert and tls_key go together: tls_cert is missing"]),
        (
            {"tls_client_ca": "a"},
            ["tls_cert, tls_key and tls_client_ca go together: tls_cert and tls_key are missing"],
        ),
        (
            {"cluster_ca": "a", "cluster_key": "b"},
            ["cluster_ca, cluster_cert and cluster_key go together: cluster_cert is missing"],
        ),
        ({"cluster_port": 1}, ["cluster_port needs cluster_ca, cluster_cert and cluster_key"]),
        (
            {"cluster_port": 3000, "cluster_ca": "a", "cluster_cert": "b", "cluster_key": "c"},
            ["port and cluster_port must be two different TCP ports, not both 3000"],
        ),
    ],
)
def test_half_of_what_goes_together_is_refused_by_name(
    given: dict[str, Any], faults: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings(**given)
    assert list(caught.value.faults) == faults


def test_all_or_nothing_is_complete() -> None:
    assert incomplete({"a": None, "b": ""}) is None
    assert incomplete({"a": "x", "b": "y"}) is None
    assert incomplete({"a": "x", "b": None}) == "a and b go together: b is missing"


def test_settings_without_files_are_of_nobody() -> None:
    settings = Settings()
    assert (settings.tls, settings.cluster) == (None, None)
    assert Identities.of(settings) == Identities(None, None)


def test_every_fault_of_the_files_is_told(ours: Authority, tmp_path: Path) -> None:
    tls, cluster = ours.files("a"), ours.files("b")
    sound = Settings(**options(tls, "tls"), **options(cluster, "cluster"))
    assert (sound.tls, sound.cluster) == (tls, replace(cluster, cluster=True))
    check_files(sound)
    none = tmp_path / "none"
    with pytest.raises(ConfigError) as caught:
        check_files(replace(sound, tls_key=str(none), cluster_ca=str(none)))
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [
        f"private key file {none}",
        f"CA file {none}",
    ]


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("unix:///tmp/a.sock", True),
        ("127.0.0.1:50061", True),
        ("[::1]:50061", True),
        ("localhost:50061", True),
        ("0.0.0.0:50061", False),
        ("[::]:50061", False),
        ("10.0.0.7:50061", False),
        ("gpu1:50061", False),
    ],
)
def test_who_can_reach_an_address(address: str, here: bool) -> None:
    assert stays_here(address) == here


# A member of a cluster ---------------------------------------------------------------------------


def warnings_of(files: Files) -> list[str]:
    """What a process is told that shows these files to its cluster."""
    warnings: list[str] = []
    Identity(replace(files, cluster=True), warnings.append)
    return warnings


def test_a_member_whom_its_own_ca_believes_is_told_nothing(ours: Authority) -> None:
    assert warnings_of(ours.files("a")) == []


def test_a_member_whom_its_own_ca_does_not_believe_is_told_why(
    ours: Authority, theirs: Authority
) -> None:
    stranger = ours.files("a", ca=theirs.ca)
    (warning,) = warnings_of(stranger)
    assert warning.startswith(f"certificate {stranger.cert}: ")
    assert "issuer" in warning
    assert str(theirs.ca) in warning
    old = ours.files("b")
    ours.renew(old, not_after=datetime(2020, 1, 1, tzinfo=UTC))
    (warning,) = warnings_of(old)
    assert "certificate has expired" in warning
    assert "\n" not in warning


def test_who_is_in_no_cluster_may_be_of_any_ca(ours: Authority, theirs: Authority) -> None:
    Identity(ours.files("a", ca=theirs.ca), fail)


def test_a_member_is_told_of_each_certificate_that_comes(ours: Authority) -> None:
    files = ours.files("a")
    warnings: list[str] = []
    identity = Identity(replace(files, cluster=True), warnings.append)
    ours.renew(files, not_after=datetime(2020, 1, 1, tzinfo=UTC))
    identity.current()
    identity.current()
    assert len(warnings) == 1
    ours.renew(files)
    identity.current()
    assert len(warnings) == 1
