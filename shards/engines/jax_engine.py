"""JAX for the Llama family, on TPU, GPU and CPU, with tensor parallelism of one process per device.

A step is padded to one of a few shapes whose programs were compiled at load (``jax_programs``), on
a paged KV cache that the programs update in place. Attention is a TPU kernel or plain JAX
(``jax_attention``). Tokens are drawn on the device (``jax_sampling``), except on a CPU, where the
logits are in host memory anyway; what asks for more than it can is drawn by our host's sampler.

Engine options (``--engine-option key=value``):

- ``page_tokens``: tokens of a page of the KV cache; prefixes are shared in whole pages.
- ``attention``: ``plain`` or ``kernel`` (the default on a TPU, and only there).
- ``native``: ``on`` or ``off``: on CPUs, compute by kernels of our own, compiled at load.
- ``program``: ``layer``, one for all layers, or ``step``, one for the whole step, whose decode has
  no loop that depends on data (the default but on a CPU).
- ``triton``: ``on`` or ``off``. On a GPU, whether XLA also tries matrix products of its own, which
  makes loading much longer.
- ``argmax``: ``host`` or ``device``: where steps are drawn in which all rows want the argmax.
- ``sample``: ``device`` or ``host``: where tokens are drawn that ask for no more than temperature,
  top_k, top_p and min_p. Default: on the device, if it is no CPU and draws what the host does.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from shards import gguf_tokenizer, hf_folder
from shards.engines import jax_buckets, jax_config, jax_native_trial
from shards.engines.base import (
    Engine,
    EngineInfo,
    EngineOptions,
    ModelError,
    Progress,
    Scheduling,
)
from shards.engines.caller import Drawing
from shards.engines.draw_trial import trouble
from shards.engines.host_memory import memory_bytes
from shards.engines.jax_attention import KERNEL_HEAD_DIM, Attention
from shards.engines.jax_config import LlamaConfig
from shards.engines.jax_mesh import AXIS, join
from shards.engines.jax_model import Loader, Model
from shards.engines.jax_programs import Logits, Programs
from shards.engines.jax_sampling import DeviceSampler, Pending, lost
from shards.engines.jax_steps import Arrays, Compiler
from shards.engines.paged import PagedEngine
from shards.extras import Extras
from shards.filters import Floats
from shards.gguf_file import NO_MODEL, gguf_file_of, read_metadata
from shards.hf_folder import is_hf_folder
from shards.kv import StepLayout
from shards.residents import Limits, Resident
from shards.sampling import Drawn
from shards.weights import open_weights

SEQUENCES_MAX = 64
STEP_TOKENS_MAX = 512
# A CPU gains nothing from more tokens at once, and others wait longer.
CPU_STEP_TOKENS_MAX = 256
KV_TOKENS_MAX = 32768
# Share of the host's memory that the KV cache may take unasked, where the device has none.
KV_MEMORY_SHARE = 0.25
# Share of what the weights leave free on a device, and what is left at least: programs need that.
KV_DEVICE_SHARE = 0.85
KV_DEVICE_SPARE = 1 << 30
PAGE_TOKENS = 16
# The kernel of the TPU looks pages up in its small scalar memory, so they must not be many.
TPU_PAGE_TOKENS = 128
DTYPES = ("float32", "bfloat16")
PROGRAMS = ("layer", "step")
# XLA multiplies a single row of bfloat16 slower than four rows, ten times on a CPU and twice on a
# GPU: it converts the whole matrix first.
BFLOAT16_LEAST = 4
# Share of the progress that is loading of weights; the rest is compilation.
_LOADING = 0.3


class JaxEngine(PagedEngine):
    """See the module."""

    def __init__(self, options: EngineOptions, progress: Progress) -> None:
        if options.model is None:
            raise ModelError("jax: --model PATH is missing")
        if options.adapters:
            raise ModelError("jax: LoRA adapters are not supported; take the engine torch or vllm")
        weights = open_weights(options.model)
        whole = jax_config.read(weights.config)
        config = whole.local(options.world)
        self._dtype = jnp.dtype(_dtype(options, whole))
        extras = Extras("jax", options.extra)
        self._group = group = join(options)
        on_tpu, on_cpu = group.platform == "tpu", group.platform == "cpu"
        pages = extras.whole("page_tokens", TPU_PAGE_TOKENS if on_tpu else PAGE_TOKENS)
        fits = on_tpu and kernel_fits(config, self._dtype)
        way = extras.choice("attention", "kernel" if fits else "plain", ("kernel", "plain"))
        self._argmax = extras.choice("argmax", "host" if on_cpu else "device", ("host", "device"))
        sample = extras.choice("sample", "host" if on_cpu else "device", ("host", "device"))
        whole_steps = extras.choice("program", "layer" if on_cpu else "step", PROGRAMS) == "step"
        wanted = extras.choice("native", "auto", ("auto", "on", "off"))
        triton = extras.choice("triton", "off", ("off", "on")) == "on"
        extras.finish()
        if way == "kernel" and not on_tpu:
            raise ModelError("jax: attention=kernel needs a TPU")
        able = on_cpu and self._dtype == jnp.bfloat16
        native, unused = jax_native_trial.choose(wanted, able=able)
        self._native = native = bool(group.least("native", int(native)))
        loader = Loader(weights, whole, group, self._dtype, native=self._native)
        outside = loader.outside()
        layers = []
        for number in range(config.layers):
            layers.append(loader.layer(number))
            progress(_LOADING * (number + 1) / config.layers)
        self._kernel = way == "kernel"
        limits = self._limit(options, whole, config, max(1, pages))
        super().__init__(limits)
        self._files = _tokenizer_files(options)
        together = config.layers if whole_steps else 1
        caches = [self._cache(whole, limits, together) for _ in range(config.layers // together)]
        buckets = self._buckets(limits, wide=whole_steps and not (self._kernel or self._native))
        compiler = Compiler(
            group, {} if on_cpu or on_tpu else {"xla_gpu_enable_triton_gemm": triton}
        )
        drawer = None
        if sample == "device":
            counts = buckets.draw_counts
            drawer = DeviceSampler(whole.vocab_size, self._sampler, compiler, counts)
        self._programs = Programs(
            Model(config, whole.vocab_size, self._dtype, self._attention(config, limits), native),
            compiler,
            Arrays(outside, layers, caches),
            buckets,
            lambda done: progress(_LOADING + (1 - _LOADING) * done),
            whole=whole_steps,
            best=self._argmax == "device",
            drawer=drawer,
        )
        self._drawer, warnings = self._try(drawer)
        warnings += (unused,) if unused else ()
        self._info = self._describe(options, _bytes([outside, *layers]), warnings)
        group.meet("loaded")

    # What it is made of --------------------------------------------------------------------------

    def _limit(
        self, options: EngineOptions, whole: LlamaConfig, config: LlamaConfig, page_tokens: int
    ) -> Limits:
        tokens = options.kv_tokens or self._group.least("kv", self._room(whole, config))
        kv_tokens = tokens // page_tokens * page_tokens
        if not kv_tokens:
            raise ModelError(f"jax: {tokens} KV tokens are less than a page of {page_tokens}")
        step = CPU_STEP_TOKENS_MAX if self._group.platform == "cpu" else STEP_TOKENS_MAX
        return Limits(
            kv_tokens=kv_tokens,
            page_tokens=page_tokens,
            sequences_max=options.sequences_max or SEQUENCES_MAX,
            step_tokens_max=options.step_tokens_max or step,
            length_max=min(whole.length_max, kv_tokens),
            vocab_size=whole.vocab_size,
        )

    def _room(self, whole: LlamaConfig, config: LlamaConfig) -> int:
        """Tokens of KV cache when nobody says."""
        elements = 2 * config.layers * config.kv_heads * self._head_dim(config)
        per_token = elements * int(self._dtype.itemsize)
        stats = self._group.device.memory_stats()
        if stats and "bytes_limit" in stats:
            return cache_share(stats["bytes_limit"] - stats.get("bytes_in_use", 0)) // per_token
        room = int(memory_bytes() * KV_MEMORY_SHARE) // per_token
        return min(room, max(KV_TOKENS_MAX, whole.length_max // 8))

    def _head_dim(self, config: LlamaConfig) -> int:
        """Elements of a head in the cache: the kernel wants them filled up."""
        if not self._kernel:
            return config.head_dim
        return -(-config.head_dim // KERNEL_HEAD_DIM) * KERNEL_HEAD_DIM

    def _cache(self, whole: LlamaConfig, limits: Limits, layers: int) -> Array:
        """Keys and values of some layers; see ``jax_attention``. Page 0 of each is the trash."""
        pages = layers * (limits.kv_tokens // limits.page_tokens + 1)
        heads, size = 2 * whole.kv_heads, self._head_dim(whole)
        if self._kernel:
            shape = (pages, limits.page_tokens, heads, size)
            sharding = self._group.sharding(None, None, AXIS, None)
        else:
            shape = (pages, heads, limits.page_tokens, size)
            sharding = self._group.sharding(None, AXIS, None, None)
        bits = self._group.platform == "cpu" and self._dtype == jnp.bfloat16
        return jnp.zeros(shape, jnp.uint16 if bits else self._dtype, device=sharding)

    def _attention(self, config: LlamaConfig, limits: Limits) -> Any:
        """By the window of the layer. CPUs multiply float32 faster, in small pieces above all."""
        sizes = (config.heads, config.kv_heads, config.head_dim, limits.page_tokens)
        compute = jnp.float32 if self._group.platform == "cpu" else self._dtype
        scale = float(config.head_dim) ** -0.5
        native = self._native and all(
            jax_native_trial.attends(Attention(scale, window, False, compute), *sizes)
            for window in set(config.windows)
        )
        return lambda window: Attention(scale, window, self._kernel, compute, native)

    def _buckets(self, limits: Limits, *, wide: bool) -> jax_buckets.Buckets:
        pages = -(-limits.length_max // limits.page_tokens)
        platform = self._group.platform
        slow = platform != "tpu" and self._dtype == jnp.bfloat16 and not self._native
        least = BFLOAT16_LEAST if slow else 1
        most = (limits.sequences_max, limits.step_tokens_max)
        return jax_buckets.choose(*most, pages, least, wide=wide)

    def _try(self, drawer: DeviceSampler | None) -> tuple[DeviceSampler | None, tuple[str, ...]]:
        """What draws on the device, or None, and what to warn of. All ranks get the same."""
        if drawer is None:
            return None, ()
        size = self._residents.limits.vocab_size
        fault = drawer.fault or trouble(drawer.draw_host, self._sampler, size)
        if self._group.least("sample", int(not fault)):
            return drawer, ()
        fault = fault or "another rank's device does not draw what the host does"
        what = f"not on {self._group.device_name}"
        return None, (f"tokens are drawn on the host, {what}: {fault}",)

    def _describe(
        self, options: EngineOptions, weight_bytes: int, warnings: tuple[str, ...]
    ) -> EngineInfo:
        limits, group = self._residents.limits, self._group
        assert options.model is not None, "checked by the caller"
        return EngineInfo(
            engine="jax",
            engine_version=jax.__version__,
            device=group.device_name,
            model_id=options.model_id,
            dtype=self._dtype.name,
            scheduling=Scheduling.CALLER,
            kv_tokens=limits.kv_tokens,
            page_tokens=limits.page_tokens,
            sequences_max=limits.sequences_max,
            step_tokens_max=limits.step_tokens_max,
            length_max=limits.length_max,
            vocab_size=limits.vocab_size,
            eos_token_ids=_ends(options),
            features=(
                *("logprobs", "penalties", "seed", "logit_bias", "min_tokens", "typical_p"),
                *("prefix_sharing", "prompt_logprobs", "grammar", "ranks", "watermark"),
            ),
            rank=group.rank,
            world=group.world,
            weight_bytes=weight_bytes,
            warnings=warnings,
        )

    # What it does --------------------------------------------------------------------------------

    def describe(self) -> EngineInfo:
        """See ``Engine``."""
        return self._info

    def tokenizer_files(self) -> dict[str, bytes]:
        """The model's own, or the vocabulary of the GGUF file, converted."""
        return self._files

    def close(self) -> None:
        """Leaves the group of ranks. The device's memory is freed with the engine."""
        self._sampler.close()
        self._group.close()

    def _draw(self, layout: StepLayout, rows: Sequence[Resident]) -> Drawing:
        """Draws where it was asked for. What a device draws is not brought to the host."""
        plain = all(row.plain for row in rows)
        if self._argmax == "host" if plain else self._drawer is None:
            logits_here = self._forward(layout)
            self._settle_before()
            return self._sampler.draw(logits_here, rows) if rows else Drawn([])
        try:
            logits = self._computed(layout)
            if logits.draws is None:
                return Drawn([])
            if plain:
                return self._keep(self._begin_best(logits, rows))
            assert self._drawer is not None, "or the host draws"
            bring = partial(_brought, logits, len(rows))
            return self._keep(self._drawer.begin(logits.draws, rows, bring))
        except jax.errors.JaxRuntimeError as error:
            raise lost(error) from error

    def _keep(self, pending: Pending) -> Drawing:
        """Leaves tokens on the device for the next step, if that can begin without the host."""
        if pending.late is not None and self._group.world == 1:
            self._programs.late = pending.late
            return pending
        self._settle_before()
        return pending.take()

    def _begin_best(self, logits: Logits, rows: Sequence[Resident]) -> Pending:
        best: Any = logits.best
        best.copy_to_host_async()
        return Pending((best,), logits.late, lambda: self._best(best, rows))

    def _best(self, best: Any, rows: Sequence[Resident]) -> Drawn:
        """The likeliest tokens, as ``Model.best`` tells them."""
        ids, tops = _host(best)[:, : len(rows)]
        tops = tops.view(np.float32)
        # The sampler judges the largest logits, of which it sees nothing else.
        drawn = self._sampler.draw(tops[:, None], rows)
        drawn.tokens = [
            0 if index in drawn.failures else token for index, token in enumerate(ids.tolist())
        ]
        return drawn

    def _forward(self, layout: StepLayout) -> Floats:
        try:
            draws = self._computed(layout).draws
            found: Floats = np.empty((0, self._info.vocab_size), np.float32)
            if draws is not None:
                found = _host(draws)[: len(layout.draws)]
        except jax.errors.JaxRuntimeError as error:
            raise lost(error) from error
        return found

    def _computed(self, layout: StepLayout) -> Logits:
        """Computes a step, and scores the prompts that want it."""
        logits = self._programs.run(layout)
        if len(layout.scores):
            self._score(_joined(logits.scores))
        return logits


def _brought(logits: Logits, count: int, rows: Sequence[int]) -> Floats:
    """The logits of some of the ``count`` sequences that draw, in host memory."""
    if len(rows) == count:
        found: Floats = _host(logits.draws)[:count]
        return found
    return _joined(logits.of(rows))


def _joined(pieces: Iterator[tuple[Array, int]]) -> Floats:
    """Logits in host memory, of which so many rows of each piece are meant."""
    found: Floats = np.concatenate([_host(rows)[:count] for rows, count in pieces])
    return found


def _host(value: Any) -> Any:
    """An array that is the same on all ranks, in host memory."""
    return np.asarray(value.addressable_data(0))


def _dtype(options: EngineOptions, config: LlamaConfig) -> str:
    """Element type of weights, activations and cache: the model's own unless the user says."""
    if options.dtype and options.dtype not in DTYPES:
        raise ModelError(f"jax: --dtype {options.dtype} is not one of {', '.join(DTYPES)}")
    stored = config.stored_dtype if config.stored_dtype in DTYPES else "bfloat16"
    return options.dtype or stored


def cache_share(free: int) -> int:
    """How many of a device's free bytes the KV cache takes unasked.

    JAX counts as free what is left of its own pool, three quarters of a GPU's memory.
    """
    return max(0, min(int(free * KV_DEVICE_SHARE), free - KV_DEVICE_SPARE))


def kernel_fits(config: LlamaConfig, dtype: Any) -> bool:
    """Whether the kernel can cut this rank's KV heads into the tiles of a TPU."""
    tiles, rest = divmod(2 * config.kv_heads * dtype.itemsize, 4)
    return rest == 0 and (tiles in (1, 2, 4) or tiles % 8 == 0)


def _bytes(trees: Any) -> int:
    """Bytes of this rank's part of all arrays; those that are in two places count once."""
    leaves = {id(leaf): leaf for leaf in jax.tree.leaves(trees)}
    return sum(leaf.addressable_data(0).nbytes for leaf in leaves.values())


def _ends(options: EngineOptions) -> tuple[int, ...]:
    assert options.model is not None, "checked by the caller"
    if is_hf_folder(options.model):
        return hf_folder.eos_token_ids(options.model, hf_folder.read_config(options.model))
    config = open_weights(options.model).config
    return tuple(config["eos_token_id"])


def _tokenizer_files(options: EngineOptions) -> dict[str, bytes]:
    assert options.model is not None, "checked by the caller"
    if is_hf_folder(options.model):
        return hf_folder.tokenizer_files(options.model)
    path = gguf_file_of(options.model, NO_MODEL)
    return gguf_tokenizer.tokenizer_files(path, read_metadata(path))


def load(options: EngineOptions, progress: Progress) -> Engine:
    """Makes the engine; see ``shards.engines``."""
    try:
        return JaxEngine(options, progress)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).split("\n", maxsplit=1)[0]
        raise ModelError(f"jax: {options.model_id} cannot be loaded: {reason}") from error
