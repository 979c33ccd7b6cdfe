"""Router and workers over TCP: both show a certificate of their cluster, or nothing is said."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from router import remote_workers
from router.app import Router
from router.change import ChangeError, Problem
from router.config import GroupSpec, Settings
from router.handshakes import mismatch
from router.link import (
    ClosedError,
    Link,
    LinkDownError,
    MistrustError,
    UnreachableError,
)
from router.remote_workers import RemoteWorkers
from tests.service.certs import Authority, options
from tests.service.fakes import Bench, bench_in, until
from tests.service.test_rest_router import house_in
from tls.identity import Identity

TCP = "127.0.0.1:0"
CAN = Settings(host="127.0.0.1", port=0, grpc_port=0)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with bench_in(tmp_path) as bench:
        yield bench


async def refusal(address: str, cluster: Identity | None) -> LinkDownError:
    """Why a router with this identity cannot speak with a worker."""
    link = Link(address, 1, cluster)
    try:
        with pytest.raises(LinkDownError) as caught:
            await link.describe()
    finally:
        await link.close()
    assert str(caught.value).startswith(f"{address}: ")
    assert "\n" not in str(caught.value)
    return caught.value


async def test_requests_go_to_workers_over_tls(tmp_path: Path, ours: Authority) -> None:
    worker = {"at": TCP, "cluster": ours.identity("worker")}
    async with house_in(tmp_path, worker, **options(ours.files("head"), "cluster")) as house:
        assert len(await house.text_of("x", 20)) > 0
        await until(house.idle)
        # Its socket understands nothing else.
        address = house.bench.worker("w").address
        assert isinstance(await refusal(address, None), ClosedError)


async def test_sockets_of_one_machine_stay_as_they_are(tmp_path: Path, ours: Authority) -> None:
    worker = {"cluster": ours.identity("worker")}
    async with house_in(tmp_path, worker, **options(ours.files("head"), "cluster")) as house:
        assert len(await house.text_of("x", 20)) > 0
        link = Link(house.bench.address("w"), 1)
        await link.describe()
        await link.close()


async def test_a_worker_of_another_ca_is_not_believed(
    bench: Bench, ours: Authority, theirs: Authority
) -> None:
    address = await bench.start("w", at=TCP, cluster=theirs.identity("worker", ca=ours.ca))
    failure = await refusal(address, ours.identity("head"))
    assert isinstance(failure, MistrustError)
    assert "its certificate is not by the CA in --cluster-ca" in str(failure)


async def test_a_worker_does_not_believe_a_router_of_another_ca(
    bench: Bench, ours: Authority, theirs: Authority
) -> None:
    address = await bench.start("w", at=TCP, cluster=ours.identity("worker"))
    failure = await refusal(address, theirs.identity("head", ca=ours.ca))
    assert isinstance(failure, ClosedError)
    assert "it may not accept the certificate in --cluster-cert" in str(failure)
    assert bench.engines["w"].begun == 0


async def test_a_router_without_a_certificate_is_told_what_to_give(
    bench: Bench, ours: Authority
) -> None:
    address = await bench.start("w", at=TCP, cluster=ours.identity("worker"))
    failure = await refusal(address, None)
    assert isinstance(failure, ClosedError)
    assert "it may expect --cluster-ca, --cluster-cert and --cluster-key" in str(failure)


async def test_a_worker_without_a_certificate_is_not_spoken_with(
    bench: Bench, ours: Authority
) -> None:
    address = await bench.start("w", at=TCP)
    failure = await refusal(address, ours.identity("head"))
    assert isinstance(failure, MistrustError)
    assert "it does not speak TLS" in str(failure)


async def test_a_worker_on_another_host_than_it_says_is_not_believed(
    bench: Bench, ours: Authority
) -> None:
    address = await bench.start("w", at=TCP, cluster=ours.identity("worker", "gpu1"))
    failure = await refusal(address, ours.identity("head"))
    assert isinstance(failure, MistrustError)
    assert "other host names and addresses" in str(failure)


async def test_an_expired_certificate_is_called_that(bench: Bench, ours: Authority) -> None:
    files = ours.files("worker")
    ours.renew(files, not_after=datetime.now(UTC))
    address = await bench.start("w", at=TCP, cluster=Identity(files, print))
    failure = await refusal(address, ours.identity("head"))
    assert isinstance(failure, MistrustError)
    assert "its certificate is refused (certificate has expired)" in str(failure)


@pytest.mark.parametrize(
    ("details", "told"),
    [
        ("Peer name 10.0.0.7 is not in peer certificate", "other host names"),
        ("Ssl handshake failed: ... CERTIFICATE_VERIFY_FAILED: self signed certificate", "not by"),
        ("Tls handshake failed (TSI_PROTOCOL_FAILURE)", "no TLS with it: tls handshake failed"),
        ("Failed to create security handshaker.", "no TLS with it"),
        ("Failed to connect to remote host: Connection refused", None),
    ],
)
def test_what_other_releases_of_grpc_say_is_understood(details: str, told: str | None) -> None:
    found = mismatch(f"failed to connect; last error: UNKNOWN: {details}", encrypted=True)
    if told is None:
        assert found is None
    else:
        assert found is not None
        assert found.certain
        assert told in found.text


async def test_where_nobody_is_nothing_is_said_of_certificates(
    bench: Bench, ours: Authority
) -> None:
    address = await bench.start("w", at=TCP)
    await bench.kill("w")
    for cluster in (None, ours.identity("head")):
        failure = await refusal(address, cluster)
        assert type(failure) is UnreachableError
        assert "nobody can be reached there" in str(failure)


async def test_ranks_on_two_addresses_are_one_group(bench: Bench, ours: Authority) -> None:
    addresses = [
        await bench.start(
            f"rank{rank}", at=TCP, rank=rank, world=2, cluster=ours.identity(f"rank{rank}")
        )
        for rank in (1, 0)
    ]
    settings = replace(CAN, **options(ours.files("head"), "cluster"))
    async with Router(settings, [GroupSpec("g", None, tuple(addresses))]) as router:
        await router.fleet.wait_ready()
        assert router.fleet.groups_up() == {"g": True}


async def test_one_rank_that_is_not_believed_keeps_the_group_down(
    bench: Bench, ours: Authority, theirs: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    one = await bench.start("one", at=TCP, rank=0, world=2, cluster=ours.identity("one"))
    foreign = theirs.files("other", ca=ours.ca)
    shown = Identity(foreign, print)
    other = await bench.start("other", at=TCP, rank=1, world=2, cluster=shown)
    settings = replace(CAN, **options(ours.files("head"), "cluster"))
    async with Router(settings, [GroupSpec("g", None, (one, other))]) as router:
        await until(lambda: "group g is down" in caplog.text)
        await until(lambda: bench_saw(router, 3))
        assert caplog.text.count("its certificate is not by the CA") == 1
        assert f"{other}: its certificate" in caplog.text
        # Once it has a certificate of the cluster, nothing needs to be started again.
        ours.renew(foreign)
        await router.fleet.wait_ready()


def bench_saw(router: Router, attempts: int) -> bool:
    """Whether the only group has paused so often, each time longer."""
    pause_s = router.groups._groups["g"]._backoff._next_s
    return bool(pause_s > 0.05 * 1.6 ** (attempts - 1))


async def test_groups_are_added_over_tls(bench: Bench, ours: Authority) -> None:
    first = await bench.start("first", at=TCP, cluster=ours.identity("first"))
    settings = replace(CAN, **options(ours.files("head"), "cluster"))
    async with Router(settings, [GroupSpec("g", None, (first,))]) as router:
        await router.fleet.wait_ready()
        second = await bench.start("second", at=TCP, cluster=ours.identity("second"))
        workers = RemoteWorkers(1, router.identities.cluster)
        spec = await workers.start(second, lambda *_: None)
        router.groups.add(spec)
        await router.groups.wait_up(spec.name)
        assert router.fleet.groups_up() == {"g": True, "group-1": True}


async def test_a_group_that_is_not_believed_is_not_added(
    bench: Bench, ours: Authority, theirs: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = await bench.start("w", at=TCP, cluster=theirs.identity("worker", ca=ours.ca))
    with pytest.raises(ChangeError, match="not by the CA in --cluster-ca") as caught:
        await RemoteWorkers(1, ours.identity("head")).start(address, lambda *_: None)
    assert caught.value.problem is Problem.IMPOSSIBLE
    # It might be one that is just starting behind a proxy; so this is found out later.
    monkeypatch.setattr(remote_workers, "REACH_S", 0.1)
    with pytest.raises(ChangeError, match="it may expect --cluster-ca"):
        await RemoteWorkers(1).start(address, lambda *_: None)


async def test_two_authorities_in_one_file_are_both_believed(
    bench: Bench, ours: Authority, theirs: Authority, tmp_path: Path
) -> None:
    """So a cluster moves from one to the other, process by process."""
    bundle = tmp_path / "both.pem"
    bundle.write_bytes(ours.ca.read_bytes() + theirs.ca.read_bytes())
    for name, worker, head in (("one", ours, theirs), ("two", theirs, ours)):
        address = await bench.start(name, at=TCP, cluster=worker.identity(name, ca=bundle))
        link = Link(address, 1, head.identity("head", ca=bundle))
        await link.describe()
        await link.close()


async def test_a_router_reconnects_with_what_its_files_hold_by_then(
    bench: Bench, ours: Authority, theirs: Authority
) -> None:
    """The whole cluster moves to another CA; only workers start again."""
    address = await bench.start("w", at=TCP, cluster=ours.identity("worker"))
    files = ours.files("head")
    settings = replace(CAN, **options(files, "cluster"))
    async with Router(settings, [GroupSpec("g", None, (address,))]) as router:
        await router.fleet.wait_ready()
        theirs.renew(files)
        theirs.ca.replace(ours.ca)
        assert router.fleet.groups_up() == {"g": True}  # what is connected stays so
        await bench.kill("w")
        await until(lambda: not router.fleet.groups_up()["g"])
        await bench.start("w", at=address, cluster=theirs.identity("worker", ca=ours.ca))
        await router.fleet.wait_ready()
