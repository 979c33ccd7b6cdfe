"""llama.cpp with continuous batching: any GGUF model, on CPU or what the build supports.

Each resident sequence has one llama.cpp sequence id, its slot, in one unified KV cache. A step is
one ``llama_decode`` of all work, prefill chunks and decodes alike; sampling is ours. With LoRA
adapters it is one ``llama_decode`` for each adapter that the work names, the model itself included.

Engine options (``--engine-option key=value``):

- ``flash``: ``on``, ``off`` or ``auto``. On decodes many sequences faster, and is the default on a
  CPU; ``auto``, the default on an accelerator, is on if the accelerator can.
- ``ubatch_tokens``: how many tokens llama.cpp computes at once inside a step.
- ``exact=1``: logits do not depend on what else is in the batch, on the number of threads, nor on
  how a sequence was cut into chunks. Costs prefill speed: flash attention on, and at most 63 tokens
  at once, because from 64 on another attention kernel runs. They still depend on where llama.cpp
  put a sequence's tokens: in memory that ended sequences left in pieces, attention adds up in
  another order, and quantised models make 0.1 in a log probability of that rounding. On a CPU only.
- ``gpu_layers``: layers to keep on accelerators, if the build has any. Default: all. None, or
  ``--device cpu``, leaves the accelerators alone; ``--device cuda:1`` takes one of several.
- ``embeddings=1``: can embed too, 64 tokens between two steps. Costs the memory of a second, small
  context, most of which is 256 bytes times the vocabulary. Models whose tokens see those behind
  them embed an input at once, and need 4 bytes times the vocabulary for each of ``embed_tokens``.
- ``embed_tokens``: the longest input to embed.
- ``pooling``: ``mean``, ``first`` or ``last`` token. Default: what the file says; models that were
  made to generate say nothing, and the state of the last token stands for the input.
"""

from collections.abc import Iterator, Sequence
from importlib.metadata import version

import numpy as np
from numpy.typing import NDArray

from shards.engines.base import (
    Engine,
    EngineInfo,
    EngineOptions,
    ModelError,
    Progress,
    Scheduling,
    Vectors,
)
from shards.engines.caller import CallerEngine, Work
from shards.engines.llama_devices import accelerators, choose
from shards.engines.llama_embed import (
    POOLINGS,
    EmbeddingContext,
    is_causal,
    pooling_of,
    tokens_at_once,
)
from shards.engines.llama_native import (
    FLASH,
    Adapter,
    Batch,
    Context,
    ContextSizes,
    Model,
    has_openmp,
)
from shards.engines.llama_sizes import (
    adapter_file,
    kv_memory_bytes,
    kv_tokens_default,
    layers_of,
)
from shards.engines.llama_threads import ThreadPool
from shards.engines.threads import ThreadControl
from shards.extras import Extras
from shards.gguf_file import dtype_name, gguf_file_of, read_metadata
from shards.gguf_tokenizer import tokenizer_files
from shards.prompt_logprobs import targets_of
from shards.residents import Limits, Resident
from shards.sampling import Drawn, Sampler

SEQUENCES_MAX = 64
# llama.cpp's own bound (LLAMA_MAX_SEQ).
SEQUENCES_LIMIT = 256
STEP_TOKENS_MAX = 256
UBATCH_TOKENS = 128
EXACT_UBATCH_TOKENS = 63
# What llama.cpp itself takes: an accelerator needs many tokens at once to be busy.
ACCELERATOR_STEP_TOKENS_MAX = 2048
ACCELERATOR_UBATCH_TOKENS = 512
EMBED_TOKENS = 512
EMBED_SEQUENCES = 64
# Every decoded token reads the mask of all cells up to the last one in use, whoever uses it. For a
# small model on a CPU 8,192 foreign cells cost as much as half of the computation of one sequence,
# and three times that of a batch. So few ended sequences are worth keeping. Large models, and
# accelerators, have other worries.
DONOR_TOKENS_SMALL = 512
SMALL_BYTES = 1 << 30
_ALL_LAYERS = 999
# tokenizer.ggml.token_type: control and user-defined tokens, among which the ends are.
_SPECIAL_TYPES = (3, 4)


class LlamaCppEngine(CallerEngine):
    """See the module."""

    def __init__(self, options: EngineOptions, progress: Progress) -> None:
        if options.world > 1:
            raise ModelError(
                "llamacpp: cannot be one of several ranks: start it with --num-shard 1 (one process"
                " spreads layers over its devices), or take an engine with tensor parallelism"
            )
        if options.model is None:
            raise ModelError("llamacpp: --model PATH is missing")
        self._path = gguf_file_of(options.model)
        self._metadata = read_metadata(self._path)
        extras = Extras("llamacpp", options.extra)
        exact = extras.whole("exact", 0) > 0
        gpu_layers = extras.whole("gpu_layers", _ALL_LAYERS)
        found = choose(accelerators(), options.device)
        devices = self._devices = found if gpu_layers > 0 else []
        if exact and devices:
            raise ModelError("llamacpp: exact=1 holds on a CPU only: add --device cpu")
        flash = extras.choice("flash", "auto" if devices else "on", tuple(FLASH))
        ubatch = extras.whole(
            "ubatch_tokens", ACCELERATOR_UBATCH_TOKENS if devices else UBATCH_TOKENS
        )
        embed_tokens = extras.whole("embed_tokens", EMBED_TOKENS)
        pooling = extras.choice("pooling", "", ("", *POOLINGS))
        embeds = extras.whole("embeddings", 0) > 0
        extras.finish()
        # What stays on the CPU is looking up the tokens, which more threads only wait for.
        self._control = ThreadControl(
            options.threads or (1 if devices and gpu_layers > layers_of(self._metadata) else 0)
        )
        self._pool = ThreadPool(self._control.threads)  # the most that it will ever say
        self._control.start()
        self._model = Model(self._path, gpu_layers, progress, devices)
        if not self._model.decodes:
            raise ModelError(f"model file {self._path}: is not a decoder-only language model")
        self._spare = 1 if exact else 0
        if exact:
            ubatch, flash = EXACT_UBATCH_TOKENS, "on"
        sizes = self._sizes(options, ubatch, flash)
        self._ubatch_tokens = sizes.ubatch_tokens
        self._context = Context(self._model, sizes, self._pool)
        self._limits = self._limit(sizes)
        super().__init__(self._limits)
        self._sampler = Sampler(self._model.vocab_size)
        self._batch = Batch(sizes.step_tokens_max, sizes.sequences_max)
        self._adapters: dict[str, Adapter | None] = {"": None}
        for name, path in options.adapters:
            self._adapters[name] = self._model.adapter(name, adapter_file(name, path))
        self._embed_tokens = min(embed_tokens, self._model.length_trained) if embeds else 0
        self._embedder = self._make_embedder(sizes, pooling) if embeds else None
        self._info = self._describe(options)

    def _sizes(self, options: EngineOptions, ubatch: int, flash: str) -> ContextSizes:
        """Room for what is asked for, and for the token and the sequence that fill up ubatches."""
        most = SEQUENCES_LIMIT - self._spare
        if options.sequences_max > most:
            raise ModelError(f"llamacpp: --sequences-max is at most {most}")
        step_tokens = options.step_tokens_max or (
            ACCELERATOR_STEP_TOKENS_MAX if self._devices else STEP_TOKENS_MAX
        )
        kv_tokens = options.kv_tokens or kv_tokens_default(
            self._metadata, self._model.length_trained, kv_memory_bytes(self._devices)
        )
        return ContextSizes(
            kv_tokens=kv_tokens + self._spare,
            sequences_max=(options.sequences_max or SEQUENCES_MAX) + self._spare,
            step_tokens_max=step_tokens + self._spare,
            ubatch_tokens=max(1, min(ubatch, step_tokens)),
            threads=self._control.threads,
            flash=flash,
        )

    def _make_embedder(self, sizes: ContextSizes, pooling: str) -> EmbeddingContext:
        tokens = self._embed_tokens
        if tokens < 1:
            raise ModelError("llamacpp: engine option embed_tokens must be at least 1")
        causal = is_causal(self._metadata)
        at_once = tokens_at_once(tokens, causal=causal)
        small = ContextSizes(
            kv_tokens=tokens,
            sequences_max=min(at_once, EMBED_SEQUENCES),
            step_tokens_max=at_once,
            ubatch_tokens=at_once,
            threads=sizes.threads,
            flash=sizes.flash,
        )
        kind = POOLINGS[pooling] if pooling else pooling_of(self._path, self._metadata)
        return EmbeddingContext(self._model, small, self._pool, kind, causal=causal)

    def _limit(self, sizes: ContextSizes) -> Limits:
        kv_tokens = self._context.kv_tokens - self._spare
        return Limits(
            kv_tokens=kv_tokens,
            page_tokens=1,
            sequences_max=sizes.sequences_max - self._spare,
            step_tokens_max=sizes.step_tokens_max - self._spare,
            length_max=min(self._model.length_trained, kv_tokens),
            vocab_size=self._model.vocab_size,
        )

    def _describe(self, options: EngineOptions) -> EngineInfo:
        features = ["logprobs", "penalties", "seed", "logit_bias", "min_tokens", "typical_p"]
        features += ["prompt_logprobs", "grammar", "ranks", "watermark"]
        if self._model.shares_prefix:
            features.append("prefix_sharing")
        if options.adapters:
            features.append("lora")
        if self._embedder is not None:
            features.append("embeddings")
        limits = self._limits
        return EngineInfo(
            engine="llamacpp",
            engine_version=version("llama-cpp-python"),
            device=", ".join(device.title for device in self._devices) or "cpu",
            model_id=options.model_id,
            dtype=dtype_name(self._metadata),
            scheduling=Scheduling.CALLER,
            kv_tokens=limits.kv_tokens,
            page_tokens=limits.page_tokens,
            sequences_max=limits.sequences_max,
            step_tokens_max=limits.step_tokens_max,
            length_max=limits.length_max,
            vocab_size=limits.vocab_size,
            eos_token_ids=self._ends(),
            features=tuple(features),
            weight_bytes=self._model.weight_bytes,
            warnings=_warnings(),
            donor_tokens_max=DONOR_TOKENS_SMALL if self._small() else 0,
            adapters=tuple(name for name, _ in options.adapters),
            embed_tokens_max=self._embed_tokens,
        )

    def _small(self) -> bool:
        return self._model.weight_bytes < SMALL_BYTES and not self._devices

    def _ends(self) -> tuple[int, ...]:
        kinds = self._metadata.get("tokenizer.ggml.token_type", [])
        special = [token for token, kind in enumerate(kinds) if kind in _SPECIAL_TYPES]
        return tuple(token for token in special if self._model.ends_generation(token))

    def describe(self) -> EngineInfo:
        """See ``Engine``."""
        return self._info

    def tokenizer_files(self) -> dict[str, bytes]:
        """The vocabulary of the GGUF file, converted."""
        return tokenizer_files(self._path, self._metadata)

    def reset(self) -> None:
        """See ``Engine``."""
        super().reset()
        self._context.clear()

    def close(self) -> None:
        """Frees the caches, then what they computed with."""
        self._sampler.close()
        self._control.close()
        if self._embedder is not None:
            self._embedder.close()
        self._context.close()
        self._pool.close()
        self._model.close()

    def _let_go(self, resident: Resident) -> None:
        self._context.drop(resident.slot)

    def _share(self, donor: Resident, resident: Resident, length: int) -> None:
        self._context.share(donor.slot, resident.slot, length)

    def embed(self, inputs: Sequence[Sequence[int]]) -> Vectors:
        """See ``Engine``. Always with the model itself: no adapter is used."""
        if self._embedder is None:
            return super().embed(inputs)
        return next(filter(None, self.embedding(inputs)))

    def embedding(self, inputs: Sequence[Sequence[int]]) -> Iterator[Vectors | None]:
        """See ``Engine``."""
        if self._embedder is None:
            self.embed(inputs)  # refuses
            return
        for vectors in self._embedder.turns(inputs, lambda: self._control.threads):
            yield None if vectors is None else vectors.tolist()

    def _compute(self, work: Work, rows: Sequence[Resident]) -> Drawn:
        self._context.set_threads(self._control.threads)
        parts = self._parts(work)
        if len(parts) == 1:
            logits = self._decode(work, len(rows))
        else:
            # Each decode overwrites the logits of the one before, and rows keep the plan's order.
            logits = np.empty((len(rows), self._limits.vocab_size), np.float32)
            places = {row.sequence: place for place, row in enumerate(rows)}
            for part in parts:
                own = [places[one.sequence] for one, _ in part if one.sequence in places]
                logits[own] = self._decode(part, len(own))
        return self._sampler.draw(logits, rows) if rows else Drawn([])

    def _parts(self, work: Work) -> list[Work]:
        """The work by adapter; the one in use comes first, which saves a switch."""
        if len(self._adapters) == 1:
            return [work]
        parts: dict[str, list[tuple[Resident, int]]] = {}
        for pair in work:
            parts.setdefault(pair[0].adapter, []).append(pair)
        used = self._context.adapter
        return [parts[name] for name in sorted(parts, key=lambda n: self._adapters[n] is not used)]

    def _decode(self, work: Work, rows: int) -> NDArray[np.float32]:
        """Computes work of one adapter, and scores its prompts; returns the logits of its rows."""
        adapter = self._adapters[work[0][0].adapter]
        self._context.use(adapter)
        padded = self._fill(work)
        logits = self._context.decode(self._batch, rows + self._scores.rows_of(work))
        if padded:
            self._context.drop(self._limits.sequences_max)
        return self._scores.part(work, logits)

    def _fill(self, work: Work) -> bool:
        """Lays the work out in the batch, and marks the tokens whose logits are wanted.

        A token that is alone in its ubatch is computed in another way than several are: several
        threads share its attention once the cache is long, and its product with a matrix of floats,
        which adapters are made of, is rounded differently. In exact mode none is alone: one of a
        spare sequence keeps it company. Says whether that was needed.
        """
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        wanted: list[int] = []
        for resident, count in work:
            start = resident.computed
            if count == 1:
                tokens.append(resident.tokens[start])
                positions.append(start)
                slots.append(resident.slot)
            else:
                tokens += resident.tokens[start : start + count]
                positions += range(start, start + count)
                slots += [resident.slot] * count
            if resident.sampling.prompt_logprobs:
                first = len(tokens) - count
                wanted += range(first, first + len(targets_of(resident, count)))
            if start + count == len(resident.tokens):
                wanted.append(len(tokens) - 1)
        padded = self._spare > 0 and len(tokens) % self._ubatch_tokens == 1
        if padded:
            tokens.append(0)
            positions.append(0)
            slots.append(self._limits.sequences_max)
        self._batch.fill(tokens, positions, slots, wanted)
        return padded


def _warnings() -> tuple[str, ...]:
    if not has_openmp():
        return ()
    slow = (
        "this llama.cpp was built with OpenMP and becomes very slow when other programs are busy;"
        ' build it with CMAKE_ARGS="-DGGML_OPENMP=OFF"'
    )
    return (slow,)


def load(options: EngineOptions, progress: Progress) -> Engine:
    """Makes the engine; see ``shards.engines``."""
    return LlamaCppEngine(options, progress)
