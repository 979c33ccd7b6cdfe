"""Loading of models with vLLM: progress, and one line for whatever is wrong.

vLLM has one engine per process at a time, so these tests are apart from those that share one.
"""

import os
from pathlib import Path

import pytest
import torch

from shards.engines import load
from shards.engines.base import EngineOptions, ModelError
from shards.engines.vllm_setup import draws_itself
from tests.heavy.models import tiny_llama_folder

# vLLM, PyTorch and transformers warn about themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

EAGER = (("eager", "1"),)


def test_a_faulty_folder_is_named_in_one_line(tmp_path: Path) -> None:
    whole = tiny_llama_folder()
    cases = {
        "missing": "does not exist",
        "empty": "has no config.json",
        "text": "is not JSON",
        "unknown": "",
        "no weights": "Cannot find any model weights",
        "cut": "",
    }
    for name, reason in cases.items():
        folder = tmp_path / name
        if name != "missing":
            folder.mkdir()
        if name in ("unknown", "no weights", "cut"):
            for file in whole.iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
        if name == "text":
            (folder / "config.json").write_text("no object")
            (folder / "tokenizer.json").write_text("{}")
        if name == "unknown":
            config = (folder / "config.json").read_text()
            config = config.replace("LlamaForCausalLM", "NobodyForCausalLM")
            (folder / "config.json").write_text(config.replace('"llama"', '"nobody"'))
        if name == "no weights":
            (folder / "model.safetensors").unlink()
        if name == "cut":
            weights = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        with pytest.raises(ModelError, match=reason) as caught:
            load("vllm", EngineOptions(folder, "x", extra=EAGER), lambda _fraction: None)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 500


def test_loading_reports_progress() -> None:
    seen: list[float] = []
    options = EngineOptions(
        tiny_llama_folder(), "tiny", kv_tokens=64, sequences_max=1, threads=1, extra=EAGER
    )
    engine = load("vllm", options, seen.append)
    assert engine.describe().kv_tokens == 64
    engine.close()
    assert seen == sorted(seen)
    assert len(seen) > 5
    assert seen[-1] == 1.0


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"extra": (("speed", "1"),)}, "unknown engine option speed"),
        ({"extra": (("memory_fraction", "1.5"),)}, "at most 1"),
        ({"extra": (("sampler", "fast"),)}, "sampler=fast is not one of auto, vllm, host$"),
        ({"world": 2, "rank": 1}, "--rendezvous"),
        ({"world": 3, "rendezvous": "127.0.0.1:1"}, "over 3 ranks; --num-shard can be 1, 2, 4$"),
        ({"model": None}, "--model FOLDER is missing"),
        ({"device": "cuda:x"}, "--device cuda:x is no device; .* such as cuda:1$"),
        ({"device": "cuda:0"}, "--device cuda:0, but this vLLM computes on cpu$"),
        ({"adapters": (("red", Path("/nowhere")),)}, "adapter red: model file /nowhere"),
    ],
)
def test_a_mistake_is_one_line(
    options: dict[str, object], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")  # which a device changes
    given = {"model": tiny_llama_folder(), "model_id": "x", **options}
    with pytest.raises(ModelError, match=reason) as caught:
        load("vllm", EngineOptions(**given), lambda _fraction: None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "device", "own"),
    [
        ("", "cpu", False),
        ("auto", "cpu", False),
        ("auto", "cuda", True),
        ("vllm", "cpu", True),
        ("host", "cuda", False),
    ],
)
def test_who_draws_is_chosen_by_the_device_if_it_is_not_asked_for(
    asked: str, device: str, own: bool
) -> None:
    extra = (("sampler", asked),) if asked else ()
    assert draws_itself(EngineOptions(None, "x", extra=extra), device) is own


class _Met(Exception):
    """Ends the start of a worker where it would meet the other ranks."""


def test_ranks_on_cpus_name_shared_memory_after_the_port_of_their_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed
    from vllm.v1.worker import cpu_worker

    from shards.engines.vllm_cpu_worker import RankCPUWorker
    from shards.engines.vllm_segments import is_segment_of

    class Config:
        speculative_config = None

    class Communicator:
        unique_name, ranks = "tp:0", (0, 1)

    def meet(*arguments: object) -> None:
        seen.append(arguments[2])
        raise _Met

    seen: list[object] = []
    monkeypatch.setattr(cpu_worker, "init_worker_distributed_environment", meet)
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)
    names = []
    for port in ("4711", "4712"):
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", port)
        monkeypatch.setenv("VLLM_DIST_IDENT", "")
        worker = object.__new__(RankCPUWorker)
        worker.distributed_init_method = "env://"
        worker.vllm_config, worker.rank, worker.local_rank = Config(), 0, 0
        with pytest.raises(_Met):
            worker.init_device()
        names.append(_CPUSHMDistributed.make_group_name(Communicator()))
        assert is_segment_of(names[-1] + "_0", int(os.environ["MASTER_PORT"]))
    assert seen == ["tcp://127.0.0.1:4711", "tcp://127.0.0.1:4712"]
    assert names[0] != names[1]
