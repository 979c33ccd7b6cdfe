"""The few calls of llama.cpp that the engine needs, over llama-cpp-python's ctypes layer.

Batches are filled through ctypes arrays that lie behind the pointers of one ``llama_batch``; logits
are read through a numpy view of llama.cpp's own buffer. Nothing here is called per token.
"""

import ctypes
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp as llama
import numpy as np
from numpy.typing import NDArray

from shards.engines.base import EngineLost, ModelError, Progress
from shards.engines.llama_devices import Device, native_list
from shards.engines.llama_threads import ThreadPool

# ggml_log_level in ggml.h.
_LEVEL_ERROR = 4
# llama_decode: no room in the KV cache, which the account of the residents rules out.
_NO_SLOT = 1

Adapter = Any
"""llama.cpp's handle of a LoRA adapter, which is told from others by identity."""

_errors: deque[str] = deque(maxlen=4)


def _keep_errors(level: int, text: bytes, _data: int | None) -> None:
    """Keeps errors, for the one line that a failed load prints; everything else is silence."""
    if level == _LEVEL_ERROR:
        line = text.decode(errors="replace").strip()
        _errors.append(line)


# llama.cpp keeps the pointer, so the object lives as long as the process.
_ON_LOG = llama.llama_log_callback(_keep_errors)


def forget_errors() -> None:
    """Lets ``last_error`` speak of what comes from now on."""
    _errors.clear()


def last_error() -> str:
    """What llama.cpp said of the last failure, in one line."""
    return _errors[0] if _errors else "no reason given"


FLASH = {
    "auto": llama.LLAMA_FLASH_ATTN_TYPE_AUTO,
    "on": llama.LLAMA_FLASH_ATTN_TYPE_ENABLED,
    "off": llama.LLAMA_FLASH_ATTN_TYPE_DISABLED,
}
"""Flash attention: where the device of a layer has it, always, or never."""

# ggml_type in ggml.h, of which the package has not all.
CACHE_TYPES = {
    "f16": 1,
    "f32": 0,
    "bf16": 30,
    "q8_0": 8,
    "q5_1": 7,
    "q5_0": 6,
    "q4_1": 3,
    "q4_0": 2,
}
"""Types that keys and values may have in the KV cache."""
QUANTISED = tuple(name for name in CACHE_TYPES if name.startswith("q"))


@dataclass(frozen=True, slots=True)
class ContextSizes:
    """Counts in tokens, sequences and threads; ``flash`` is a word of ``FLASH``.

    ``cache`` is one of ``CACHE_TYPES``; those that are ``QUANTISED`` need ``flash``.

    Unless it is ``unified`` the KV cache is divided: each sequence has an equal part for itself.
    """

    kv_tokens: int
    sequences_max: int
    step_tokens_max: int
    ubatch_tokens: int
    threads: int
    flash: str
    unified: bool = True
    cache: str = "f16"


class Model:
    """The weights and the vocabulary. ``gpu_layers`` layers go to the devices, if there are any."""

    def __init__(
        self, path: Path, gpu_layers: int, progress: Progress, devices: Sequence[Device] = ()
    ) -> None:
        llama.llama_log_set(_ON_LOG, ctypes.c_void_p(0))
        llama.llama_backend_init()
        _errors.clear()

        def on_progress(fraction: float, _data: int | None) -> bool:
            progress(min(fraction, 1.0))
            return True

        params = llama.llama_model_default_params()
        params.n_gpu_layers = gpu_layers
        # Named always: without layers on it, llama.cpp would still send a device large products.
        listed = native_list(devices)
        params.devices = ctypes.addressof(listed)
        params.progress_callback = llama.llama_progress_callback(on_progress)
        pointer = llama.llama_model_load_from_file(str(path).encode(), params)
        if not pointer:
            raise ModelError(f"model file {path}: llama.cpp cannot load it: {last_error()}")
        self.pointer = pointer
        self.vocab = llama.llama_model_get_vocab(pointer)
        self.vocab_size: int = llama.llama_vocab_n_tokens(self.vocab)
        self.weight_bytes: int = llama.llama_model_size(pointer)
        self.length_trained: int = llama.llama_model_n_ctx_train(pointer)
        self.width: int = llama.llama_model_n_embd_out(pointer)

    @property
    def decodes(self) -> bool:
        """Whether this is a plain decoder, which is all that the engine can drive."""
        pointer = self.pointer
        return bool(
            llama.llama_model_has_decoder(pointer) and not llama.llama_model_has_encoder(pointer)
        )

    @property
    def shares_prefix(self) -> bool:
        """Whether the start of one sequence can be copied to another; recurrent states cannot."""
        pointer = self.pointer
        return not (llama.llama_model_is_recurrent(pointer) or llama.llama_model_is_hybrid(pointer))

    def ends_generation(self, token: int) -> bool:
        """Whether the token ends an answer."""
        return bool(llama.llama_vocab_is_eog(self.vocab, token))

    def adapter(self, name: str, path: Path) -> Adapter:
        """Loads a LoRA adapter, which lives as long as the model. Raises ``ModelError``."""
        _errors.clear()
        pointer = llama.llama_adapter_lora_init(self.pointer, str(path).encode())
        if not pointer:
            raise ModelError(f"adapter {name}: llama.cpp cannot load {path}: {last_error()}")
        if llama.llama_adapter_get_alora_n_invocation_tokens(pointer):
            # It would have to be switched on in the middle of a sequence.
            raise ModelError(f"adapter {name}: {path} is an activated LoRA, which is not supported")
        return pointer

    def tokenize(self, text: str, *, special: bool) -> list[int]:
        """The engine's own tokenisation without added tokens; for checks of the converted one."""
        data = text.encode()
        room = len(data) + 16
        buffer = (llama.llama_token * room)()
        count = llama.llama_tokenize(self.vocab, data, len(data), buffer, room, False, special)
        return list(buffer[:count])

    def close(self) -> None:
        """Frees the weights."""
        llama.llama_model_free(self.pointer)


class Batch:
    """Room for the tokens of one ``llama_decode``: each belongs to exactly one sequence."""

    def __init__(self, tokens_max: int, sequences_max: int) -> None:
        self._tokens: Any = (ctypes.c_int32 * tokens_max)()
        self._positions: Any = (ctypes.c_int32 * tokens_max)()
        self._ones = (ctypes.c_int32 * tokens_max)(*[1] * tokens_max)
        self._wanted: Any = (ctypes.c_int8 * tokens_max)()
        # llama.cpp wants a pointer to a list of sequence ids per token: here into one table.
        self._table = (ctypes.c_int32 * sequences_max)(*range(sequences_max))
        end = ctypes.addressof(self._table) + ctypes.sizeof(self._table)
        self._places = range(ctypes.addressof(self._table), end, ctypes.sizeof(ctypes.c_int32))
        self._lists: Any = (ctypes.c_void_p * tokens_max)()
        native = self.native = llama.llama_batch()
        native.token = _pointer(self._tokens, ctypes.c_int32)
        native.pos = _pointer(self._positions, ctypes.c_int32)
        native.n_seq_id = _pointer(self._ones, ctypes.c_int32)
        native.seq_id = _pointer(self._lists, ctypes.POINTER(ctypes.c_int32))
        native.logits = _pointer(self._wanted, ctypes.c_int8)

    def fill(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        slots: Sequence[int],
        wanted: Sequence[int],
    ) -> None:
        """Sets token, position and sequence of each row, and the rows whose logits are wanted."""
        count = len(tokens)
        flags = [0] * count
        for row in wanted:
            flags[row] = 1
        self._tokens[:count] = tokens
        self._positions[:count] = positions
        self._lists[:count] = [self._places[slot] for slot in slots]
        self._wanted[:count] = flags
        self.native.n_tokens = count


def _pointer(array: Any, kind: type[Any]) -> Any:
    return ctypes.cast(array, ctypes.POINTER(kind))


class Context:
    """The KV cache and the compute buffers. All calls from one thread, which computes, too."""

    def __init__(self, model: Model, sizes: ContextSizes, pool: ThreadPool) -> None:
        _errors.clear()
        params = context_params(sizes)
        pointer = llama.llama_init_from_model(model.pointer, params)
        if not pointer:
            raise ModelError(
                f"llama.cpp cannot make a KV cache of {sizes.kv_tokens} tokens in {sizes.cache}: "
                f"{last_error()}"
            )
        pool.attach(pointer)
        self._pointer = pointer
        self._adapter: Adapter | None = None
        self._memory = llama.llama_get_memory(pointer)
        self._vocab_size = model.vocab_size
        self._threads = sizes.threads
        self._viewed = (0, 0)
        self._view = np.empty((0, self._vocab_size), np.float32)
        self.kv_tokens: int = llama.llama_n_ctx(pointer)
        self.length_max: int = llama.llama_n_ctx_seq(pointer)

    def set_threads(self, count: int) -> None:
        """How many threads the next step computes with."""
        if count != self._threads:
            self._threads = count
            llama.llama_set_n_threads(self._pointer, count, count)

    @property
    def adapter(self) -> Adapter | None:
        """The LoRA adapter that is in use; None is the model itself."""
        return self._adapter

    def use(self, adapter: Adapter | None) -> None:
        """Computes with this adapter from now on. A change costs a new plan of the buffers."""
        if adapter is self._adapter:
            return
        self._adapter = adapter
        chosen = [] if adapter is None else [adapter]
        pointers = (llama.llama_adapter_lora_p_ctypes * len(chosen))(*chosen)
        scales = (ctypes.c_float * len(chosen))(*[1.0] * len(chosen))
        if llama.llama_set_adapters_lora(self._pointer, pointers, len(chosen), scales):
            raise EngineLost(f"llama.cpp cannot switch its LoRA adapter: {last_error()}")

    def decode(self, batch: Batch, rows: int) -> NDArray[np.float32]:
        """Computes the batch; returns the logits [rows, vocabulary] of the rows that wanted them.

        The array is llama.cpp's own memory, valid until the next call. Raises ``EngineLost``.
        """
        code = llama.llama_decode(self._pointer, batch.native)
        if code == _NO_SLOT:
            raise EngineLost("llama.cpp found no room in its KV cache, though the account has some")
        if code:
            raise EngineLost(f"llama_decode failed with code {code}: {last_error()}")
        return self._logits(rows) if rows else np.empty((0, self._vocab_size), np.float32)

    def _logits(self, rows: int) -> NDArray[np.float32]:
        """A view of llama.cpp's logits, which mostly lie where those of the last step did."""
        address = ctypes.addressof(llama.llama_get_logits(self._pointer).contents)
        if (address, rows) != self._viewed:
            self._viewed = address, rows
            kind = ctypes.c_float * (rows * self._vocab_size)
            buffer: Any = kind.from_address(address)
            self._view = np.frombuffer(buffer, np.float32).reshape(rows, self._vocab_size)
        return self._view

    def drop(self, slot: int) -> None:
        """Frees the cells that only this sequence has."""
        llama.llama_memory_seq_rm(self._memory, slot, -1, -1)

    def share(self, source: int, target: int, length: int) -> None:
        """Lets a sequence have the first cells of another one."""
        llama.llama_memory_seq_cp(self._memory, source, target, 0, length)

    def copy(self, source: int, target: int) -> None:
        """Copies a sequence, and all of its part of a divided cache, to one that has no cells.

        The bytes follow at the beginning of the next ``decode``, in the order of the calls.
        """
        llama.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def cut(self, slot: int, length: int) -> None:
        """Frees a sequence's cells of the positions from ``length`` on."""
        llama.llama_memory_seq_rm(self._memory, slot, length, -1)

    def clear(self) -> None:
        """Frees all cells."""
        llama.llama_memory_clear(self._memory, False)

    def close(self) -> None:
        """Frees the cache."""
        llama.llama_free(self._pointer)


def context_params(sizes: ContextSizes) -> Any:
    """llama.cpp's parameters of a context of these sizes."""
    params = llama.llama_context_default_params()
    params.n_ctx = sizes.kv_tokens
    params.n_batch = sizes.step_tokens_max
    params.n_ubatch = sizes.ubatch_tokens
    params.n_seq_max = sizes.sequences_max
    params.n_threads = params.n_threads_batch = sizes.threads
    params.flash_attn_type = FLASH[sizes.flash]
    params.kv_unified = sizes.unified
    params.type_k = params.type_v = CACHE_TYPES[sizes.cache]
    # Sliding-window layers keep all positions, or a prefix could not be shared.
    params.swa_full = True
    params.no_perf = True
    return params


def has_openmp() -> bool:
    """Whether this build waits inside OpenMP, which collapses beside other busy programs."""
    return "OPENMP = 1" in llama.llama_print_system_info().decode()
