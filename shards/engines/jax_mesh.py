"""JAX's devices and processes: one device for each rank, and how the ranks find each other.

JAX keeps this state once for a process, so it is set before the first computation and not again.
One private name of JAX is used, its coordination client (key-value store and barrier), for which
there is no public form; the version is pinned for that.

A rank that is gone leaves the others inside a collective that they cannot leave. JAX notices after
100 s, and on the CPU perhaps at once, by a connection that fails. The ranks watch each other
(``peers``), and whoever sees one go ends its own process.
"""

import hashlib
import os
import platform
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shards.engines.base import EngineOptions, ModelError
from shards.engines.jax_native import processor_flags
from shards.engines.peers import Peers, PeersError
from shards.engines.threads import usable_cores

AXIS = "tp"
KINDS = ("cpu", "gpu", "cuda", "rocm", "tpu")
# JAX is not told to start no other kind: it would take "gpu" for a demand that NVIDIA's and AMD's
# both start, and end "cuda" without a GPU by an assertion.
_GPUS = ("gpu", "cuda", "rocm")
# How long the last rank waits for the others when all leave.
LEAVE_S = 4
# The worker's own code for the loss of its engine.
EXIT_LOST = 3
# Ranks load at different speeds, the first time with a cold compilation cache.
MEET_S = 300
_LOCAL = ("localhost", "127.0.0.1", "::1", "[::1]")


@dataclass(frozen=True, slots=True)
class Group:
    """This rank's device, and the mesh of the devices of all ranks."""

    rank: int
    world: int
    device: Any
    mesh: Any
    peers: Peers | None = None

    @property
    def platform(self) -> str:
        """``cpu``, ``gpu`` or ``tpu``."""
        return str(self.device.platform)

    @property
    def device_name(self) -> str:
        """The kind of device, and which one it is."""
        kind = f" {self.device.device_kind}" if self.platform != "cpu" else ""
        return f"{self.platform}{kind}"

    def sharding(self, *axes: str | None) -> Any:
        """How an array lies over the ranks; ``AXIS`` cuts that dimension, None does not."""
        return NamedSharding(self.mesh, PartitionSpec(*axes))

    def put(self, value: Any) -> Any:
        """An array of the host, the same on each rank, on all devices."""
        local = jax.device_put(value, self.device)
        shape, sharding = local.shape, self.sharding()
        return jax.make_array_from_single_device_arrays(shape, sharding, [local])

    def meet(self, what: str) -> None:
        """Waits until all ranks are here. Raises an error of JAX if one does not come."""
        if self.world > 1:
            distributed.global_state.client.wait_at_barrier(f"roundhouse-{what}", MEET_S * 1000)

    def least(self, what: str, number: int) -> int:
        """The smallest of the ranks' numbers."""
        if self.world == 1:
            return number
        client = distributed.global_state.client
        client.key_value_set(f"roundhouse/{what}/{self.rank}", str(number))
        keys = (f"roundhouse/{what}/{rank}" for rank in range(self.world))
        return min(int(client.blocking_key_value_get(key, MEET_S * 1000)) for key in keys)

    def close(self) -> None:
        """Leaves the group, if this process was brought into one."""
        if self.peers is not None:
            self.peers.close()
            # It waits for the others, of which one may be gone or stay.
            with suppress(jax.errors.JaxRuntimeError, RuntimeError):
                jax.distributed.shutdown()


def join(options: EngineOptions) -> Group:
    """Takes the device that the options name and joins the other ranks. Raises ``ModelError``."""
    kind, index = _parse(options.device)
    _configure(kind, options)
    peers = _meet(options, kind, index) if options.world > 1 else None
    try:
        local = jax.local_devices(backend=kind or None)
        everyone = jax.devices(kind or None)
    except RuntimeError as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ModelError(f"jax: no device {kind or 'at all'}: {reason}") from error
    if options.world > 1:
        if len(everyone) != options.world:
            raise ModelError(
                f"jax: {options.world} ranks have {len(everyone)} devices; each needs exactly one"
            )
        device = local[0]
    elif (index or 0) < len(local):
        device = local[index or 0]
        everyone = [device]
    else:
        raise ModelError(
            f"jax: there is no device {options.device}, only {len(local)} of that kind"
        )
    everyone = sorted(everyone, key=lambda one: int(one.process_index))
    return Group(options.rank, options.world, device, Mesh(np.array(everyone), (AXIS,)), peers)


def _parse(device: str) -> tuple[str, int | None]:
    """Kind and number of a device named like "tpu" or "gpu:1"."""
    kind, colon, number = device.partition(":")
    if (kind and kind not in KINDS) or (colon and not number.isdecimal()):
        raise ModelError(
            f"jax: --device {device} is not one of {', '.join(KINDS)}, perhaps with a number: gpu:1"
        )
    return kind, int(number) if colon else None


def _configure(kind: str, options: EngineOptions) -> None:
    """Settings that must be made before JAX starts its devices."""
    if kind and kind not in _GPUS:
        jax.config.update("jax_platforms", kind)
    # It would take SIGTERM for itself; the worker answers that.
    jax.config.update("jax_enable_preemption_service", False)
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(_cache_folder()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    threads = options.threads
    if not threads and options.world > 1 and _host(options.rendezvous) in _LOCAL:
        # Ranks on one host share its cores.
        threads = max(1, usable_cores() // options.world)
    if threads:
        # What XLA's CPU client reads for the size of its thread pool.
        os.environ["NPROC"] = str(threads)


def _cache_folder() -> Path:
    """Where compiled programs are kept; those for a CPU run on CPUs with its features only."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    features = platform.machine() + processor_flags()
    key = hashlib.sha256(features.encode()).hexdigest()[:12]
    return Path(base) / "roundhouse" / "jax" / f"{jax.__version__}-{key}"


def _host(address: str) -> str:
    return address.rpartition(":")[0]


def _meet(options: EngineOptions, kind: str, index: int | None) -> Peers:
    """Brings this process into the group. JAX's own rendezvous is at a port that rank 0 chose."""
    if not options.rendezvous:
        raise ModelError("jax: several ranks need --rendezvous HOST:PORT")
    # On the CPU each process has one device of its own; elsewhere rank r takes the r-th of its host
    # unless it is told which.
    numbers = None if kind == "cpu" else [options.rank if index is None else index]
    try:
        peers = Peers(options.rank, options.world, options.rendezvous)
        peers.watch(_end)
        jax.distributed.initialize(
            f"{_host(options.rendezvous)}:{peers.store_port}",
            options.world,
            options.rank,
            local_device_ids=numbers,
            cluster_detection_method="deactivate",
            initialization_timeout=MEET_S,
            shutdown_timeout_seconds=LEAVE_S,
        )
    except (PeersError, RuntimeError) as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ModelError(f"jax: the ranks did not meet: {reason}") from error
    return peers


def _end(reason: str) -> None:
    """Ends this process: its engine thread may be waiting for the lost rank, and cannot be told."""
    with suppress(OSError):
        sys.stderr.write(f"jax: {reason}\n")
        sys.stderr.flush()
    os._exit(EXIT_LOST)
