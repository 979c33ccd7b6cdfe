"""The plain attention, and our layout in the kernel's arguments, against the package's reference.

The reference is the pure-JAX function that comes with the TPU kernel.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.mesh import AbstractDevice
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import (
    ragged_paged_attention,
    ref_ragged_paged_attention,
)
from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import get_min_heads_per_blk

from shards.engines import jax_attention, jax_config
from shards.engines.jax_attention import Attention, kernel, plain, write
from shards.engines.jax_buckets import Bucket, choose, pack
from shards.engines.jax_engine import kernel_fits
from shards.kv import TRASH, StepLayout

PAGE = 16
PAGES = 96
BASE = {
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "num_hidden_layers": 2,
    "hidden_size": 96,
    "intermediate_size": 192,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
# Sequences as (tokens known before the step, tokens of the step), and how many of the first pages
# they all share.
CASES: dict[str, tuple[list[tuple[int, int]], int]] = {
    "one row": ([(0, 1)], 0),
    "rows of many lengths": ([(5, 1), (200, 1), (0, 1), (127, 1), (128, 1)], 0),
    "rows that share": ([(70, 1), (64, 1), (200, 1)], 4),
    "rows that share more than a piece": ([(230, 1), (161, 1), (180, 1), (199, 1)], 10),
    "one block": ([(0, 10)], 0),
    "several blocks": ([(130, 150)], 0),
    "rows behind blocks": ([(3, 20), (40, 1), (0, 70), (9, 1), (100, 64)], 0),
    "more rows than a group": ([(7 * n, 1) for n in range(11)] + [(17, 33)], 0),
    "rows that share beside a block": ([(70, 1), (66, 5), (80, 1), (64, 1)], 4),
}
# Those that are computed with a window too; the reference is slow.
WINDOWED = ("rows of many lengths", "rows that share more than a piece", "rows behind blocks")
ROWS_ALONE = [case for case, (rows, _) in CASES.items() if all(count == 1 for _, count in rows)]


def layout_of(
    sequences: Sequence[tuple[int, int]], shared: int, random: np.random.Generator
) -> StepLayout:
    free = list(random.permutation(np.arange(1, PAGES)))
    common = [free.pop() for _ in range(shared)]
    tables = []
    for known, count in sequences:
        need = -(-(known + count) // PAGE)
        tables.append(common + [free.pop() for _ in range(need - shared)])
    table = np.full((len(tables), max(map(len, tables))), TRASH, np.int32)
    for index, pages in enumerate(tables):
        table[index, : len(pages)] = pages
    counts = [count for _, count in sequences]
    places = np.concatenate([np.arange(k, k + c) for k, c in sequences]).astype(np.int32)
    owner = np.repeat(np.arange(len(counts)), counts)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    return StepLayout(
        tokens=random.integers(0, 9, len(places), np.int32),
        positions=places,
        cells=table[owner, places // PAGE] * np.int32(PAGE) + places % np.int32(PAGE),
        starts=starts,
        lengths=np.array([known + count for known, count in sequences], np.int32),
        tables=table,
        draws=starts[1:] - 1,
    )


def fit(layout: StepLayout) -> Bucket:
    return choose(16, 256, pages=24).fit(layout)


def fields(layout: StepLayout, bucket: Bucket) -> dict[str, jax.Array]:
    vector = jnp.array(pack(layout, bucket))
    return {name: vector[span].reshape(shape) for name, span, shape in bucket.spans()}


def made(heads: int, kv_heads: int, dim: int, tokens: int) -> tuple[jax.Array, jax.Array]:
    """Queries, and a cache in which what nobody may look at is not a number."""
    random = np.random.default_rng(4)
    queries = random.standard_normal((tokens, heads, dim), np.float32)
    cache = random.standard_normal((PAGES, PAGE, 2 * kv_heads, dim), np.float32)
    return jnp.array(queries), jnp.array(cache)


def by_heads(cache: jax.Array) -> jax.Array:
    """The kernel's cache as the plain way has it."""
    return jnp.concatenate((cache[:, :, 0::2], cache[:, :, 1::2]), axis=2).swapaxes(1, 2)


def written_cells(layout: StepLayout) -> Any:
    """Which cells [pages, page] hold what somebody may look at; padding looks at the trash."""
    written = np.zeros((PAGES, PAGE), bool)
    written[TRASH] = True
    for pages, length in zip(layout.tables, layout.lengths, strict=True):
        written[pages[np.arange(length) // PAGE], np.arange(length) % PAGE] = True
    return written


def reference(tokens: int) -> Callable[..., Any]:
    """The package's function; it returns the rows of real tokens only.

    Its slices are as long as the sequences: called as it is, it would compile each operation anew
    for each length. So it is one program, in which lengths and tables are constants.
    """

    def padded(queries: Any, cache: Any, *step: Any, **options: Any) -> Any:
        known = [np.asarray(values) for values in step]
        function = jax.jit(lambda *data: ref_ragged_paged_attention(*data, *known, **options))
        out = function(queries, cache)
        return jnp.pad(out, ((0, tokens - len(out)), (0, 0), (0, 0)))

    return padded


@pytest.mark.parametrize(
    ("case", "window"), [*((case, 0) for case in CASES), *((case, 24) for case in WINDOWED)]
)
def test_the_plain_way_is_as_the_reference(case: str, window: int) -> None:
    layout = layout_of(*CASES[case], np.random.default_rng(3))
    bucket = fit(layout)
    step = fields(layout, bucket)
    attention = Attention(0.3, window, kernel=False, compute=jnp.float32)
    queries, cache = made(6, 2, 32, bucket.tokens)
    expected = kernel(queries, cache, step, attention, reference(bucket.tokens))
    function = jax.jit(partial(plain, bucket=bucket, attention=attention))
    found = function(queries, by_heads(cache), step)
    count = len(layout.tokens)
    np.testing.assert_allclose(found[:count], expected[:count], atol=2e-5)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("bytes_at_once", [jax_attention.GATHER_BYTES, 1 << 16], ids=["one", "few"])
@pytest.mark.parametrize("case", ROWS_ALONE)
def test_a_wide_bucket_is_as_the_reference(
    case: str, bytes_at_once: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one piece and in several, of which the last has more pages than the table."""
    monkeypatch.setattr(jax_attention, "GATHER_BYTES", bytes_at_once)
    layout = layout_of(*CASES[case], np.random.default_rng(3))
    bucket = choose(16, 256, pages=21, wide=True).fit(layout)
    assert bucket.wide
    step = fields(layout, bucket)
    attention = Attention(0.3, window, kernel=False, compute=jnp.float32)
    queries, cache = made(6, 2, 32, bucket.tokens)
    expected = kernel(queries, cache, step, attention, reference(bucket.tokens))
    written = written_cells(layout)[:, :, None, None]
    cache = jnp.where(written, cache, jnp.nan)
    function = jax.jit(partial(plain, bucket=bucket, attention=attention))
    found = function(queries, by_heads(cache), step)
    count = len(layout.tokens)
    np.testing.assert_allclose(found[:count], expected[:count], atol=2e-5)
    assert np.isfinite(found).all()


def test_the_rows_of_a_wide_bucket_have_no_loop_that_data_ends() -> None:
    """A loop over a number that is known is a scan, and one piece is no loop at all."""
    bucket = Bucket(4, 4, 16, mixed=False, wide=True)
    loops = []
    for wide in (True, False):
        bucket = replace(bucket, wide=wide)
        step = {name: jnp.zeros(shape, jnp.int32) for name, _, shape in bucket.spans()}
        attention = Attention(0.3, 0, kernel=False, compute=jnp.float32)
        queries, cache = made(6, 2, 32, bucket.tokens)
        traced = jax.make_jaxpr(partial(plain, bucket=bucket, attention=attention))
        text = str(traced(queries, by_heads(cache), step))
        loops.append("while" in text or "scan" in text)
    assert loops == [False, True]


def test_buckets_are_as_wide_as_the_longest_table() -> None:
    buckets = choose(16, 256, pages=100, wide=True)
    assert {(b.sequences, b.pages) for b in buckets.decodes} == {
        (rows, pages) for rows in (1, 4, 8, 16) for pages in (16, 32, 64, 100)
    }
    assert buckets.draw_counts == (1, 4, 8, 16)
    for length, pages in (
        (1, 16),
        (16 * PAGE - 1, 16),
        (16 * PAGE, 32),
        (40 * PAGE, 64),
        (90 * PAGE, 100),
    ):
        layout = layout_of([(length, 1)], 0, np.random.default_rng(3))
        assert buckets.fit(layout).pages == pages
    assert all(bucket.mixed and not bucket.wide for bucket in buckets.mixed)


@pytest.mark.parametrize("case", ["rows that share", "rows behind blocks"])
def test_cells_that_are_not_written_yet_do_not_matter(case: str) -> None:
    """A page that was another sequence's may hold anything, also what is not a number."""
    layout = layout_of(*CASES[case], np.random.default_rng(3))
    bucket = fit(layout)
    step = fields(layout, bucket)
    attention = Attention(0.3, 0, kernel=False, compute=jnp.float32)
    queries, cache = made(6, 2, 32, bucket.tokens)
    spoiled = jnp.where(written_cells(layout)[:, :, None, None], cache, jnp.nan)
    function = jax.jit(partial(plain, bucket=bucket, attention=attention))
    count = len(layout.tokens)
    expected = function(queries, by_heads(cache), step)[:count]
    found = function(queries, by_heads(spoiled), step)[:count]
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", ["rows of many lengths", "rows behind blocks"])
def test_heads_are_filled_up_for_the_kernel(case: str) -> None:
    """Heads of 64 in a cache for the kernel's 128, as a model with such heads has them on a TPU."""
    layout = layout_of(*CASES[case], np.random.default_rng(5))
    bucket = fit(layout)
    step = fields(layout, bucket)
    attention = Attention(0.3, 24, kernel=True, compute=jnp.float32)
    queries, narrow = made(4, 2, 64, bucket.tokens)
    wide = jnp.pad(narrow, ((0, 0), (0, 0), (0, 0), (0, 64)))
    expected = kernel(queries, narrow, step, attention, reference(bucket.tokens))
    found = kernel(queries, wide, step, attention, reference(bucket.tokens))
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert not np.asarray(found[len(layout.tokens) :]).any()


@pytest.mark.parametrize("window", [0, 24])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_kernel_is_lowered_for_a_tpu_with_our_layout(dtype: Any, window: int) -> None:
    """No TPU is needed for that; the interpreter of this release cannot run this kernel."""
    bucket = Bucket(64, 16, 24, mixed=True)
    step = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name, _, shape in bucket.spans()}
    attention = Attention(0.3, window, kernel=True, compute=dtype)
    # What it would look up by the name of the device.
    sizes = {"num_kv_pages_per_block": 4, "num_queries_per_block": 16}
    function = partial(ragged_paged_attention, **sizes)
    queries = jax.ShapeDtypeStruct((bucket.tokens, 8, 64), dtype)
    cache = jax.ShapeDtypeStruct((PAGES, PAGE, 4, 128), dtype)
    device = AbstractDevice("TPU v5 lite", num_cores=1, platform="tpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    attend = jax.jit(partial(kernel, attention=attention, function=function))
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = attend.trace(queries, cache, step).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


def test_heads_that_the_kernel_refuses_are_known() -> None:
    fits = 0
    for kv_heads in range(1, 33):
        config = replace(jax_config.read(BASE), heads=2 * kv_heads, kv_heads=kv_heads)
        for dtype in (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)):
            try:
                get_min_heads_per_blk(2 * kv_heads, 2 * kv_heads, dtype, dtype)
                takes = True
            except ValueError:
                takes = False
            assert kernel_fits(config, dtype) == takes
            fits += takes
    assert 10 < fits < 50


def test_bfloat16_is_kept_as_its_bits_and_comes_back() -> None:
    layout = layout_of(*CASES["rows that share"], np.random.default_rng(3))
    bucket = fit(layout)
    step = fields(layout, bucket)
    attention = Attention(0.3, 0, kernel=False, compute=jnp.float32)
    queries, cache = made(6, 2, 32, bucket.tokens)
    rounded = cache.astype(jnp.bfloat16).astype(jnp.float32)
    bits = write(
        jnp.zeros(by_heads(cache).shape, jnp.uint16),
        rounded[:, :, 0::2].reshape(-1, 2, 32),
        rounded[:, :, 1::2].reshape(-1, 2, 32),
        jnp.arange(PAGES * PAGE),
    )
    function = jax.jit(partial(plain, bucket=bucket, attention=attention))
    count = len(layout.tokens)
    expected = function(queries, by_heads(rounded), step)[:count]
    np.testing.assert_allclose(function(queries, bits, step)[:count], expected, atol=1e-6)


@pytest.mark.parametrize("kernel", [False, True])
def test_padding_writes_to_the_trash_page_alone(kernel: bool) -> None:
    layout = layout_of(*CASES["several blocks"], np.random.default_rng(3))
    bucket = fit(layout)
    step = fields(layout, bucket)
    assert bucket.tokens > len(layout.tokens)
    cache = jnp.zeros((PAGES, PAGE, 4, 32))
    ones = jnp.ones((bucket.tokens, 2, 32))
    attention = Attention(0.3, 0, kernel=kernel, compute=jnp.float32)
    cache = cache if kernel else by_heads(cache)
    assert attention.page_tokens(cache) == PAGE
    after = attention.write(cache, ones, 2 * ones, step["cells"])
    cells = np.asarray(after if kernel else after.swapaxes(1, 2)).reshape(PAGES * PAGE, 4, 32)
    touched = set(np.flatnonzero(cells.any(axis=(1, 2))).tolist())
    assert touched == set(layout.cells.tolist()) | {0}
    cell = cells[layout.cells[0]]
    keys, values = (cell[0::2], cell[1::2]) if kernel else (cell[:2], cell[2:])
    assert (keys == 1).all()
    assert (values == 2).all()
