"""The kernels of bfloat16 layers on CPUs: what they compute, where they are used, and without."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shards.engines import jax_native, jax_native_trial, native_build
from shards.engines.base import ModelError, Plan
from shards.engines.jax_attention import Attention
from shards.engines.jax_buckets import choose, ordered
from shards.engines.jax_engine import JaxEngine
from tests.engines.contract import EngineContract, admit, generate
from tests.engines.contract_prompts import PromptContract
from tests.heavy.family import member_folder
from tests.heavy.jax.test_attention import CASES, PAGE, PAGES, fields, layout_of, written_cells
from tests.heavy.jax.test_contract import compiled_by, make, prompts_of, serve_all_shapes
from tests.heavy.models import tiny_llama_folder

BFLOAT16 = np.dtype(jnp.bfloat16)
pytestmark = pytest.mark.skipif(
    not jax_native.processor_multiplies(),
    reason="the kernels are for processors with AVX512-BF16 and without AMX",
)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    jax_native.register()


def numbers(*shape: int) -> Any:
    random = np.random.default_rng(sum(shape))
    return random.standard_normal(shape, np.float32).astype(BFLOAT16)


def wide(found: Any) -> Any:
    return np.asarray(found).astype(np.float32)


# Kernels ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "outs"), [(576, 960), (64, 64), (96, 1000), (1536, 130)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_products_are_those_of_numpy(width: int, outs: int, dtype: Any) -> None:
    """And each row is the same, to the bit, whatever its neighbours; what is padding is 0."""
    weight = numbers(outs, width)
    packed = jax_native.pack(weight)
    assert packed.shape == (-(-outs // 64), width // 2, 64, 2)
    product = jax.jit(lambda x, real: jax_native.product(x, packed, real, outs, dtype))
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 32, 70):
        x, real = numbers(rows, width), max(1, rows - 1)
        seen = wide(product(x, np.array([real], np.int32)))
        expected = wide(x) @ wide(weight).T
        np.testing.assert_allclose(seen[:real], expected[:real], rtol=0.02, atol=0.2)
        assert not seen[real:].any()
        alone = wide(product(x[:1], np.array([1], np.int32)))
        assert np.array_equal(seen[0], alone[0])


@pytest.mark.parametrize("outs", [576, 130])
def test_a_product_is_rounded_before_it_is_added(outs: int) -> None:
    weight = numbers(outs, 96)
    packed = jax_native.pack(weight)
    added = jax.jit(lambda x, real, rest: jax_native.added(x, packed, real, rest))
    for rows in (1, 7, 33):
        x, rest, real = numbers(rows, 96), numbers(rows, outs), np.array([rows], np.int32)
        product = jax_native.product(x, packed, real, outs, jnp.bfloat16)
        assert np.array_equal(wide(added(x, real, rest)), wide(rest + product))


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_norms_are_those_of_numpy(rows: int) -> None:
    x, weight = numbers(rows, 576), numbers(576)
    size = np.sqrt(np.square(wide(x)).mean(axis=1, keepdims=True) + 1e-5)
    real = max(1, rows - 1)
    seen = wide(jax_native.norm(x, weight, np.array([real], np.int32), 1e-5))
    expected = (wide(x) / size * wide(weight))[:real]
    np.testing.assert_allclose(seen[:real], expected, rtol=0.02, atol=0.02)
    assert not seen[real:].any()


def test_gated_layers_are_those_of_numpy() -> None:
    halves = (wide(numbers(2 * 1536, 576)) / 24).astype(BFLOAT16)
    packed = jax_native.pack(jax_native.interleave(halves))
    gated = jax.jit(lambda x, real: jax_native.gated(x, packed, real))
    for rows in (1, 5, 8, 33):
        x = numbers(rows, 576)
        gate, up = np.split(wide(x) @ wide(halves).T, 2, axis=1)
        seen = wide(gated(x, np.array([rows], np.int32)))
        np.testing.assert_allclose(seen, gate / (1 + np.exp(-gate)) * up, rtol=0.02, atol=0.02)


def test_numbers_that_are_none_stay_so_in_their_rows() -> None:
    x, halves = numbers(3, 64), numbers(128, 64)
    x[1, 7] = np.nan
    real = np.array([3], np.int32)
    plain = jax_native.product(x, jax_native.pack(halves), real, 128, jnp.float32)
    gated = jax_native.gated(x, jax_native.pack(jax_native.interleave(halves)), real)
    for seen in (plain, gated):
        assert np.isnan(wide(seen)).any(axis=1).tolist() == [False, True, False]


def test_a_packed_embedding_is_read_by_rows() -> None:
    weight = numbers(1000, 96)
    places = jnp.array([0, 63, 64, 500, 999, 500])
    found = jax_native.rows(jnp.array(jax_native.pack(weight)), places)
    assert np.array_equal(wide(found), wide(weight[np.asarray(places)]))


SIZES = [(9, 3, 64), (8, 1, 128), (4, 4, 64)]


def both_ways(case: str, sizes: tuple[int, int, int], window: int, *, share: bool) -> list[Any]:
    """What the plain way and the kernel find, and their caches; cells that nobody wrote are NaN.

    ``share``: whether the kernel is told which pages the rows have in common.
    """
    heads, kv_heads, dim = sizes
    layout = layout_of(*CASES[case], np.random.default_rng(3))
    bucket = choose(16, 256, pages=24).fit(layout)
    layout = ordered(layout, bucket)
    step = fields(layout, bucket)
    three = [numbers(bucket.tokens, count, dim) for count in (heads, kv_heads, kv_heads)]
    written = written_cells(layout)[:, None, :, None]
    cache = np.where(written, wide(numbers(PAGES, 2 * kv_heads, PAGE, dim)), np.nan)
    bits = cache.astype(BFLOAT16).view(np.uint16)
    plain = Attention(dim**-0.5, window, kernel=False, compute=jnp.float32)
    found = []
    for way in (plain, replace(plain, native=True)):
        told = step
        if way.native and not share:
            told = {**step, "counts": step["counts"].at[2].set(0)}
        attend = jax.jit(way.attend, static_argnums=3)
        out, after = attend(three, bits, told, bucket)
        found.append((wide(out)[: len(layout.tokens)], np.asarray(after)[1:], wide(out)))
    return found


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("window", [0, 40])
def test_attention_is_that_of_the_plain_way(
    case: str, sizes: tuple[int, int, int], window: int
) -> None:
    plain, native = both_ways(case, sizes, window, share=True)
    np.testing.assert_allclose(native[0], plain[0], rtol=0.03, atol=0.03)
    assert np.array_equal(native[1], plain[1]), "the caches"
    assert np.isfinite(native[2]).all(), "padding, too"


@pytest.mark.parametrize("case", [case for case in CASES if "share" in case])
def test_what_rows_have_in_common_changes_no_bit(case: str) -> None:
    _, together = both_ways(case, SIZES[0], 0, share=True)
    _, apart = both_ways(case, SIZES[0], 0, share=False)
    assert np.array_equal(together[0], apart[0])


def test_the_trial_notices_other_results(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = Attention(0.125, 0, kernel=False, compute=jnp.float32)
    assert jax_native_trial.attends(attention, 4, 2, 64, PAGE)
    right = jax_native.attend
    monkeypatch.setattr(
        jax_native, "attend", lambda *given: (1.1 * right(*given)[0], right(*given)[1])
    )
    assert not jax_native_trial.attends(attention, 4, 2, 64, PAGE)
    assert jax_native_trial.multiplies()
    jax_native_trial.multiplies.cache_clear()
    product = jax_native.product
    monkeypatch.setattr(jax_native, "product", lambda *given: 1.1 * product(*given))
    try:
        assert jax_native_trial.choose("auto", able=True) == (
            False,
            "kernels of our own, about twice as fast, are not used:"
            " they do not compute what numpy does",
        )
    finally:
        jax_native_trial.multiplies.cache_clear()


@pytest.mark.parametrize("sizes", [(4, 2, 32, 16), (4, 2, 320, 16), (65, 1, 64, 16), (4, 2, 64, 8)])
def test_other_attention_is_left_to_the_plain_way(sizes: tuple[int, int, int, int]) -> None:
    assert not jax_native_trial.attends(Attention(1.0, 0, False, jnp.float32), *sizes)


# An engine --------------------------------------------------------------------------------------


def folder(**changes: Any) -> Path:
    """Heads of 64 numbers, which the kernel for attention takes."""
    return tiny_llama_folder(head_dim=64, **changes)


def made(**changes: Any) -> JaxEngine:
    extra = changes.pop("extra", {})
    given = {"model": folder(), "dtype": "bfloat16", **changes}
    return make(extra=tuple(extra.items()), **given)


@pytest.fixture(scope="module", params=["layer", "step"])
def kept(request: pytest.FixtureRequest) -> Iterator[JaxEngine]:
    engine = made(extra={"native": "on", "program": request.param})
    yield engine
    engine.close()


@pytest.fixture
def engine(kept: JaxEngine) -> JaxEngine:
    kept.reset()
    return kept


def programs_of(engine: JaxEngine) -> list[Any]:
    steps = engine._programs._steps
    return [*getattr(steps, "_layer", {}).values(), *getattr(steps, "_step", {}).values()]


def test_kernels_are_used_unasked_wherever_they_can_be() -> None:
    engine = made()
    try:
        assert not engine.describe().warnings
        for program in programs_of(engine):
            text = program.as_text()
            for name in ("norm_bf16", "product_f32", "attend_bf16", "added_bf16", "gated_bf16"):
                assert f'custom_call_target="roundhouse_{name}"' in text
            assert " dot(" not in text
        for head in engine._programs._head.values():
            assert " dot(" not in head.as_text()
    finally:
        engine.close()


def test_off_means_none() -> None:
    engine = made(extra={"native": "off"})
    try:
        assert not any("roundhouse_" in program.as_text() for program in programs_of(engine))
    finally:
        engine.close()


class TestContract(PromptContract, EngineContract):
    """The contract of all engines, kept with the kernels."""

    @pytest.fixture
    def prompts(self, engine: JaxEngine) -> list[list[int]]:
        return prompts_of(engine)


def test_serving_compiles_nothing(engine: JaxEngine) -> None:
    assert compiled_by(lambda: serve_all_shapes(engine)) == []


def test_no_step_copies_the_cache(engine: JaxEngine) -> None:
    for program in programs_of(engine):
        caches = engine._programs._arrays.caches
        assert program.memory_analysis().alias_size_in_bytes == caches[0].nbytes


def test_weights_are_held_once() -> None:
    """Packed, also those of the embedding that the head is tied to."""
    sizes = []
    for native in ("on", "off"):
        engine = made(model=folder(tie_word_embeddings=True), extra={"native": native})
        sizes.append(engine.describe().weight_bytes)
        engine.close()
    assert sizes[1] <= sizes[0] < 1.1 * sizes[1]


def logits(engine: JaxEngine, prompts: list[list[int]], parts: int = 1) -> Any:
    """Behind each prompt, computed in so many parts together with the others'."""
    engine.reset()
    seen: list[Any] = []
    forward = engine._forward
    engine._forward = lambda layout: seen.append(forward(layout)) or seen[-1]  # type: ignore[method-assign]
    for part in range(parts):
        ends = [(len(one) * part // parts, len(one) * (part + 1) // parts) for one in prompts]
        admits = [admit(n, one) for n, one in enumerate(prompts)] if not part else []
        engine.step(Plan(admits=admits, work=[(n, b - a) for n, (a, b) in enumerate(ends)]))
    engine._forward = forward  # type: ignore[method-assign]
    return seen[-1]


@pytest.mark.parametrize("kept", ["layer"], indirect=True)
def test_it_is_as_near_to_single_precision_as_without(kept: JaxEngine) -> None:
    prompts = [[(7 * n + 13 * k) % 250 for k in range(5 + 9 * n)] for n in range(1, 5)]
    exact, plain = (
        made(dtype=dtype, extra={"native": native})
        for dtype, native in (("float32", "auto"), ("bfloat16", "off"))
    )
    try:
        right = logits(exact, prompts)
        errors = [np.square(logits(one, prompts) - right).mean() ** 0.5 for one in (plain, kept)]
        assert errors[1] < 1.2 * errors[0]
    finally:
        exact.close()
        plain.close()


WINDOWED = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 16}


@pytest.mark.parametrize(
    "changes",
    [{"head_dim": 32}, WINDOWED, {"intermediate_size": 200}, {"vocab_size": 301}],
    ids=str,
)
def test_variants_draw_what_they_draw_without(changes: dict[str, Any]) -> None:
    """Heads that the kernel does not take, windows, and layers that do not fill their blocks."""
    agree(tiny_llama_folder(**{"head_dim": 64, "layers": 2, **changes}))


@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_biases_and_norms_of_heads_are_left_to_jax(tmp_path: Path, name: str) -> None:
    agree(member_folder(name, tmp_path / name))


def agree(model: Path) -> None:
    """That logits differ by rounding alone with kernels and without."""
    prompts = [[(7 * n + 13 * k) % 250 for k in range(5 + 9 * n)] for n in range(1, 5)]
    found = []
    for native in ("on", "off"):
        engine = made(model=model, sequences_max=4, step_tokens_max=160, extra={"native": native})
        used = ["roundhouse_" in program.as_text() for program in programs_of(engine)]
        assert all(used) if native == "on" else not any(used)
        found.append(logits(engine, prompts))
        engine.close()
    assert np.abs(found[0] - found[1]).mean() < 0.03 * found[1].std()


# Where there are none ---------------------------------------------------------------------------


@pytest.fixture
def built_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Kernels are looked for in a folder of the test's own, which this is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    jax_native.register.cache_clear()
    yield tmp_path / "cache" / "roundhouse" / "jax"
    jax_native.register.cache_clear()
    monkeypatch.undo()
    jax_native.register()


@pytest.mark.usefixtures("built_anew")
def test_without_a_compiler_jax_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    engine = made(sequences_max=1, step_tokens_max=32)
    try:
        (warning,) = engine.describe().warnings
        assert "no C++ compiler (no-such-compiler)" in warning
        assert not any("roundhouse_" in program.as_text() for program in programs_of(engine))
        assert len(generate(engine, 1, [5, 6, 7], 4)) == 4
    finally:
        engine.close()
    with pytest.raises(ModelError, match=r"native=on: there is no C\+\+ compiler .* leave it out"):
        made(extra={"native": "on"})


def test_a_compiler_that_fails_is_named_in_one_line(
    built_anew: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "wrong.cpp").write_text("this is no program;\n")
    monkeypatch.setattr(jax_native, "SOURCE", tmp_path / "wrong.cpp")
    with pytest.raises(native_build.BuildError, match=r"failed: .*error") as caught:
        jax_native.register()
    assert "\n" not in str(caught.value)
    assert not list(built_anew.iterdir())


def test_float32_has_no_kernels() -> None:
    with pytest.raises(ModelError, match="native=on: the kernels are for bfloat16 weights on CPUs"):
        made(dtype="float32", extra={"native": "on"})
