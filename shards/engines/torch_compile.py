"""Decoder layers compiled by ``torch.compile``, for decode steps that are captured as graphs.

Modelling code spells out what a GPU would rather do at once: rotary angles, sums with the norms
behind them, gated activations. Compiled, each of these is one kernel. (Llama 1B in bfloat16 on an
H100, replays of steps of 1 and of 64 rows: 1.47 and 1.71 ms instead of 1.88 and 2.29, with 257
kernels instead of 417.)

Layers are compiled at load, for steps of one row and for steps of any other number. All layers of
one kind share what was compiled. Attention stays outside; that cuts a layer into pieces, which
costs nothing in a graph that is replayed. Only within ``used`` is anything but the library's own
forward in place, so prompts and mixed steps never meet the compiler, and nothing is compiled later.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch._dynamo
import torch.fx.experimental._config
import transformers
from numpy.typing import NDArray

from shards.engines.base import Progress
from shards.engines.native_build import cache_folder
from shards.engines.torch_attention import NAME, attend
from shards.engines.torch_graphs import Capture, Packing, Replay, row_buckets
from shards.engines.torch_model import AGREEMENT_MIN, PagedModel
from shards.kv import StepLayout
from shards.residents import Limits

# What one function of a model may be compiled to: kinds of layers times shapes, with room.
_VARIANTS_MAX = 64
# Pieces of a usual layer, for progress: the norm, what is before attention, and twice behind it.
_PIECES_USUAL = 4
# What was not compiled at load stays plain.
_SERVING = "eager_on_recompile"
_REASON_MAX = 200
_CACHE = "TORCHINDUCTOR_CACHE_DIR"

_opaque = torch.compiler.disable(attend)


class Trouble(Exception):
    """Why layers stay plain, in one line."""


class CompiledLayers:
    """The layers of a model, and their compiled forwards; ``pieces`` counts what was compiled."""

    def __init__(self, layers: Sequence[Any], on_piece: Callable[[], None]) -> None:
        self.pieces = 0
        self._on_piece = on_piece
        self._inductor = torch._dynamo.lookup_backend("inductor")  # noqa: SLF001 - it is exported
        self._layers = layers
        self._forwards = [
            torch.compile(layer.forward, backend=self._compile, dynamic=True) for layer in layers
        ]

    def _compile(self, graph: Any, inputs: Any) -> Any:
        made = self._inductor(graph, inputs)
        self.pieces += 1
        self._on_piece()
        return made

    @contextmanager
    def used(self, stance: str) -> Iterator[None]:
        """Within, layers run compiled. What happens to new shapes is the compiler's ``stance``."""
        transformers.AttentionInterface.register(NAME, _opaque)
        try:
            for layer, forward in zip(self._layers, self._forwards, strict=True):
                layer.forward = forward  # in front of the one of its class
            with torch.compiler.set_stance(stance):
                yield
        finally:
            for layer in self._layers:
                layer.__dict__.pop("forward", None)
            transformers.AttentionInterface.register(NAME, attend)

    def capturing(self, capture: Capture) -> Capture:
        """A ``Capture`` of steps with compiled layers."""

        def captured(packed: NDArray[np.int64], compute: Callable[[Any], Any]) -> Replay:
            def within(tensor: Any) -> Any:
                with self.used(_SERVING):
                    return compute(tensor)

            return capture(packed, within)

        return captured


class _Told:
    """How far compilation is: two passes, the second of as many pieces as the first had."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._passes, self._pieces, self._expected = 0, 0, _PIECES_USUAL

    def piece(self) -> None:
        """One more piece is compiled."""
        self._pieces += 1
        self._tell()

    def passed(self) -> None:
        """Steps of one more number of rows are done."""
        self._passes, self._pieces, self._expected = self._passes + 1, 0, max(1, self._pieces)
        self._tell()

    def _tell(self) -> None:
        share = min(1.0, self._pieces / self._expected)
        self._progress(min(1.0, (self._passes + share) / 2))


def compiled(
    capture: Capture,
    model: PagedModel,
    packing: Packing,
    limits: Limits,
    device: torch.device,
    progress: Progress,
) -> tuple[Capture, tuple[str, ...]]:
    """Captures steps with compiled layers, or, with a warning that says why, with plain ones."""
    try:
        layers = compile_layers(model, packing, limits, device, progress)
    except Trouble as trouble:
        return capture, (f"layers run as they are, not compiled: {trouble}",)
    return layers.capturing(capture), ()


def compile_layers(
    model: PagedModel, packing: Packing, limits: Limits, device: torch.device, progress: Progress
) -> CompiledLayers:
    """Compiles a model's layers, and tries them. Raises ``Trouble``; then nothing is left of it."""
    layers = model.blocks()
    if not layers:
        raise Trouble("its layers are not told apart from what is around them")
    # The most rows, and one, are what is compiled for; of the others it is seen that they fit.
    rows = list(dict.fromkeys((limits.sequences_max, 1, *row_buckets(limits.sequences_max))))
    told = _Told(progress)
    try:
        _keep()
        made = CompiledLayers(layers, told.piece)
        with _settings(), _helpers():
            for count in rows:
                _try(made, model, packing, _sample(limits, count), device)
                told.passed()
    except Trouble:
        torch.compiler.reset()
        raise
    except Exception as error:
        torch.compiler.reset()
        raise Trouble(_reason(error)) from error
    finally:
        model.clear(list(range(_sampled_pages(limits))))
    return made


def _keep() -> None:
    """Has compiled pieces kept for the next start, in the user's own cache.

    The compiler would put them in a folder of /tmp whose name anyone can take, and run what it
    finds there.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    folder = cache_folder("torch")
    # Unless somebody has chosen one, torch has set this to its own when it was imported.
    unasked = os.environ.get(_CACHE) in {None, default_cache_dir()}
    if unasked and folder is not None:
        os.environ[_CACHE] = str(folder)


@contextmanager
def _helpers() -> Iterator[None]:
    """Ends the processes that helped to compile."""
    from torch._inductor.async_compile import shutdown_compile_workers

    try:
        yield
    finally:
        shutdown_compile_workers()


@contextmanager
def _settings() -> Iterator[None]:
    """What compilers are told while layers are compiled."""
    variants = {"recompile_limit": _VARIANTS_MAX, "fail_on_recompile_limit_hit": True}
    with (
        torch._dynamo.config.patch(variants),  # noqa: SLF001 - documented, as is the next
        # Else as many rows as a head has numbers would be taken for the same thing.
        torch.fx.experimental._config.patch(use_duck_shape=False),  # noqa: SLF001 - documented too
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _try(
    made: CompiledLayers,
    model: PagedModel,
    packing: Packing,
    layout: StepLayout,
    device: torch.device,
) -> None:
    """Compiles what is new in a step, and compares with the plain layers."""
    rows = len(layout.tokens)
    packed = torch.from_numpy(packing.pack(layout, rows, 1)).to(device)
    expected = packing.compute(model, packed, 1).float()
    with made.used("default"):
        seen = packing.compute(model, packed, 1).float()
    agreement = torch.nn.functional.cosine_similarity(seen, expected).mean().item()
    if not agreement > AGREEMENT_MIN:
        raise Trouble(f"in steps of {rows} they compute something else (agreement {agreement:.3f})")


def _sampled_pages(limits: Limits) -> int:
    """Pages that ``_sample`` uses, from the one for padding on."""
    most = 1 + limits.kv_tokens // limits.page_tokens
    return min(most, -(-limits.sequences_max // limits.page_tokens))


def _sample(limits: Limits, rows: int) -> StepLayout:
    """A step of so many sequences; each sees what those before it write to the same page."""
    page, row = limits.page_tokens, np.arange(rows, dtype=np.int32)
    cells = row % np.int32(_sampled_pages(limits) * page)
    return StepLayout(
        tokens=(1 + row * 7) % np.int32(limits.vocab_size),
        positions=cells % page,
        cells=cells,
        starts=np.arange(rows + 1, dtype=np.int32),
        lengths=cells % page + 1,
        tables=(cells // page)[:, None],
        draws=row,
    )


def _reason(error: Exception) -> str:
    """What a compiler says, in one line."""
    cause = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return " ".join((type(cause).__name__, *lines[:1]))[:_REASON_MAX]
