"""The manifests: what Kubernetes takes, what the command line takes, and names that meet."""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import kubernetes_validate
import pytest
import yaml

from shards.config import GRACEFUL_TERMINATION_TIMEOUT_S
from tests.operations.commands import read, unknown
from tests.operations.test_container import said, variables
from tests.operations.test_monitoring import FOLDER
from tests.operations.test_units import CLOSING_S
from tests.system.server import end, eventually
from tests.system.test_gateway import free_port

# The first in which a probe by gRPC needs no switch, and the latest whose schemas are here.
VERSIONS = ("1.27", kubernetes_validate.latest_version())
MANIFESTS = FOLDER / "kubernetes"
KUSTOMIZATION = yaml.safe_load((MANIFESTS / "kustomization.yaml").read_text())
ALL: list[dict[str, Any]] = [
    one
    for name in KUSTOMIZATION["resources"]
    for one in yaml.safe_load_all((MANIFESTS / name).read_text())
]


def of(kind: str) -> dict[str, dict[str, Any]]:
    """All objects of a kind, by name."""
    return {one["metadata"]["name"]: one for one in ALL if one["kind"] == kind}


WORKLOADS = of("Deployment") | of("StatefulSet")
PODS = {name: one["spec"]["template"]["spec"] for name, one in WORKLOADS.items()}


def container(name: str) -> dict[str, Any]:
    """The only container of a workload."""
    (only,) = PODS[name]["containers"]
    found: dict[str, Any] = only
    return found


def environment(name: str) -> dict[str, str]:
    """Its variables; what comes from a secret is some text."""
    return {one["name"]: one.get("value", "secret") for one in container(name)["env"]}


def given(name: str) -> dict[str, object]:
    """What the command line takes its arguments and variables for."""
    return read(container(name)["args"], environment(name))


def ports(name: str) -> dict[str, int]:
    """The container's ports by name."""
    return {one["name"]: one["containerPort"] for one in container(name)["ports"]}


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(version: str) -> None:
    assert len(ALL) == 10
    for one in ALL:
        kubernetes_validate.validate(one, version, strict=True)
    broken = ALL[0] | {"spec": ALL[0]["spec"] | {"replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(broken, version, strict=True)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_container_starts_what_the_command_line_takes(name: str) -> None:
    command = container(name)["args"][0]
    assert not unknown(environment(name), command)
    assert given(name)
    assert container(name)["image"] == KUSTOMIZATION["images"][0]["name"]


def test_addresses_meet() -> None:
    workers, router, gateway = (f"roundhouse-{one}" for one in ("worker", "router", "gateway"))
    spec, services = WORKLOADS[workers]["spec"], of("Service")
    port = ports(workers)["worker"]
    assert given(workers)["listen"] == f"0.0.0.0:{port}"
    assert given(router)["workers"] == tuple(
        f"{workers}-{number}.{spec['serviceName']}:{port}" for number in range(spec["replicas"])
    )
    assert services[spec["serviceName"]]["spec"]["clusterIP"] == "None"
    (grpc,) = (one for one in services[router]["spec"]["ports"] if one["name"] == "grpc")
    assert given(gateway)["router"] == f"{router}:{grpc['port']}"
    assert given(router)["grpc_port"] == ports(router)[grpc["targetPort"]]
    assert given(gateway)["router_api_key"] == given(router)["api_key"] is not None


@pytest.mark.parametrize("name", ["roundhouse-router", "roundhouse-gateway"])
def test_the_port_of_rest_is_the_one_that_is_asked(name: str) -> None:
    assert given(name)["port"] == ports(name)["rest"]
    notes = WORKLOADS[name]["spec"]["template"]["metadata"]["annotations"]
    assert notes["prometheus.io/port"] == str(ports(name)["rest"])


def test_selectors_find_their_pods() -> None:
    labels = {
        name: one["spec"]["template"]["metadata"]["labels"].items()
        for name, one in WORKLOADS.items()
    }
    for selector in selectors():
        found = [name for name, owned in labels.items() if selector.items() <= owned]
        assert len(found) == 1, selector
    for service in of("Service").values():
        (name,) = (n for n, own in labels.items() if service["spec"]["selector"].items() <= own)
        assert {one["targetPort"] for one in service["spec"]["ports"]} <= ports(name).keys()


def selectors() -> Iterator[dict[str, str]]:
    """What chooses pods, but for all of a namespace."""
    for one in ALL:
        spec = one["spec"]
        match one["kind"]:
            case "Service":
                yield spec["selector"]
            case "NetworkPolicy":
                yield spec["podSelector"]["matchLabels"]
                sources = [source for rule in spec["ingress"] for source in rule.get("from", ())]
                chosen = (source["podSelector"].get("matchLabels") for source in sources)
                yield from filter(None, chosen)
            case _:
                yield spec["selector"]["matchLabels"]


@pytest.mark.parametrize("name", PODS)
def test_a_pod_may_finish_what_is_open(name: str) -> None:
    stop = container(name).get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
    before_s = float(stop[1]) if stop else 0.0
    enough_s = before_s + GRACEFUL_TERMINATION_TIMEOUT_S + CLOSING_S
    assert PODS[name]["terminationGracePeriodSeconds"] >= enough_s


@pytest.mark.parametrize("name", PODS)
def test_a_pod_is_nobody_and_writes_where_it_may(name: str) -> None:
    pod, only = PODS[name], container(name)
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert said("USER") == [str(pod["securityContext"]["runAsUser"])]
    assert only["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert only["securityContext"]["readOnlyRootFilesystem"] is True
    mounted = {one["mountPath"] for one in only["volumeMounts"]}
    assert variables()["HOME"] in mounted
    if name == "roundhouse-worker":
        assert variables()["HF_HUB_CACHE"] in mounted
        assert pod["securityContext"]["fsGroup"]
    assert pod["enableServiceLinks"] is False
    assert pod["automountServiceAccountToken"] is False


def test_a_router_without_workers_is_not_ready_and_alive() -> None:
    probes = container("roundhouse-router")
    ready, alive = (probes[f"{one}Probe"]["httpGet"]["path"] for one in ("readiness", "liveness"))
    port = free_port()
    where = ("--hostname", "127.0.0.1", "--port", port, "--grpc-port", "0", "--api-key", "secret")
    command = [sys.executable, "-m", "deploy.cli", "router", "--worker", "127.0.0.1:1", *where]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, text=True)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:

            def status(path: str) -> int:
                try:
                    return client.get(path).status_code
                except httpx.TransportError:
                    return 0

            eventually(lambda: status(alive) == 200)
            assert status(ready) == 503
    finally:
        end(process)
