"""The torch engine on a GPU: the contract, its kernel, its graphs, and the CPU's answers.

``make test-gpu`` needs a GPU, and fails without one.
"""

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from shards.engines.base import Admit, Engine, Plan, SamplingParams
from shards.engines.torch_attention import Shape
from shards.engines.torch_engine import TorchEngine
from shards.engines.torch_kernel import PagedKernel
from shards.engines.torch_norms import Norm
from shards.engines.torch_views import Decodes, Kind
from tests.engines.contract import EngineContract
from tests.engines.contract_grammar import GrammarContract
from tests.engines.contract_prompts import PromptContract
from tests.heavy.models import smollm2_folder, tiny_llama_folder
from tests.heavy.torch.made import answer, make, random_model
from tests.heavy.torch.test_architectures import ARCHITECTURES

DEVICE = "cuda:0"
CLOSE = 2e-3


@pytest.fixture(scope="module")
def made() -> Iterator[TorchEngine]:
    engine = make(tiny_llama_folder(), device=DEVICE)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def plainly_made() -> Iterator[Engine]:
    plainly = {"graphs": "off", "attention": "gather", "fuse": "off", "sample": "host"}
    engine = make(tiny_llama_folder(), device=DEVICE, extra=plainly)
    yield engine
    engine.close()


PROMPTS = [[(7 * n + 13 * k) % 250 for k in range(24 + 7 * n)] for n in range(1, 5)]


class TestContract(GrammarContract, PromptContract, EngineContract):
    """With all that is on by default: the kernel, graphs, joined weights, drawing on the device."""

    @pytest.fixture
    def engine(self, made: Engine) -> Engine:
        made.reset()
        return made

    @pytest.fixture
    def prompts(self) -> list[list[int]]:
        return PROMPTS


class TestContractOfThePlainWay(GrammarContract, PromptContract, EngineContract):
    """Pages gathered, nothing captured, tokens drawn on the host."""

    @pytest.fixture
    def engine(self, plainly_made: Engine) -> Engine:
        plainly_made.reset()
        return plainly_made

    @pytest.fixture
    def prompts(self) -> list[list[int]]:
        return PROMPTS


def test_what_is_on_by_default(made: TorchEngine) -> None:
    assert made._kernel is not None
    assert made._graphs is not None
    assert made._graphs._replays, "graphs of short sequences are captured at load"
    assert any(isinstance(module, Norm) for module in made._model._model.modules())
    assert made._drawer is not None, made.describe().warnings
    assert made.describe().warnings == ()
    assert "cuda:0 NVIDIA" in made.describe().device


# Compiled layers --------------------------------------------------------------------------------


def kernels(engine: TorchEngine) -> int:
    """How many kernels the smallest graph has."""
    assert engine._graphs is not None
    bucket = min(engine._graphs._replays)
    replay, packed = engine._graphs._replays[bucket], engine._graphs._packing.nothing(*bucket)
    replay(packed)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        replay(packed)
        torch.cuda.synchronize()
    return sum(one.count for one in seen.key_averages() if one.self_device_time_total > 0)


def test_compiled_layers_need_fewer_kernels(made: TorchEngine) -> None:
    """Counted for each layer, as what is around them stays and is most of so small a model.

    Modelling code turns queries and keys by five kernels each, adds and norms by two, and gates by
    two; compiled, each is one: ten less for each layer. Llama 1B's sixteen layers save just that
    on an H100 (417 to 257). Where a compiler cuts otherwise, it may be two less.
    """
    plain = make(tiny_llama_folder(), device=DEVICE, extra={"compile": "off"})
    try:
        needed, without, layers = kernels(made), kernels(plain), len(plain._model.blocks())
    finally:
        plain.close()
    told = f"{needed} kernels compiled, {without} plain, {layers} layers"
    assert 0 < needed <= without - 8 * layers, told


def test_nothing_is_compiled_while_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also not when graphs of longer sequences are captured."""
    from torch._dynamo.utils import counters

    from shards.engines import torch_compile

    monkeypatch.setattr(torch_compile, "_SERVING", "fail_on_recompile")
    engine = make(tiny_llama_folder(), device=DEVICE, kv_tokens=4096)
    assert engine.describe().warnings == ()
    before = counters["stats"]["unique_graphs"]
    assert before > 0
    assert engine._graphs is not None
    buckets = len(engine._graphs._replays)
    long = [[(11 * n + k) % 250 for k in range(300)] for n in range(3)]
    answer(engine, [*PROMPTS, *long], 8)
    assert len(engine._graphs._replays) > buckets
    assert counters["stats"]["unique_graphs"] == before
    engine.close()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("gemma3_text", "bfloat16"),
        ("qwen3", "float16"),
        ("mistral", "bfloat16"),
        ("opt", "float32"),
    ],
)
def test_compiled_layers_answer_as_plain_ones(tmp_path: Path, name: str, dtype: str) -> None:
    """Behind a tie that 16-bit types round differently texts part, so first tokens are compared."""
    random_model(tmp_path, name, **ARCHITECTURES[name])
    engine = make(tmp_path, device=DEVICE, dtype=dtype)
    assert engine.describe().warnings == ()
    plain = make(tmp_path, device=DEVICE, dtype=dtype, extra={"compile": "off"})
    prompts = [[(7 * n + 13 * k) % 250 for k in range(20 + n)] for n in range(8)]
    seen, expected = ([one[0] for one in answer(each, prompts, 1)] for each in (engine, plain))
    assert sum(map(operator.eq, seen, expected)) >= 7
    engine.close()
    plain.close()


def margins(engine: Engine, prompt: list[int], tokens: list[int]) -> list[float]:
    """How far the likeliest token is ahead of the second, at each place of an answer."""
    engine.reset()
    found = []
    for at in range(len(tokens)):
        text = prompt + tokens[:at]
        sampling = SamplingParams(logprobs=True, top_logprobs=2)
        plan = Plan(admits=[Admit(at, text, len(text), sampling)], work=[(at, len(text))])
        top = engine.step(plan).logprobs[at].top_values
        found.append(top[0] - top[1])
        engine.step(Plan(drops=[at]))
    return found


def assert_answers_agree(one: Engine, other: Engine, prompts: list[list[int]], count: int) -> None:
    """Up to the first tie that rounding may decide; such ties are few."""
    compared = 0
    for prompt, seen, expected in zip(
        prompts, answer(one, prompts, count), answer(other, prompts, count), strict=True
    ):
        differs = next((at for at in range(count) if seen[at] != expected[at]), count)
        compared += differs
        if differs < count:
            margin = margins(other, prompt, expected[: differs + 1])[-1]
            assert margin < CLOSE, f"token {differs}: {seen[differs]}, not {expected[differs]}"
    assert compared > 0.8 * count * len(prompts)


@pytest.mark.parametrize("kind", ["llama", "window"])
def test_tiny_models_answer_as_on_the_cpu(kind: str) -> None:
    changes: dict[str, object] = {}
    if kind == "window":
        changes = {"architectures": ["MistralForCausalLM"], "sliding_window": 16}
        changes["model_type"] = "mistral"
    folder = tiny_llama_folder(**changes)
    gpu, cpu = make(folder, device=DEVICE), make(folder, device="cpu")
    try:
        assert_answers_agree(gpu, cpu, PROMPTS, 60)
    finally:
        gpu.close()
        cpu.close()


def test_smollm2_answers_as_on_the_cpu() -> None:
    changes = {"dtype": "float32", "kv_tokens": 4096, "sequences_max": 8}
    gpu = make(smollm2_folder(), device=DEVICE, **changes)
    cpu = make(smollm2_folder(), device="cpu", **{**changes, "threads": 0})
    prompts = [[(17 * n + 31 * k) % 40000 for k in range(10 + 9 * n)] for n in range(1, 9)]
    try:
        assert_answers_agree(gpu, cpu, prompts, 48)
    finally:
        gpu.close()
        cpu.close()


# The kernel -------------------------------------------------------------------------------------


def reference(
    query: torch.Tensor,
    caches: list[torch.Tensor],
    decodes: Decodes,
    shape: Shape,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention in float64, one head of one sequence after the other."""
    group = shape.heads // shape.kv_heads
    table = decodes.pages.view(decodes.count, -1).long()
    rows = []
    for row in range(decodes.count):
        length, begin = int(decodes.lengths[row]), int(decodes.begins[row])
        key, value = (
            cache[table[row]].flatten(0, 1)[: length - begin].double() for cache in caches
        )
        place = torch.arange(begin, length, device=query.device)
        for head in range(shape.heads):
            scores = key[:, head // group] @ query[row, head].double() * shape.scale
            if shape.kind.softcap:
                scores = shape.kind.softcap * torch.tanh(scores / shape.kind.softcap)
            if shape.kind.window:
                scores[place < length - shape.kind.window] = float("-inf")
            if sinks is not None:
                scores = torch.cat((scores, sinks[head : head + 1].double()))
            weights = torch.softmax(scores, 0)[: len(place)]
            rows.append(weights @ value[:, head // group])
    return torch.stack(rows).view(decodes.count, shape.heads, -1)


FULL = Kind()


@dataclass(frozen=True)
class Case:
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    page: int
    kind: Kind = FULL
    sinks: bool = False

    def shape(self) -> Shape:
        scale = self.key_dim**-0.5
        return Shape(self.heads, self.kv_heads, self.key_dim, self.value_dim, scale, self.kind)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "case",
    [
        Case(4, 2, 32, 32, 8),
        Case(9, 3, 64, 64, 16),
        Case(32, 8, 128, 128, 16),
        Case(4, 4, 80, 48, 16),
        Case(8, 1, 256, 256, 32, Kind(window=50)),
        Case(8, 2, 16, 16, 16, Kind(softcap=20.0), sinks=True),
        Case(64, 8, 64, 64, 16, Kind(window=128), sinks=True),
    ],
)
def test_the_kernel_attends(case: Case, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(case.heads + case.key_dim)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device=DEVICE, dtype=dtype)

    shape, page, pages = case.shape(), case.page, 300
    caches = [draw(pages, page, case.kv_heads, dim) for dim in (case.key_dim, case.value_dim)]
    lengths = torch.tensor([1, 7, 40, 129, 700, 2000], device=DEVICE)
    begins = torch.zeros_like(lengths)
    if case.kind.window:
        begins = (lengths - case.kind.window).clamp(min=0) // page * page
    width = int((-(-(lengths - begins) // page)).max())
    table = torch.randint(1, pages, (len(lengths), width), generator=generator).to(DEVICE)
    # What no sequence has must not be read, be it no number.
    table[0, 1:] = 0
    for cache in caches:
        cache[0] = float("nan")
    query = draw(len(lengths), case.heads, case.key_dim)
    sinks = draw(case.heads) if case.sinks else None
    decodes = Decodes(None, len(lengths), table.reshape(-1), begins, lengths, None)
    kernel = PagedKernel(torch.device(DEVICE))
    seen = kernel(query, *caches, decodes, shape, sinks).double()
    expected = reference(query, caches, decodes, shape, sinks)
    wrong = (seen - expected).norm() / expected.norm()
    assert wrong < (1e-5 if dtype == torch.float32 else 8e-3)


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_the_kernel_writes_keys_and_values_to_their_cells(tokens: int) -> None:
    """Of sizes that are no powers of two; keys by themselves, values inside of something else."""
    kv_heads, key_dim, value_dim, pages, page = 3, 80, 48, 20, 16
    generator = torch.Generator().manual_seed(tokens)
    drawn = torch.randn((tokens, kv_heads, 200), generator=generator).to(DEVICE, torch.bfloat16)
    key = drawn[..., :key_dim].transpose(0, 1).contiguous()
    value = drawn[..., key_dim : key_dim + value_dim].transpose(0, 1)
    cells = torch.randperm(pages * page, generator=generator)[:tokens].to(DEVICE)
    caches = [
        torch.zeros((pages, page, kv_heads, dim), device=DEVICE, dtype=torch.bfloat16)
        for dim in (key_dim, value_dim)
    ]
    PagedKernel(torch.device(DEVICE)).write(key, value, cells, *caches)
    for cache, given in zip(caches, (key, value), strict=True):
        expected = torch.zeros_like(cache).flatten(0, 1)
        expected.index_copy_(0, cells, given.transpose(0, 1))
        assert torch.equal(cache.flatten(0, 1), expected)


def test_sequences_are_cut_while_there_is_room() -> None:
    kernel = PagedKernel(torch.device(DEVICE))
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    assert kernel.parts(8, 100) == 1
    assert kernel.parts(8, 1 << 16) == 32
    assert kernel.parts(2 * processors, 1 << 16) == 1
