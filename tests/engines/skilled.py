"""The scripted engine with what few engines have: LoRA adapters and embeddings."""

from collections.abc import Sequence
from dataclasses import replace

from shards.engines.base import EngineOptions, Vectors
from shards.engines.scripted import ScriptedEngine
from shards.residents import Resident

EMBED_TOKENS_MAX = 16
SKILLS = ("lora", "embeddings")


def vector_of(tokens: Sequence[int]) -> list[float]:
    """The vector of an input: of length 1, and different for different tokens."""
    parts = (float(len(tokens)), float(tokens[0] + 1), float(sum(tokens)))
    length = sum(part * part for part in parts) ** 0.5
    return [part / length for part in parts]


class SkilledEngine(ScriptedEngine):
    """Has the adapters of its options, each of which draws other words than the model itself.

    With adapters it also embeds; without any it is the scripted engine as it is. ``batches`` are
    the inputs of every call of ``embed``.
    """

    def __init__(self, options: EngineOptions) -> None:
        super().__init__(options, lambda _fraction: None)
        self.batches: list[list[list[int]]] = []
        if options.adapters:
            self._info = replace(
                self._info,
                features=(*self._info.features, *SKILLS),
                adapters=tuple(name for name, _ in options.adapters),
                embed_tokens_max=EMBED_TOKENS_MAX,
            )

    def _next(self, resident: Resident) -> int:
        token = super()._next(resident)
        if not resident.adapter or token == self._script.eos:
            return token
        words = self._script._words
        return words[(token + sum(resident.adapter.encode())) % len(words)]

    def embed(self, inputs: Sequence[Sequence[int]]) -> Vectors:
        if not self._info.adapters:
            return super().embed(inputs)
        assert sum(map(len, inputs)) <= EMBED_TOKENS_MAX
        self.batches.append([list(tokens) for tokens in inputs])
        return [vector_of(tokens) for tokens in inputs]
