"""llama.cpp with continuous batching: any GGUF model, on CPU or what the build supports.

Each resident sequence has one llama.cpp sequence id, in one KV cache. A step is one call of
``llama_decode`` with all work, prefill chunks and decodes alike; sampling is ours. With LoRA
adapters it is one call for each adapter that the work names, the model itself included.

Engine options (``--engine-option key=value``):

- ``flash``: ``on``, ``off`` or ``auto``. On decodes many sequences faster, and is the default on a
  CPU; ``auto``, the default on an accelerator, is on if the accelerator can.
- ``kv=split``: each sequence has an equal part of the cache for itself, so that no row of a step
  reads the mask of others' cells: faster with many sequences, and with long ones by far. But a part
  bounds the length of its sequence (``--kv-tokens`` divided by ``--sequences-max``; by default 32
  parts of up to 2,048), its memory is taken at once, and a prefix is shared by a copy. The default,
  ``kv=unified``, is one pool.
- ``cache``: the type of keys and values: ``f16``, ``f32``, ``bf16``, ``q8_0``, ``q5_1``, ``q5_0``,
  ``q4_1`` or ``q4_0``. Default: ``f16``. The quantised ones take half of its memory and less, need
  flash attention, and round what the model has read. Flash attention, again, rounds ``f32``.
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

from shards.engines import own_types
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
from shards.engines.llama_embed import (
    POOLINGS,
    EmbeddingContext,
    is_causal,
    pooling_of,
    tokens_at_once,
)
from shards.engines.llama_layouts import Layout, Pool, Streams
from shards.engines.llama_native import (
    Adapter,
    Batch,
    Context,
    ContextSizes,
    Model,
    has_openmp,
)
from shards.engines.llama_settings import settings_of
from shards.engines.llama_sizes import adapter_file
from shards.engines.llama_threads import ThreadPool
from shards.engines.llama_weighing import weigher
from shards.engines.threads import ThreadControl
from shards.gguf_file import dtype_name, gguf_file_of, read_metadata
from shards.gguf_tokenizer import tokenizer_files
from shards.prompt_logprobs import targets_of
from shards.residents import Resident
from shards.sampling import Drawn, Sampler

EMBED_SEQUENCES = 64
# Every decoded token reads the mask of all cells up to the last one in use, whoever uses it. For a
# small model on a CPU 8,192 foreign cells cost as much as half of the computation of one sequence,
# and three times that of a batch. So few ended sequences are worth keeping. Large models and
# accelerators have other worries, and in a divided cache nobody reads them.
DONOR_TOKENS_SMALL = 512
SMALL_BYTES = 1 << 30
Logits = NDArray[np.float32]
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
        if options.dtype:
            raise ModelError(own_types("llamacpp", options.dtype))
        if options.model is None:
            raise ModelError("llamacpp: --model PATH is missing")
        self._path = gguf_file_of(options.model)
        self._metadata = read_metadata(self._path)
        settings = self._settings = settings_of(options)
        self._control = ThreadControl(settings.threads(options.threads, self._metadata))
        self._pool = ThreadPool(self._control.threads)  # the most that it will ever say
        self._control.start()
        self._model = Model(self._path, settings.gpu_layers, progress, settings.devices)
        self._check_model()
        trained = self._model.length_trained
        sizes = settings.sizes(options, self._metadata, trained, self._control.threads)
        self._context = Context(self._model, sizes, self._pool)
        self._pads = settings.pads > 0
        self._limits = settings.limits(
            sizes, self._context.length_max, trained, self._model.vocab_size
        )
        self._layout: Layout = (
            Pool(self._context) if sizes.unified else Streams(self._context, sizes.sequences_max)
        )
        super().__init__(self._limits)
        self._sampler = Sampler(self._model.vocab_size, weigh=weigher())
        self._batch = Batch(sizes.step_tokens_max, sizes.sequences_max)
        self._adapters: dict[str, Adapter | None] = {"": None}
        for name, path in options.adapters:
            self._adapters[name] = self._model.adapter(name, adapter_file(name, path))
        self._embed_tokens = min(settings.embed_tokens, trained)
        self._embedder = self._make_embedder(sizes) if self._embed_tokens else None
        self._info = self._describe(options)

    def _check_model(self) -> None:
        if not self._model.decodes:
            raise ModelError(f"model file {self._path}: is not a decoder-only language model")
        if self._settings.split and not self._model.shares_prefix:
            raise ModelError(
                f"model file {self._path}: has recurrent layers, whose states kv=split cannot move:"
                " leave kv=split out"
            )

    def _make_embedder(self, sizes: ContextSizes) -> EmbeddingContext:
        tokens = self._embed_tokens
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
        pooling = self._settings.pooling
        kind = POOLINGS[pooling] if pooling else pooling_of(self._path, self._metadata)
        return EmbeddingContext(self._model, small, self._pool, kind, causal=causal)

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
            device=", ".join(device.title for device in self._settings.devices) or "cpu",
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
            donor_tokens_max=DONOR_TOKENS_SMALL if self._reads_all() else 0,
            adapters=tuple(name for name, _ in options.adapters),
            embed_tokens_max=self._embed_tokens,
        )

    def _reads_all(self) -> bool:
        """Whether to read the masks of ended sequences' cells weighs much."""
        small = self._model.weight_bytes < SMALL_BYTES
        return small and not self._settings.devices and not self._settings.split

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
        self._layout.clear()

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
        self._layout.let_go(resident.slot)

    def _share(self, donor: Resident, resident: Resident, length: int) -> None:
        self._layout.share(donor.slot, resident.slot, length)

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
        arranged = self._layout.arrange(work)
        parts = self._parts(arranged)
        if len(parts) == 1:
            logits = self._decode(arranged, len(rows))
            if not rows:
                return Drawn([])
            if arranged is work:
                return self._sampler.draw(logits, rows)
            return self._draw(logits, rows, _order(arranged, rows))
        # Each decode overwrites the logits of the one before.
        logits = np.empty((len(rows), self._limits.vocab_size), np.float32)
        for part in parts:
            own = _order(part, rows)
            logits[own] = self._decode(part, len(own))
        return self._sampler.draw(logits, rows) if rows else Drawn([])

    def _draw(self, logits: Logits, rows: Sequence[Resident], order: list[int]) -> Drawn:
        """Draws from logits whose lines are of the rows in that order; returns it in the rows'."""
        if order == sorted(order):
            return self._sampler.draw(logits, rows)
        drawn = self._sampler.draw(logits, [rows[index] for index in order])
        tokens = dict(zip(order, drawn.tokens, strict=True))
        return Drawn(
            [tokens[index] for index in range(len(rows))],
            {order[line]: logprobs for line, logprobs in drawn.logprobs.items()},
            {order[line]: failure for line, failure in drawn.failures.items()},
        )

    def _parts(self, work: Work) -> list[Work]:
        """The work by adapter; the one in use comes first, which saves a switch."""
        if len(self._adapters) == 1:
            return [work]
        parts: dict[str, list[tuple[Resident, int]]] = {}
        for pair in work:
            parts.setdefault(pair[0].adapter, []).append(pair)
        used = self._context.adapter
        return [parts[name] for name in sorted(parts, key=lambda n: self._adapters[n] is not used)]

    def _decode(self, work: Work, rows: int) -> Logits:
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
            start, slot = resident.computed, self._layout.place(resident.slot)
            if count == 1:
                tokens.append(resident.tokens[start])
                positions.append(start)
                slots.append(slot)
            else:
                tokens += resident.tokens[start : start + count]
                positions += range(start, start + count)
                slots += [slot] * count
            if resident.sampling.prompt_logprobs:
                first = len(tokens) - count
                wanted += range(first, first + len(targets_of(resident, count)))
            if start + count == len(resident.tokens):
                wanted.append(len(tokens) - 1)
        padded = self._pads and len(tokens) % self._settings.ubatch_tokens == 1
        if padded:
            tokens.append(0)
            positions.append(0)
            slots.append(self._limits.sequences_max)
        self._batch.fill(tokens, positions, slots, wanted)
        return padded


def _order(work: Work, rows: Sequence[Resident]) -> list[int]:
    """Which of the rows each line of logits is for, after this work."""
    places = {row.sequence: place for place, row in enumerate(rows)}
    return [places[one.sequence] for one, _ in work if one.sequence in places]


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
