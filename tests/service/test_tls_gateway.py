"""Gateways before a router over TLS: at the port of the cluster, or at the public port of gRPC."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import httpx
import pytest

from router.app import Router
from router.config import ConfigError, GroupSpec, Settings
from router.faces import Faces, _free_port, listen
from router.v1 import gateway_pb2 as pb
from router.v1.gateway_pb2_grpc import GatewayStub
from tests.service.certs import Authority, client_context, client_credentials, options
from tests.service.fakes import PATIENCE_S, until
from tests.service.gateways import gateway_before
from tests.service.test_rest_router import house_in

SHORT = {"inputs": "x", "parameters": {"max_new_tokens": 20}}


class Cluster:
    """The port of a router for gateways, and its settings."""

    def __init__(self, ours: Authority) -> None:
        self.port = _free_port("127.0.0.1")
        self.address = f"127.0.0.1:{self.port}"
        self.settings: dict[str, Any] = {
            "cluster_port": self.port,
            **options(ours.files("head"), "cluster"),
        }


async def refusal(router: str, **settings: Any) -> str:
    """Why a gateway ends at its start."""
    with pytest.raises(ConfigError) as caught:
        async with asyncio.timeout(PATIENCE_S), gateway_before(router, **settings):
            raise AssertionError("it was taken")
    return str(caught.value)


async def test_a_gateway_attaches_by_its_certificate_and_serves_https(
    tmp_path: Path, ours: Authority
) -> None:
    cluster = Cluster(ours)
    public = replace(ours.files("web"), ca=None)
    own = options(ours.files("gateway"), "cluster") | options(public, "tls")
    async with (
        house_in(tmp_path, **cluster.settings) as house,
        gateway_before(cluster.address, **own) as (_, port),
        httpx.AsyncClient(verify=client_context(ours.ca), timeout=PATIENCE_S) as client,
    ):
        answer = await client.post(f"https://127.0.0.1:{port}/generate", json=SHORT)
        assert answer.json() == (await house.post("/generate", SHORT)).json()
        await until(house.idle)


async def test_the_key_is_still_asked_for(tmp_path: Path, ours: Authority) -> None:
    cluster, own = Cluster(ours), options(ours.files("gateway"), "cluster")
    async with house_in(tmp_path, api_key="inner", **cluster.settings):
        assert "--router-api-key" in await refusal(cluster.address, **own)
        async with gateway_before(cluster.address, router_key="inner", **own) as (gateway, _):
            assert gateway.ready.is_set()


async def test_the_public_port_takes_no_gateways_beside_a_cluster(
    tmp_path: Path, ours: Authority
) -> None:
    """Its clients are not taken at their word."""
    cluster = Cluster(ours)
    async with house_in(tmp_path, **cluster.settings) as house:
        assert "takes them at its --cluster-port alone" in await refusal(house.grpc)
        async with grpc.aio.insecure_channel(house.grpc) as channel:
            asked = GatewayStub(channel).GetTokenizer(pb.GetTokenizerRequest(sha256="0"))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asked.read()
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_gateway_of_another_ca_is_not_taken(
    tmp_path: Path, ours: Authority, theirs: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    cluster, foreign = Cluster(ours), theirs.files("gateway", ca=ours.ca)
    async with house_in(tmp_path, **cluster.settings):
        for own in (options(foreign, "cluster"), {}):
            caplog.clear()
            async with gateway_before(cluster.address, wait=False, **own) as (gateway, _):
                await until(lambda: "not attached" in caplog.text)
                assert not gateway.ready.is_set()
            told = "may not accept the certificate in --cluster-cert" if own else "may expect --cl"
            assert told in caplog.text
        async with grpc.aio.secure_channel(
            cluster.address, client_credentials(ours.ca, foreign)
        ) as channel:
            asked = GatewayStub(channel).GetTokenizer(pb.GetTokenizerRequest(sha256="0"))
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asked.read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_router_of_another_ca_ends_a_gateway_with_one_line(
    tmp_path: Path, ours: Authority, theirs: Authority
) -> None:
    cluster, own = Cluster(ours), options(theirs.files("gateway"), "cluster")
    async with house_in(tmp_path, **cluster.settings) as house:
        line = await refusal(cluster.address, **own)
        assert f"router {cluster.address}: its certificate is not by the CA" in line
        assert "it does not speak TLS" in await refusal(house.grpc, **own)


async def test_without_a_cluster_the_public_port_takes_gateways_over_tls(
    tmp_path: Path, ours: Authority
) -> None:
    """They show their certificate there as any client does, and by the key who they are."""
    own = options(ours.files("gateway"), "cluster")
    async with house_in(tmp_path, api_key="inner", **options(ours.files("router"), "tls")) as house:
        assert "--router-api-key" in await refusal(house.grpc, **own)
        async with gateway_before(house.grpc, router_key="inner", **own) as (gateway, port):
            assert gateway.ready.is_set()
            async with httpx.AsyncClient(timeout=PATIENCE_S) as client:
                answer = await client.post(f"http://127.0.0.1:{port}/generate", json=SHORT)
                assert answer.status_code == 200


async def test_a_gateway_attaches_again_by_a_replaced_certificate(
    tmp_path: Path, ours: Authority, theirs: Authority
) -> None:
    """Its own is refused, until its files hold one of the cluster."""
    cluster, files = Cluster(ours), theirs.files("gateway", ca=ours.ca)
    async with (
        house_in(tmp_path, **cluster.settings),
        gateway_before(cluster.address, wait=False, **options(files, "cluster")) as (gateway, _),
    ):
        await until(lambda: gateway._cause)
        ours.renew(files)
        await until(gateway.ready.is_set)


async def test_a_port_of_the_cluster_that_is_taken_leaves_the_others_free(
    tmp_path: Path, ours: Authority
) -> None:
    cluster = Cluster(ours)
    ports = [_free_port("127.0.0.1") for _ in range(2)]
    settings = Settings(host="127.0.0.1", port=ports[0], grpc_port=ports[1], **cluster.settings)
    async with (
        house_in(tmp_path, **cluster.settings),
        Router(settings, [GroupSpec("g", None, ("unix:///none",))]) as router,
    ):
        with pytest.raises(OSError, match=f"cannot listen on {cluster.address}"):
            await Faces.start(
                router.service, router.fleet, router.metrics, settings, router.gateways
            )
        for port in ports:
            listen("127.0.0.1", port).close()
