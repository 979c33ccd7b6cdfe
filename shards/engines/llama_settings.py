"""What the llama.cpp engine's options say, and the sizes that follow; see ``llamacpp``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shards.engines.base import EngineOptions, ModelError
from shards.engines.llama_devices import Device, accelerators, choose
from shards.engines.llama_embed import POOLINGS
from shards.engines.llama_layouts import SHARED_TOKENS
from shards.engines.llama_native import CACHE_TYPES, FLASH, QUANTISED, ContextSizes
from shards.engines.llama_sizes import (
    kv_memory_bytes,
    kv_tokens_default,
    kv_tokens_room,
    layers_of,
    part_tokens,
)
from shards.extras import Extras
from shards.residents import Limits

SEQUENCES_MAX = 64
# Of a divided cache, each part of which takes its memory at once.
PARTS_MAX = 32
# llama.cpp's own bound (LLAMA_MAX_SEQ).
SEQUENCES_LIMIT = 256
STEP_TOKENS_MAX = 256
UBATCH_TOKENS = 128
EXACT_UBATCH_TOKENS = 63
# What llama.cpp itself takes: an accelerator needs many tokens at once to be busy.
ACCELERATOR_STEP_TOKENS_MAX = 2048
ACCELERATOR_UBATCH_TOKENS = 512
EMBED_TOKENS = 512
_ALL_LAYERS = 999


@dataclass(frozen=True, slots=True)
class Settings:
    """The options as they hold on this machine. ``embed_tokens`` is 0 without embeddings."""

    devices: list[Device]
    gpu_layers: int
    exact: bool
    split: bool
    flash: str
    cache: str
    ubatch_tokens: int
    embed_tokens: int
    pooling: str

    @property
    def pads(self) -> int:
        """Tokens that keep a lonely one company in exact mode; each has a cell."""
        return 1 if self.exact else 0

    @property
    def spare(self) -> int:
        """Sequences that no plan has: that of the token that pads, or one whose part is free."""
        return 1 if self.exact or self.split else 0

    def threads(self, asked: int, metadata: dict[str, Any]) -> int:
        """Threads to compute with; 0: as many as are free.

        What stays on the CPU is looking up the tokens, which more threads only wait for.
        """
        return asked or (1 if self.devices and self.gpu_layers > layers_of(metadata) else 0)

    def sizes(
        self, options: EngineOptions, metadata: dict[str, Any], length_trained: int, threads: int
    ) -> ContextSizes:
        """Room for what is asked for or suits the machine, and for what is spare."""
        step_tokens = options.step_tokens_max or (
            ACCELERATOR_STEP_TOKENS_MAX if self.devices else STEP_TOKENS_MAX
        )
        # llama.cpp aborts if not every sequence could have a token in one batch, and in the cache.
        tokens = min(step_tokens, options.kv_tokens or step_tokens) + self.pads
        most = min(SEQUENCES_LIMIT, tokens) - self.spare
        if options.sequences_max > most or most < 1:
            few = tokens < SEQUENCES_LIMIT
            why = " with so few --step-tokens-max or --kv-tokens" if few else ""
            raise ModelError(f"llamacpp: --sequences-max is at most {most}{why}")
        usual = PARTS_MAX if self.split else SEQUENCES_MAX
        sequences = options.sequences_max or min(usual, most)
        memory = kv_memory_bytes(self.devices)
        if self.split:
            room = kv_tokens_room(metadata, memory, self.cache)
            part = part_tokens(sequences, options.kv_tokens, room, length_trained)
            cells = part * (sequences + self.spare)
        else:
            cells = options.kv_tokens or kv_tokens_default(
                metadata, length_trained, memory, self.cache
            )
        return ContextSizes(
            kv_tokens=cells + self.pads,
            sequences_max=sequences + self.spare,
            step_tokens_max=step_tokens + self.pads,
            ubatch_tokens=max(1, min(self.ubatch_tokens, step_tokens)),
            threads=threads,
            flash=self.flash,
            unified=not self.split,
            cache=self.cache,
        )

    def limits(
        self, sizes: ContextSizes, length_max: int, length_trained: int, vocab_size: int
    ) -> Limits:
        """What plans may use. ``length_max`` is what the context has for the longest sequence."""
        sequences = sizes.sequences_max - self.spare
        length = length_max - self.pads
        return Limits(
            kv_tokens=length * sequences if self.split else length,
            page_tokens=SHARED_TOKENS if self.split else 1,
            sequences_max=sequences,
            step_tokens_max=sizes.step_tokens_max - self.pads,
            length_max=min(length_trained, length),
            vocab_size=vocab_size,
        )


def settings_of(options: EngineOptions) -> Settings:
    """Reads the options. Raises ``ModelError`` if they contradict each other or the machine."""
    extras = Extras("llamacpp", options.extra)
    exact = extras.whole("exact", 0) > 0
    gpu_layers = extras.whole("gpu_layers", _ALL_LAYERS)
    found = choose(accelerators(), options.device)
    devices = found if gpu_layers > 0 else []
    split = extras.choice("kv", "unified", ("unified", "split")) == "split"
    if exact:
        _check_exact(devices, split=split)
    cache = extras.choice("cache", "f16", tuple(CACHE_TYPES))
    usual = "off" if cache == "f32" else "auto" if devices else "on"
    flash = "on" if exact else extras.choice("flash", usual, tuple(FLASH))
    _check_cache(cache, flash)
    ubatch = extras.whole("ubatch_tokens", ACCELERATOR_UBATCH_TOKENS if devices else UBATCH_TOKENS)
    embed_tokens = extras.whole("embed_tokens", EMBED_TOKENS)
    pooling = extras.choice("pooling", "", ("", *POOLINGS))
    embeds = extras.whole("embeddings", 0) > 0
    extras.finish()
    if embeds and embed_tokens < 1:
        raise ModelError("llamacpp: engine option embed_tokens must be at least 1")
    return Settings(
        devices=devices,
        gpu_layers=gpu_layers,
        exact=exact,
        split=split,
        flash=flash,
        cache=cache,
        ubatch_tokens=EXACT_UBATCH_TOKENS if exact else ubatch,
        embed_tokens=embed_tokens if embeds else 0,
        pooling=pooling,
    )


def _check_cache(cache: str, flash: str) -> None:
    """Raises ``ModelError`` if this type of keys and values does not go with flash attention."""
    if cache == "f32" and flash != "off":
        raise ModelError(
            "llamacpp: cache=f32 is of no use with flash attention, which rounds it to f16: leave "
            "flash and exact out, or take cache=f16"
        )
    if cache in QUANTISED and flash == "off":
        raise ModelError(
            f"llamacpp: cache={cache} needs flash attention: leave flash=off out, or take cache=f16"
        )


def _check_exact(devices: Sequence[Device], *, split: bool) -> None:
    if devices:
        raise ModelError("llamacpp: exact=1 holds on a CPU only: add --device cpu")
    if split:
        raise ModelError("llamacpp: exact=1 holds for kv=unified only: leave kv=split out")
