"""Decode steps of fixed shapes, so that CUDA can replay them as captured graphs.

Launching a model's hundreds of small kernels costs the host more time than the device needs to run
them. A graph launches them all at once, but only with the very same shapes and addresses. So a
decode step is padded to a bucket of rows and of pages per row, packed into one matrix of integers,
and copied to where the graph reads it. Rows of padding compute token 0 at page ``TRASH``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shards.engines.torch_late import Late
from shards.engines.torch_model import PagedModel
from shards.engines.torch_views import Decodes, Kind, View, decode_mask, page_table, pages_seen
from shards.kv import StepLayout

# Columns of the matrix: four for each row, then, for each kind of layer, the first page that is
# seen and the table of pages.
_TOKEN, _POSITION, _CELL, _LENGTH, _FIXED = range(5)
ROWS_MIN, PAGES_MIN = 1, 16


def bucket(count: int, least: int, most: int) -> int:
    """The smallest power of two times ``least`` that is not below ``count``; at most ``most``."""
    size = least
    while size < count:
        size *= 2
    return min(size, most)


def row_buckets(most: int) -> list[int]:
    """All buckets of up to ``most`` rows, smaller ones first."""
    rows = [bucket(1, ROWS_MIN, most)]
    while rows[-1] < most:
        rows.append(bucket(rows[-1] + 1, ROWS_MIN, most))
    return rows


def is_decode(layout: StepLayout) -> bool:
    """Whether each sequence has one token and draws."""
    return len(layout.draws) == len(layout.tokens) == len(layout.lengths) and not len(layout.scores)


class Packing:
    """How decode steps are laid out in a matrix of [rows, columns] of int64."""

    def __init__(
        self,
        kinds: Sequence[Kind],
        page_tokens: int,
        dtype: torch.dtype,
        late: Late,
        *,
        masked: bool,
    ) -> None:
        self._kinds = kinds
        self._page = page_tokens
        self._dtype = dtype
        self._late = late
        self._masked = masked

    def width(self, layout: StepLayout) -> int:
        """Pages that the longest row of any kind of layer sees."""
        most = 1
        for kind in self._kinds:
            first, last = pages_seen(layout.lengths, kind.window, self._page)
            most = max(most, int((last - first).max()))
        return most

    def pack(self, layout: StepLayout, rows: int, width: int) -> NDArray[np.int64]:
        """A step with ``rows`` rows, each with tables of ``width`` pages."""
        count, out = len(layout.tokens), self.nothing(rows, width)
        out[:count, _TOKEN] = layout.tokens
        out[:count, _POSITION] = layout.positions
        out[:count, _CELL] = layout.cells
        out[:count, _LENGTH] = layout.lengths
        at = _FIXED
        for kind in self._kinds:
            first, last = pages_seen(layout.lengths, kind.window, self._page)
            out[:count, at] = first
            out[:count, at + 1 : at + 1 + width] = page_table(layout.tables, first, last, width)
            at += 1 + width
        return out

    def nothing(self, rows: int, width: int) -> NDArray[np.int64]:
        """A step of padding alone."""
        out = np.zeros((rows, _FIXED + len(self._kinds) * (1 + width)), np.int64)
        out[:, _LENGTH] = 1
        return out

    def compute(self, model: PagedModel, packed: Any, width: int) -> Any:
        """Logits [rows, vocabulary] of a packed step; reads nothing but the tensor."""
        rows, at = packed.shape[0], _FIXED
        lengths = packed[:, _LENGTH].contiguous()
        views = {}
        for kind in self._kinds:
            begins = packed[:, at] * self._page
            pages = packed[:, at + 1 : at + 1 + width].reshape(-1)
            mask = None
            if self._masked:
                mask = decode_mask(lengths, begins, width * self._page, kind, self._dtype)
            views[kind] = View([Decodes(None, rows, pages, begins, lengths, mask)], [])
            at += 1 + width
        model.step.cells, model.step.views = packed[:, _CELL].contiguous(), views
        every = torch.arange(rows, device=packed.device)
        return model.forward(self._late.known(packed[:, _TOKEN]), packed[:, _POSITION], every)


class DecodeGraphs:
    """Decode steps of one model, captured once for each bucket and replayed from then on.

    There are as many graphs as buckets: the logarithms of the most rows and of the most pages.
    Those of short sequences are captured at load, the others when they are first met.
    """

    def __init__(
        self,
        model: PagedModel,
        packing: Packing,
        rows_max: int,
        pages_max: int,
        capture: "Capture",
    ) -> None:
        self._model = model
        self._packing = packing
        self._rows_max = rows_max
        self._pages_max = pages_max
        self._capture = capture
        self._replays: dict[tuple[int, int], Replay] = {}

    def logits(self, layout: StepLayout) -> Any:
        """Logits of a decode step: [sequences, vocabulary], valid until the next step."""
        rows = bucket(len(layout.tokens), ROWS_MIN, self._rows_max)
        width = bucket(self._packing.width(layout), PAGES_MIN, self._pages_max)
        packed = self._packing.pack(layout, rows, width)
        if (rows, width) not in self._replays:
            self._replays[rows, width] = self._captured(rows, width)
        return self._replays[rows, width](packed)[: len(layout.tokens)]

    def warm(self) -> None:
        """Captures the graphs of short sequences. The largest go first, as they share memory."""
        width = bucket(1, PAGES_MIN, self._pages_max)
        for count in reversed(row_buckets(self._rows_max)):
            if (count, width) not in self._replays:
                self._replays[count, width] = self._captured(count, width)

    def _captured(self, rows: int, width: int) -> "Replay":
        def compute(tensor: Any) -> Any:
            return self._packing.compute(self._model, tensor, width)

        return self._capture(self._packing.nothing(rows, width), compute)


Replay = Callable[[NDArray[np.int64]], Any]
"""Computes a packed step; gives logits that are valid until the next step."""

Capture = Callable[[NDArray[np.int64], Callable[[Any], Any]], Replay]
"""Makes a function of a matrix replayable; gets a first matrix to warm up with."""


class CudaCapture:
    """Captures with ``torch.cuda.CUDAGraph``; all graphs share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, packed: NDArray[np.int64], compute: Callable[[Any], Any]) -> Replay:
        """See ``Capture``."""
        pinned = torch.from_numpy(packed).pin_memory()
        static = pinned.to(self._device)
        # Libraries choose their kernels and make their workspaces in the first runs, which must not
        # be captured.
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(2):
                compute(static)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            out = compute(static)

        copied = torch.cuda.Event()
        copied.record()

        def replay(given: NDArray[np.int64]) -> Any:
            copied.synchronize()  # the former copy may still read the pinned memory
            pinned.numpy()[:] = given
            static.copy_(pinned, non_blocking=True)
            copied.record()
            graph.replay()
            return out

        return replay


def run_directly(_packed: NDArray[np.int64], compute: Callable[[Any], Any]) -> Replay:
    """A ``Capture`` that captures nothing: the padded step as it is, on the CPU."""
    return lambda given: compute(torch.from_numpy(given))
