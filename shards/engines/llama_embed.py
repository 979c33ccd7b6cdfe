"""Embeddings on llama.cpp: a small context of their own, and inputs computed in turns."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from shards.engines.base import EngineLost, ModelError
from shards.engines.llama_native import (
    Batch,
    ContextSizes,
    Model,
    context_params,
    forget_errors,
    last_error,
)
from shards.engines.llama_threads import ThreadPool

POOLINGS = {
    "mean": llama.LLAMA_POOLING_TYPE_MEAN,
    "first": llama.LLAMA_POOLING_TYPE_CLS,
    "last": llama.LLAMA_POOLING_TYPE_LAST,
}
"""What becomes the vector of an input: the mean of its tokens' states, or that of one of them."""

EMBED_TURN_TOKENS = 64
"""Tokens that are embedded between two steps: streams wait for them, however long inputs are.

More would hardly be faster: from here on llama.cpp takes its kernels for large batches.
"""


def pooling_of(path: Path, metadata: dict[str, Any]) -> int:
    """How the model makes one vector of its tokens' states; see ``llama_pooling_type``."""
    kind = int(metadata.get(f"{metadata['general.architecture']}.pooling_type", 0))
    if kind in POOLINGS.values():
        return kind
    if kind > 0:
        raise ModelError(f"model file {path}: is made to rank, not to embed")
    return POOLINGS["last"]


def is_causal(metadata: dict[str, Any]) -> bool:
    """Whether tokens see only those before them, as in models that generate."""
    return bool(metadata.get(f"{metadata['general.architecture']}.attention.causal", True))


def tokens_at_once(longest: int, *, causal: bool) -> int:
    """The most that a turn computes where inputs have up to ``longest`` tokens."""
    return min(longest, EMBED_TURN_TOKENS) if causal else longest


@dataclass(frozen=True, slots=True)
class Part:
    """Tokens ``begin`` to ``end`` of the input number ``which``."""

    which: int
    begin: int
    end: int


def turns_of(lengths: Sequence[int], parts_max: int, *, splits: bool) -> Iterator[list[Part]]:
    """What is embedded at once of inputs of these lengths: ``EMBED_TURN_TOKENS`` at most.

    Unless it ``splits`` no input is cut, and one that is longer is a turn of its own.
    """
    parts: list[Part] = []
    room = EMBED_TURN_TOKENS
    for which, length in enumerate(lengths):
        begin = 0
        while begin < length:
            if not room or len(parts) == parts_max or (parts and not splits and length > room):
                yield parts
                parts, room = [], EMBED_TURN_TOKENS
            end = min(length, begin + room) if splits else length
            parts.append(Part(which, begin, end))
            room, begin = max(0, room - (end - begin)), end
    yield parts


class EmbeddingContext:
    """A context of its own that turns inputs into vectors. All calls from one thread.

    ``pooling`` is one of ``POOLINGS``. What a turn computes must fit into one ubatch; a model that
    is not ``causal`` needs a whole input in it. Nothing stays in the cache from call to call.
    """

    def __init__(
        self, model: Model, sizes: ContextSizes, pool: ThreadPool, pooling: int, *, causal: bool
    ) -> None:
        forget_errors()
        params = context_params(sizes)
        params.embeddings = True
        params.pooling_type = pooling
        pointer = llama.llama_init_from_model(model.pointer, params)
        if not pointer:
            raise ModelError(
                f"llama.cpp cannot make room to embed {sizes.kv_tokens} tokens: {last_error()}"
            )
        pool.attach(pointer)
        self._pointer = pointer
        self._memory = llama.llama_get_memory(pointer)
        self._width = model.width
        self._batch = Batch(sizes.step_tokens_max, sizes.sequences_max)
        self._sequences_max = sizes.sequences_max
        self._pooling = pooling
        self._causal = causal

    def turns(
        self, inputs: Sequence[Sequence[int]], threads: Callable[[], int]
    ) -> Iterator[NDArray[np.float32] | None]:
        """Vectors of length 1 [inputs, width] of inputs that fit, a None for each turn before.

        ``threads`` says how many may compute the next turn. May raise ``EngineLost``.
        """
        llama.llama_memory_clear(self._memory, False)
        vectors = np.zeros((len(inputs), self._width), np.float32)
        lengths = [len(one) for one in inputs]
        turns = turns_of(lengths, self._sequences_max, splits=self._causal)
        for number, parts in enumerate(turns):
            if number:
                yield None
            count = threads()
            llama.llama_set_n_threads(self._pointer, count, count)
            self._compute(inputs, parts)
            for part in parts:
                self._gather(vectors[part.which], part, lengths[part.which])
        norms = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors /= np.maximum(norms, np.finfo(np.float32).tiny)
        yield vectors

    def _compute(self, inputs: Sequence[Sequence[int]], parts: Sequence[Part]) -> None:
        tokens = [token for one in parts for token in inputs[one.which][one.begin : one.end]]
        positions = [position for one in parts for position in range(one.begin, one.end)]
        slots = [self._slot(one) for one in parts for _ in range(one.begin, one.end)]
        self._batch.fill(tokens, positions, slots, range(len(tokens)))
        code = llama.llama_decode(self._pointer, self._batch.native)
        if code:
            raise EngineLost(f"llama_decode failed with code {code}: {last_error()}")

    def _gather(self, vector: NDArray[np.float32], part: Part, length: int) -> None:
        """Adds what a part says to the vector of its input, and forgets an input that is done.

        Vectors get the length 1 in the end, so that a sum stands for a mean.
        """
        slot = self._slot(part)
        state = self._vector(slot)
        if self._pooling == POOLINGS["mean"]:
            vector += state * (part.end - part.begin)
        elif self._pooling == POOLINGS["last"] or part.begin == 0:
            vector[:] = state
        if part.end == length:
            llama.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def _slot(self, part: Part) -> int:
        return part.which % self._sequences_max

    def _vector(self, slot: int) -> NDArray[np.float32]:
        first = llama.llama_get_embeddings_seq(self._pointer, slot)
        if not first:
            raise EngineLost(f"llama.cpp made no embedding: {last_error()}")
        return np.ctypeslib.as_array(first, (self._width,)).copy()

    def close(self) -> None:
        """Frees the buffers."""
        llama.llama_free(self._pointer)
