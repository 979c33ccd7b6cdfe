"""The torch engine itself: what it says, what it refuses, and what it does with bad numbers."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shards.engines import load
from shards.engines.base import Admit, EngineOptions, ModelError, Plan, SamplingParams
from shards.engines.torch_devices import (
    BACKENDS,
    Device,
    choose_device,
    choose_dtype,
    cpu_has_bfloat16,
    kv_tokens_default,
)
from shards.engines.torch_weights import gguf_ends
from tests.heavy.models import smollm2_gguf, tiny_llama_folder
from tests.heavy.torch.made import make

CPU = Device(torch.device("cpu"), "cpu")
GREEDY = SamplingParams()


def test_describes_the_model() -> None:
    engine = make(tiny_llama_folder(), kv_tokens=1000)
    info = engine.describe()
    engine.close()
    assert (info.engine, info.device, info.dtype) == ("torch", "cpu", "float32")
    assert info.engine_version.startswith(torch.__version__)
    assert info.page_tokens == 16
    assert info.kv_tokens == 992  # whole pages
    assert info.length_max == 992
    assert info.vocab_size == 288
    assert info.eos_token_ids == (257,)
    assert "prefix_sharing" in info.features
    file = (tiny_llama_folder() / "model.safetensors").read_bytes()
    assert info.weight_bytes == len(file) - 8 - int.from_bytes(file[:8], "little")


def test_loading_reports_progress() -> None:
    seen: list[float] = []
    options = EngineOptions(tiny_llama_folder(), "m", kv_tokens=256, threads=1)
    load("torch", options, seen.append).close()
    assert seen == sorted(seen)
    assert len(seen) > 5
    assert seen[-1] == 1.0


def test_numbers_that_are_none_fail_one_sequence_and_leave_no_trace() -> None:
    """A page that held NaN is used again; and the neighbours never notice."""
    engine = make(tiny_llama_folder(), kv_tokens=64)
    tokens = list(range(3, 23))
    admits = [Admit(number, tokens, 20, GREEDY) for number in (1, 2)]
    engine.step(Plan(admits=admits, work=[(1, 20), (2, 20)]))
    (page, _) = engine._tables.table(2)
    engine._model.layers[0].values[page, 3] = float("nan")
    outcome = engine.step(Plan(work=[(1, 1), (2, 1)]))
    assert outcome.sequences == [1]
    assert "not finite" in outcome.failures[2]
    engine.step(Plan(drops=[2]))
    for number in (3, 4):  # one after the other in the pages that sequence 2 had
        outcome = engine.step(Plan(admits=[Admit(number, tokens, 20, GREEDY)], work=[(number, 20)]))
        assert outcome.sequences == [number]
        assert page in engine._tables.table(number)
        assert engine.step(Plan(work=[(number, 1)])).sequences == [number]
        engine.step(Plan(drops=[number]))
    engine.close()


def test_a_reset_leaves_no_bad_numbers_either() -> None:
    engine = make(tiny_llama_folder(), kv_tokens=32)
    tokens = list(range(3, 23))
    engine.step(Plan(admits=[Admit(1, tokens, 20, GREEDY)], work=[(1, 20)]))
    engine._model.layers[0].values[:] = float("nan")
    assert list(engine.step(Plan(work=[(1, 1)])).failures) == [1]
    engine.reset()
    engine.step(Plan(admits=[Admit(1, tokens, 20, GREEDY)], work=[(1, 19)]))
    assert engine.step(Plan(work=[(1, 1)])).sequences == [1]
    engine.close()


# What is refused --------------------------------------------------------------------------------


def copy_of(folder: Path, **config: object) -> Path:
    made = shutil.copytree(tiny_llama_folder(), folder / "model")
    path = made / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return made


def cut_short(folder: Path) -> Path:
    made = copy_of(folder)
    weights = made / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    return made


def without(folder: Path, name: str) -> Path:
    made = copy_of(folder)
    (made / name).unlink()
    return made


def with_lost_part(folder: Path) -> Path:
    made = without(folder, "model.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (made / "model.safetensors.index.json").write_text(json.dumps(index))
    return made


def broken_config(folder: Path) -> Path:
    made = copy_of(folder)
    (made / "config.json").write_text("{")
    return made


def cut_gguf(folder: Path) -> Path:
    path = folder / "cut.gguf"
    path.write_bytes(smollm2_gguf().read_bytes()[:6_000_000])
    return path


FAULTS = {
    "missing": (lambda folder: folder / "no.gguf", "does not exist"),
    "empty folder": (lambda folder: folder, "no config.json and no GGUF file"),
    "no weights": (lambda folder: without(folder, "model.safetensors"), "no model.safetensors"),
    "lost part": (with_lost_part, "no model-00001-of-00002.safetensors"),
    "cut weights": (cut_short, "damaged or cut short"),
    "cut gguf": (cut_gguf, "is cut short"),
    "no tokenizer": (lambda folder: without(folder, "tokenizer.json"), "has no tokenizer.json"),
    "broken config": (broken_config, "is not JSON"),
    "unknown": (lambda folder: copy_of(folder, model_type="nonesuch"), "called nonesuch"),
    "another shape": (
        lambda folder: copy_of(folder, intermediate_size=64),
        "lacks 9 of the tensors",
    ),
    "more layers": (lambda folder: copy_of(folder, num_hidden_layers=4), "lacks 9 of the tensors"),
    "no decoder": (lambda folder: copy_of(folder, model_type="clip"), "not a decoder-only"),
}


@pytest.mark.parametrize("case", list(FAULTS))
def test_a_faulty_model_is_named_in_one_line(tmp_path: Path, case: str) -> None:
    spoil, reason = FAULTS[case]
    path = spoil(tmp_path)
    with pytest.raises(ModelError, match=reason) as caught:
        make(path).tokenizer_files()
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "int3"}, "--dtype int3 is not one of"),
        ({"device": "quantum"}, "quantum is no device"),
        ({"device": "cuda:9"}, "there is no device cuda:9"),
        ({"kv_tokens": 10}, "less than a page"),
        ({"extra": {"page_tokens": 12}}, "not a power of two"),
        ({"extra": {"pages": 12}}, "unknown engine option pages"),
        ({"adapters": (("a", Path("b")),)}, "adapters are not supported"),
    ],
)
def test_a_faulty_option_is_one_line(changes: dict[str, object], reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        make(tiny_llama_folder(), **changes)
    assert "\n" not in str(caught.value)


def test_no_model_is_refused() -> None:
    with pytest.raises(ModelError, match="--model PATH is missing"):
        load("torch", EngineOptions(None, "m"), lambda _fraction: None)


# What is chosen ---------------------------------------------------------------------------------


def test_the_cpu_is_chosen_where_torch_reports_nothing_else() -> None:
    if not torch.accelerator.is_available():
        assert choose_device("", 1, 2) == CPU
    assert choose_device("cpu", 0, 1) == CPU


@pytest.mark.parametrize(
    ("kind", "count", "wanted", "rank_of_world", "chosen"),
    [
        ("cuda", 2, "", (0, 1), "cuda:0"),
        ("cuda", 2, "", (3, 4), "cuda:1"),  # ROCm's builds call it so, too
        ("cuda", 2, "cuda:1", (0, 1), "cuda:1"),
        ("cuda", 2, "cpu", (0, 1), "cpu"),
        ("xpu", 4, "", (2, 4), "xpu:2"),
        ("xpu", 4, "xpu", (3, 4), "xpu:3"),
        ("hpu", 8, "", (5, 8), "hpu:5"),
    ],
)
def test_the_device_is_the_one_that_torch_reports(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    count: int,
    wanted: str,
    rank_of_world: tuple[int, int],
    chosen: str,
) -> None:
    report(monkeypatch, kind, count)
    device = choose_device(wanted, *rank_of_world)
    assert str(device.torch) == chosen
    assert device.name == (chosen if chosen == "cpu" else f"{chosen} a {kind}")
    assert BACKENDS[device.kind] in ("gloo", "nccl", "xccl", "hccl")


def report(monkeypatch: pytest.MonkeyPatch, kind: str, count: int) -> None:
    """As if the installed torch had been built for such devices, and found some."""
    here = {
        "is_available": lambda: True,
        "current_accelerator": lambda: torch.device(kind),
        "device_count": lambda: count,
    }
    for name, value in here.items():
        monkeypatch.setattr(torch.accelerator, name, value)
    module = SimpleNamespace(get_device_name=lambda _index: f"a {kind}")
    monkeypatch.setattr(torch, kind, module, raising=False)


def test_a_device_that_torch_does_not_report_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    report(monkeypatch, "xpu", 2)
    for wanted in ("cuda:0", "xpu:2"):
        with pytest.raises(ModelError, match=f"no device {wanted}; .* reports 2 of kind xpu"):
            choose_device(wanted, 0, 1)


def test_the_type_follows_what_the_processor_multiplies() -> None:
    fast = torch.bfloat16 if cpu_has_bfloat16() else torch.float32
    assert choose_dtype("", "bfloat16", CPU) is fast
    assert choose_dtype("", "float32", CPU) is torch.float32
    assert choose_dtype("fp16", "float32", CPU) is torch.float16
    gpu = Device(torch.device("cuda:0"), "gpu")
    assert choose_dtype("", "float16", gpu) is torch.float16
    assert choose_dtype("", "", gpu) is torch.bfloat16


def test_the_cache_takes_whole_pages_within_reason() -> None:
    assert kv_tokens_default(CPU, 1000, 2048, 16) == 32768
    assert kv_tokens_default(CPU, 1000, 1 << 20, 16) == (1 << 20) // 8
    assert kv_tokens_default(CPU, 1 << 50, 2048, 16) == 16


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's tokens take only its heads' part of the bytes; without that it would take all."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    whole = kv_tokens_default(CPU, 1 << 24, 1 << 30, 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert kv_tokens_default(CPU, 1 << 23, 1 << 30, 1) == whole


def test_a_gguf_file_names_its_ends() -> None:
    ends = {f"tokenizer.ggml.{end}_token_id": n for end, n in (("eos", 2), ("eom", 8), ("eot", 7))}
    assert gguf_ends(ends) == (2, 7, 8)
    assert gguf_ends({"tokenizer.ggml.eos_token_id": 2}) == (2,)
