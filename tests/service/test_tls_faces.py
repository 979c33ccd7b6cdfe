"""The public ports over TLS: REST and gRPC of a real router, with real certificates."""

import asyncio
import contextlib
import shutil
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import grpc.aio
import httpx
import pytest

from router.app import Router
from router.config import ConfigError, GroupSpec, Settings
from router.v1 import router_pb2 as pb
from router.v1.router_pb2_grpc import InferenceStub
from tests.service.certs import Authority, client_context, client_credentials, options
from tests.service.fakes import PATIENCE_S, until
from tests.service.test_rest_router import House, house_in
from tls.files import Files

SHORT = {"inputs": "x", "parameters": {"max_new_tokens": 3}}
ENDLESS = {"inputs": "x", "parameters": {"max_new_tokens": 5000}}


def port_of(house: House) -> int:
    return int(house.url.rpartition(":")[2])


@asynccontextmanager
async def client_of(
    house: House, ca: Path, own: Files | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    context = client_context(ca, own)
    url = f"https://127.0.0.1:{port_of(house)}"
    async with httpx.AsyncClient(base_url=url, verify=context, timeout=PATIENCE_S) as client:
        yield client


async def rest_answers(house: House, ca: Path, own: Files | None = None) -> bool:
    async with client_of(house, ca, own) as client:
        try:
            return (await client.post("/generate", json=SHORT)).status_code == 200
        except httpx.TransportError:
            return False


async def grpc_answers(house: House, ca: Path, own: Files | None = None) -> bool:
    credentials = client_credentials(ca, own)
    alone = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.secure_channel(house.grpc, credentials, options=alone) as channel:
        ask = pb.GenerateRequest(text="x", parameters=pb.Parameters(max_tokens=3))
        try:
            call = InferenceStub(channel).Generate(ask, timeout=PATIENCE_S)
            return len([message async for message in call]) > 0
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False


async def both(house: House, ca: Path, own: Files | None = None) -> tuple[bool, bool]:
    return await rest_answers(house, ca, own), await grpc_answers(house, ca, own)


async def shown(port: int, ca: Path, own: Files | None = None) -> bytes:
    """The certificate that a server shows on a new connection."""
    context = client_context(ca, own)
    context.set_alpn_protocols(["h2", "http/1.1"])
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    found: bytes = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    await end(writer)
    return found


async def end(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


def in_file(files: Files) -> bytes:
    """The certificate that is in a file."""
    first = files.cert.read_text().partition("-----END")[0] + "-----END CERTIFICATE-----\n"
    return ssl.PEM_cert_to_DER_cert(first)


async def test_both_ports_speak_tls_and_nothing_else(tmp_path: Path, ours: Authority) -> None:
    files = replace(ours.files("router"), ca=None)
    async with house_in(tmp_path, **options(files, "tls")) as house:
        assert await both(house, ours.ca) == (True, True)
        with pytest.raises(httpx.TransportError):
            await house.post("/generate", SHORT)
        async with grpc.aio.insecure_channel(house.grpc) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await InferenceStub(channel).ListModels(pb.ListModelsRequest(), timeout=PATIENCE_S)


async def test_clients_notice_a_server_that_is_not_the_one_they_mean(
    tmp_path: Path, ours: Authority, theirs: Authority
) -> None:
    files = replace(ours.files("router", "elsewhere.example"), ca=None)
    async with house_in(tmp_path, **options(files, "tls")) as house:
        assert await both(house, ours.ca) == (False, False)
        assert await both(house, theirs.ca) == (False, False)


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion.TLSv1")
async def test_what_is_older_than_tls_1_2_is_refused(tmp_path: Path, ours: Authority) -> None:
    files = replace(ours.files("router"), ca=None)
    async with house_in(tmp_path, **options(files, "tls")) as house:
        for port in (port_of(house), int(house.grpc.rpartition(":")[2])):
            for version in (ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2):
                context = client_context(ours.ca)
                context.minimum_version = ssl.TLSVersion.TLSv1
                context.maximum_version = version
                context.set_ciphers("ALL:@SECLEVEL=0")  # OpenSSL has older versions there alone
                context.set_alpn_protocols(["h2", "http/1.1"])
                connecting = asyncio.open_connection("127.0.0.1", port, ssl=context)
                if version == ssl.TLSVersion.TLSv1_2:
                    await end((await connecting)[1])
                else:
                    with pytest.raises((ssl.SSLError, ConnectionError)):
                        await connecting


async def test_clients_must_show_a_certificate_of_the_ca(
    tmp_path: Path, ours: Authority, theirs: Authority
) -> None:
    async with house_in(tmp_path, **options(ours.files("router"), "tls")) as house:
        assert await both(house, ours.ca) == (False, False)
        assert await both(house, ours.ca, theirs.files("client")) == (False, False)
        assert await both(house, ours.ca, ours.files("client")) == (True, True)


async def test_a_replaced_certificate_is_shown_to_new_connections(
    tmp_path: Path, ours: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    files = replace(ours.files("router"), ca=None)
    async with house_in(tmp_path, **options(files, "tls")) as house:
        ports = (port_of(house), int(house.grpc.rpartition(":")[2]))
        async with (
            client_of(house, ours.ca) as kept,
            grpc.aio.secure_channel(house.grpc, client_credentials(ours.ca)) as channel,
        ):
            assert (await kept.post("/generate", json=SHORT)).status_code == 200
            stub, ask = InferenceStub(channel), pb.ListModelsRequest()
            await stub.ListModels(ask, timeout=PATIENCE_S)
            for _ in range(2):
                former = in_file(files)
                assert [await shown(port, ours.ca) for port in ports] == [former, former]
                ours.renew(files)
                renewed = in_file(files)
                assert [await shown(port, ours.ca) for port in ports] == [renewed, renewed]
                assert renewed != former
            assert await both(house, ours.ca) == (True, True)

            shutil.copy(ours.files("other").key, files.key)
            assert [await shown(port, ours.ca) for port in ports] == [renewed, renewed]
            assert await both(house, ours.ca) == (True, True)
            # Connections that were there before go on.
            assert (await kept.post("/generate", json=SHORT)).status_code == 200
            await stub.ListModels(ask, timeout=PATIENCE_S)
    warnings = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert warnings == [
        f"private key {files.key} is not that of {files.cert}; the former certificate stays in use"
    ]


async def test_a_replaced_ca_forgets_the_clients_of_the_former(
    tmp_path: Path, ours: Authority, theirs: Authority
) -> None:
    clients = tmp_path / "clients.pem"
    shutil.copy(ours.ca, clients)
    files = ours.files("router", ca=clients)
    async with house_in(tmp_path, **options(files, "tls")) as house:
        own, foreign = ours.files("client"), theirs.files("client")
        assert await both(house, ours.ca, own) == (True, True)
        assert await both(house, ours.ca, foreign) == (False, False)
        shutil.copy(theirs.ca, clients)
        assert await both(house, ours.ca, own) == (False, False)
        assert await both(house, ours.ca, foreign) == (True, True)


async def test_a_client_that_leaves_is_noticed(tmp_path: Path, ours: Authority) -> None:
    files = replace(ours.files("router"), ca=None)
    async with (
        house_in(tmp_path, **options(files, "tls")) as house,
        client_of(house, ours.ca) as client,
    ):
        async with client.stream("POST", "/generate_stream", json=ENDLESS) as answer:
            async for _ in answer.aiter_lines():
                break
        await until(house.idle)


async def test_the_end_does_not_wait_for_clients_that_say_nothing(
    tmp_path: Path, ours: Authority
) -> None:
    """One would be told that the connection ends, and never answer."""
    files = replace(ours.files("router"), ca=None)
    stack = contextlib.AsyncExitStack()
    house = await stack.enter_async_context(house_in(tmp_path, **options(files, "tls")))
    context = client_context(ours.ca)
    _, silent = await asyncio.open_connection("127.0.0.1", port_of(house), ssl=context)
    silent.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    silent.transport.pause_reading()
    _, rude = await asyncio.open_connection("127.0.0.1", port_of(house))
    try:
        async with asyncio.timeout(PATIENCE_S / 2):
            await stack.aclose()
    finally:
        for writer in (silent, rude):
            writer.transport.abort()
            await end(writer)


async def test_files_that_cannot_be_used_end_it_before_it_listens(
    tmp_path: Path, ours: Authority
) -> None:
    files = replace(ours.files("router"), key=tmp_path / "none")
    with pytest.raises(ConfigError, match="private key file"):
        Router(Settings(**options(files, "tls")), [GroupSpec("g", None, ("unix:///none",))])
