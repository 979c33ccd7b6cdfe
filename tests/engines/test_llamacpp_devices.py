"""Which accelerators the llama.cpp engine takes; with them itself: ``tests/heavy/gpu``."""

import pytest

from shards.engines import load
from shards.engines.base import EngineOptions, ModelError
from shards.engines.llama_devices import Device, accelerators, choose, native_list
from tests.engines.test_llamacpp import model_file

CUDA = [Device(8, "CUDA0", "NVIDIA H100 80GB HBM3"), Device(16, "CUDA1", "NVIDIA H100 80GB HBM3")]
METAL = [Device(24, "Metal", "Apple M3")]


def test_titles_are_written_as_torch_writes_them() -> None:
    assert [device.title for device in CUDA] == [
        "cuda:0 NVIDIA H100 80GB HBM3",
        "cuda:1 NVIDIA H100 80GB HBM3",
    ]
    assert METAL[0].title == "metal Apple M3"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("", [0, 1]),
        ("gpu", [0, 1]),
        ("cuda", [0, 1]),
        ("cuda:1", [1]),
        ("CUDA0", [0]),
        ("cpu", []),
    ],
)
def test_a_word_names_devices(word: str, expected: list[int]) -> None:
    assert choose(CUDA, word) == [CUDA[index] for index in expected]


@pytest.mark.parametrize(
    ("found", "word", "told"),
    [(CUDA, "cuda:2", "finds cuda:0 NVIDIA"), (METAL, "cuda", "finds metal"), ([], "gpu", "cpu")],
)
def test_a_device_that_is_not_there_is_refused_with_those_that_are(
    found: list[Device], word: str, told: str
) -> None:
    with pytest.raises(ModelError, match=f"--device {word}: .*{told}") as caught:
        choose(found, word)
    assert "\n" not in str(caught.value)


def test_nothing_named_and_nothing_found_is_the_processor() -> None:
    assert choose([], "") == []


def test_the_list_for_llama_cpp_ends_with_null() -> None:
    assert list(native_list(CUDA)) == [8, 16, None]
    assert list(native_list([])) == [None]


@pytest.mark.parametrize("device", ["", "cpu"])
def test_says_what_it_computes_on(device: str) -> None:
    options = EngineOptions(model_file(), "x", kv_tokens=256, sequences_max=1, device=device)
    engine = load("llamacpp", options, lambda _fraction: None)
    told = engine.describe().device
    engine.close()
    here = ", ".join(one.title for one in choose(accelerators(), device))
    assert told == (here or "cpu")


def test_exact_mode_is_refused_on_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels differ with the count of rows, whatever the ubatch."""
    monkeypatch.setattr("shards.engines.llama_settings.accelerators", lambda: CUDA)
    options = EngineOptions(model_file(), "x", extra=(("exact", "1"),))
    with pytest.raises(ModelError, match=r"exact=1 .* --device cpu"):
        load("llamacpp", options, lambda _fraction: None)
