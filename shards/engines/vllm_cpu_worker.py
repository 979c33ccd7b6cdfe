"""vLLM's worker on CPUs, with one thing mended. Only vLLM imports this: it patches PyTorch.

vLLM's CPU ranks reduce through shared memory, whose name is derived from the init method of
``torch.distributed``. Under an external launcher that is ``env://`` for every group on the host, so
two groups would meet in one segment, and a group that was killed would be in the way of the next.
This worker gives the method its port, which is new for each life of a group. What killed groups
leave behind is removed by ``vllm_segments``.
"""

import os

from vllm.v1.worker.cpu_worker import CPUWorker


class RankCPUWorker(CPUWorker):  # type: ignore[misc]
    """vLLM's CPU worker, whose group has a name of its own."""

    distributed_init_method: str

    def init_device(self) -> None:
        """Meets the other ranks."""
        if self.distributed_init_method == "env://":
            address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
            self.distributed_init_method = f"tcp://{address}:{port}"
        super().init_device()
