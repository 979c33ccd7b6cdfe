"""Draws on the device, for the rows that ask for no more than temperature, top_k, top_p and min_p.

To bring a row of 128,000 logits to the host and to draw there takes longer than many a step. Rows
that ask for more (penalties, a constraint, typical_p) still go there, and only those.

A row gets the token that ``shards.sampling`` would give it, up to rounding: the same filters in the
same order, the same winners among equals, the same uniform number, the same inversion in the order
of token ids. Weights are single precision, as there, and are then counted in whole units, of which
the likeliest token has 2^44 at 128,000 tokens. Sums of whole numbers do not depend on the order in
which a device adds, so neither the neighbours of a row nor the shape of a batch change its draw. To
cut off what is less than one unit leaves out less than 2^-25 of the mass, as much as the rounding
of single precision. Products with shares are exact: 62 bits by 53.

Filters look at the few hundred likeliest tokens first. Where these do not decide it (a nucleus of
more tokens, or equals at its border), the row is drawn once more, with all tokens sorted. Both ways
give the same. A step makes a constant number of calls for each kind of row, one upload and one
download, and as much again if rows are drawn once more.

On CUDA a kernel (``torch_draw_kernel``) does the same for all kinds of rows at once, and is never
in doubt. What is told beside tokens is found as ever.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shards.engines.base import Logprobs
from shards.engines.device_draw import draw_there, serves, unit_bits
from shards.engines.torch_filters import Cut, Near, Share, cut, invert, units, weigh
from shards.engines.torch_late import Fetch
from shards.engines.torch_rows import (
    AT,
    CHANCE,
    CHOSEN,
    DOUBTFUL,
    DRAWN,
    MIN_P,
    PEAK,
    PLAIN_END,
    RANK,
    SPARE,
    STATE,
    SURE,
    TEMPERATURE,
    TOKEN,
    TOLD,
    TOP_K,
    TOPS,
    TOPS_START,
    TOTAL,
    UNSOUND,
    Draw,
    Group,
    Kind,
    Packer,
    group_rows,
    tops,
)
from shards.filters import Floats
from shards.sampling import NOT_FINITE, Drawn, Row, Sampler

# The likeliest tokens that are looked at first; small sorts are fast up to a few thousand.
WIDTH = 1024
# Logits that are worked on at once: 32 MiB in single precision, and a few times that of scratch.
# To sort them all takes more of it for each.
AT_ONCE = 1 << 23
SORTED_AT_ONCE = 1 << 22


class Telling(NamedTuple):
    """Rows that the kernel has drawn, and what their log probabilities are found from.

    ``raw`` are their logits in float32, a copy: the next step may take the place of the others.
    """

    group: Group
    raw: Any
    given: Any
    drawn: Any


class Pending(NamedTuple):
    """What the device was given to draw: its ``tokens`` there, in the order of the step's rows.

    ``doubtless``: none of them may have to be drawn once more.
    """

    groups: list[Group]
    tokens: Any
    told: Fetch | None
    doubtless: bool
    tellings: Sequence[Telling] = ()


class DeviceSampler:
    """Draws the rows of a step, on the device where it can and else by the host's sampler.

    ``upload`` brings an array to the device, ``to_host`` logits from there. ``width`` is how many
    of the likeliest tokens are looked at first. ``kernel`` is what draws rows of all kinds, where
    there is such a thing; see ``torch_draw_kernel.DrawKernel``.
    """

    def __init__(
        self,
        vocab_size: int,
        sampler: Sampler,
        upload: Callable[[NDArray[np.int64]], Any],
        to_host: Callable[[Any], Floats],
        width: int = WIDTH,
        kernel: Callable[[Any, Any], Any] | None = None,
    ) -> None:
        self._vocab = vocab_size
        self._sampler = sampler
        self._upload = upload
        self._to_host = to_host
        self._width = min(width, vocab_size)
        self._kernel = kernel
        self._packer = Packer(vocab_size)
        self._bits = unit_bits(vocab_size)

    def draw(self, logits: Any, rows: Sequence[Row]) -> Drawn:
        """As ``Sampler.draw``, of logits [rows, vocabulary] on the device, in any element type."""
        return self.begin(logits, rows).take()

    def begin(self, logits: Any, rows: Sequence[Row]) -> "DeviceDrawing":
        """Has the device draw what it can, and waits for nothing."""
        here: list[int] = []
        there: list[int] = []
        for index, row in enumerate(rows):
            (here if serves(row) else there).append(index)
        with torch.inference_mode():
            if self._kernel is not None and here:
                pending = self._launch_kernel(self._kernel, logits, rows, here)
            else:
                pending = self._launch(logits, rows, here, self._width)
        return DeviceDrawing(self, logits, rows, there, pending)

    def finish(self, drawing: "DeviceDrawing") -> Drawn:
        """What a drawing is, once the device is done, with what the host has to do."""
        logits, rows, drawn = drawing.logits, drawing.rows, Drawn([0] * len(drawing.rows))
        with torch.inference_mode():
            if drawing.there:
                self._draw_there(logits, rows, drawing.there, drawn)
            again = self._take(drawing.pending, rows, drawn)
            if again and drawing.pending.tellings:
                self._take(self._tell_again(drawing.pending, rows, again), rows, drawn)
            elif again:
                self._take(self._launch(logits, rows, again, self._vocab), rows, drawn)
        return drawn

    def _draw_there(
        self, logits: Any, rows: Sequence[Row], there: Sequence[int], drawn: Drawn
    ) -> None:
        """Draws the rows that ask for more, on the host, while the device is at work."""
        if len(there) < len(rows):
            logits = logits.index_select(0, self._upload(np.array(there, np.int64)))
        draw_there(self._sampler, self._to_host(logits), rows, there, drawn)

    def _launch(
        self, logits: Any, rows: Sequence[Row], wanted: Sequence[int], width: int
    ) -> "Pending":
        """Has the device draw some rows; does not wait for it."""
        if not wanted:
            nothing = torch.empty(0, dtype=torch.int64, device=logits.device)
            return Pending([], nothing, None, doubtless=True)
        groups = self._group(rows, wanted, width)
        order = [index for group in groups for index in group.rows]
        uploaded = self._upload(self._packer.pack(rows, order))
        found, start = [], 0
        for group in groups:
            given = uploaded[start : start + len(group.rows)]
            start += len(group.rows)
            # All rows of a step in their order need not be copied.
            every = group.rows == list(range(len(logits)))
            mine = logits if every else logits.index_select(0, given[:, AT])
            found.append(self._compute(mine.float(), given, group, width))
        told = torch.cat([table.reshape(-1) for table in found])
        doubtless = not any(group.kind.draw is Draw.CUT or group.tops for group in groups)
        tokens = _tokens(found, uploaded[:, AT], len(logits))
        return Pending(groups, tokens, Fetch(told), doubtless)

    def _launch_kernel(
        self,
        kernel: Callable[[Any, Any], Any],
        logits: Any,
        rows: Sequence[Row],
        wanted: Sequence[int],
    ) -> Pending:
        """As ``_launch``, with all tokens from the kernel."""
        told = [index for index in wanted if rows[index].sampling.logprobs]
        groups = self._group(rows, told, self._width, TOLD)
        order = [index for index in wanted if not rows[index].sampling.logprobs] + told
        uploaded = self._upload(self._packer.pack(rows, order))
        found = kernel(logits, uploaded)
        tellings, start = [], len(order) - len(told)
        for group in groups:
            mine = slice(start, start + len(group.rows))
            start = mine.stop
            raw = logits.index_select(0, uploaded[mine, AT]).float()
            tellings.append(Telling(group, raw, uploaded[mine], found[mine, TOKEN : TOKEN + 1]))
        tokens, flat = found[:, TOKEN], found
        if tellings:
            tokens = tokens.new_zeros(len(logits)).scatter_(0, uploaded[:, AT], tokens)
            flat = torch.cat([found.reshape(-1), *self._tell_all(tellings, self._width)])
        every = Group(DRAWN, order, tops=0, ranks=False, whole=False, min_p=False)
        return Pending([every, *groups], tokens, Fetch(flat), doubtless=True, tellings=tellings)

    def _tell_all(self, tellings: Sequence[Telling], width: int) -> list[Any]:
        found = (self._compute(*one[1:3], one.group, width, one.drawn) for one in tellings)
        return [table.reshape(-1) for table in found]

    def _tell_again(self, pending: Pending, rows: Sequence[Row], again: Sequence[int]) -> Pending:
        """Log probabilities of rows, with all tokens sorted."""
        tellings = []
        for one in pending.tellings:
            places = {index: at for at, index in enumerate(one.group.rows)}
            mine = [index for index in again if index in places]
            for group in self._group(rows, mine, self._vocab, TOLD):
                at = self._upload(np.array([places[index] for index in group.rows], np.int64))
                parts = (tensor.index_select(0, at) for tensor in one[1:])
                tellings.append(Telling(group, *parts))
        flat = torch.cat(self._tell_all(tellings, self._vocab))
        return Pending([one.group for one in tellings], None, Fetch(flat), doubtless=True)

    def _group(
        self, rows: Sequence[Row], wanted: Sequence[int], width: int, kind: Kind | None = None
    ) -> list[Group]:
        """Rows of a kind together, no more at once than there is scratch memory for."""
        at_once = AT_ONCE if width < self._vocab else SORTED_AT_ONCE
        most = max(1, at_once // self._vocab)
        return group_rows(rows, wanted, self._vocab, width, most, kind)

    # On the device ------------------------------------------------------------------------------

    def _compute(self, raw: Any, given: Any, group: Group, width: int, drawn: Any = None) -> Any:
        """What comes back of the rows of a group: [rows, columns] of int64.

        ``drawn`` are their tokens [rows, 1], if they are known.
        """
        draw, told = group.kind
        token = raw.argmax(dim=-1, keepdim=True)
        peak = raw.gather(1, token)
        doubtful = torch.zeros_like(token, dtype=torch.bool)
        near = Near(raw, width) if draw is Draw.CUT or group.tops else None
        if draw is not Draw.BEST:
            weights = None
            if draw is Draw.WHOLE or (group.whole and width < self._vocab):
                weights = weigh(raw, peak, _real(given, TEMPERATURE))
            if near is not None and draw is Draw.CUT:
                token, doubtful = cut(near, peak, self._given(given), weights, self._bits)
            else:
                token = self._open(weights, given, group)
        if drawn is not None:
            token = drawn
        columns = [token]
        if told:
            if near is not None:
                doubtful = doubtful | near.doubts(given[:, TOPS : TOPS + 1])
            columns += self._tell(raw, token, peak, near, group)
        # NaN counts as the largest value, so the largest tells.
        state = torch.where(torch.isfinite(peak), doubtful.long(), UNSOUND)
        return torch.cat([columns[0], state, *columns[1:]], dim=1)

    def _open(self, weights: Any, given: Any, group: Group) -> Any:
        """Tokens that are drawn from all, or those that min_p leaves."""
        if group.min_p:
            weights *= weights >= _real(given, MIN_P)
        return invert(weights, self._bits, _share(given, CHANCE))

    def _given(self, given: Any) -> Cut:
        top_k = given[:, TOP_K : TOP_K + 1]
        return Cut(
            _real(given, TEMPERATURE),
            top_k,
            top_k < self._vocab,
            _share(given, SPARE),
            _real(given, MIN_P),
            _share(given, CHANCE),
        )

    def _tell(self, raw: Any, token: Any, peak: Any, near: Near | None, group: Group) -> list[Any]:
        """The columns from which the host makes log probabilities."""
        total = units(weigh(raw, peak), self._bits).sum(dim=-1, keepdim=True)
        chosen = raw.gather(1, token)
        rank = torch.zeros_like(token)
        if group.ranks:
            rank = (raw > chosen).sum(dim=-1, keepdim=True) + 1
        columns = [rank, total, chosen.view(torch.int32), peak.view(torch.int32)]
        if near is not None and group.tops:
            columns.append(near.ids(near.order[:, : group.tops]))
            columns.append(near.falling[:, : group.tops].view(torch.int32))
        return columns

    # Back on the host ---------------------------------------------------------------------------

    def _take(self, pending: "Pending", rows: Sequence[Row], drawn: Drawn) -> list[int]:
        """Waits for the device; fills in the rows that are sure, and returns the others."""
        again: list[int] = []
        if pending.told is None:
            return again
        flat: NDArray[np.int64] = pending.told.numpy()
        start = 0
        for group in pending.groups:
            end = start + len(group.rows) * group.columns()
            table = flat[start:end].reshape(len(group.rows), -1)
            start = end
            told = self._told(table, group, rows) if group.kind.told else {}
            for index, (token, state) in zip(
                group.rows, table[:, :PLAIN_END].tolist(), strict=True
            ):
                if state == DOUBTFUL:
                    again.append(index)
                elif state == UNSOUND:
                    drawn.failures[index] = NOT_FINITE
                else:
                    drawn.tokens[index] = token
                    if index in told:
                        drawn.logprobs[index] = told[index]
        return again

    def _told(
        self, table: NDArray[np.int64], group: Group, rows: Sequence[Row]
    ) -> dict[int, Logprobs]:
        reals = table.astype(np.int32).view(np.float32)
        told = {}
        for index, whole, real in zip(group.rows, table.tolist(), reals.tolist(), strict=True):
            if whole[STATE] != SURE:
                continue
            sampling = rows[index].sampling
            # In units; the likeliest token has 2 to the power of ``bits``.
            log_total = real[PEAK] + math.log(whole[TOTAL]) - self._bits * math.log(2.0)
            ends = TOPS_START + tops(sampling, self._vocab), TOPS_START + group.tops
            told[index] = Logprobs(
                real[CHOSEN] - log_total,
                whole[TOPS_START : ends[0]],
                [value - log_total for value in real[ends[1] : ends[1] + ends[0] - TOPS_START]],
                whole[RANK] if sampling.ranks else 0,
            )
        return told


class DeviceDrawing:
    """A drawing of rows [rows, vocabulary] that was begun; see ``caller.Drawing``.

    ``there`` are the rows that the host draws. ``sure`` says whether ``tokens`` are final, on the
    device, [rows] of int64, for every row whose logits are finite: none is the host's, and none may
    have to be drawn once more.
    """

    def __init__(
        self,
        sampler: DeviceSampler,
        logits: Any,
        rows: Sequence[Row],
        there: Sequence[int],
        pending: Pending,
    ) -> None:
        self._sampler = sampler
        self.logits, self.rows, self.there, self.pending = logits, rows, there, pending
        self.sure = not there and pending.doubtless
        self.tokens = pending.tokens

    @property
    def done(self) -> bool:
        """See ``Drawing``."""
        return self.pending.told is None or self.pending.told.done

    def wait(self) -> None:
        """See ``Drawing``."""
        if self.pending.told is not None:
            self.pending.told.wait()

    def take(self) -> Drawn:
        """See ``Drawing``."""
        return self._sampler.finish(self)


def _tokens(found: Sequence[Any], at: Any, count: int) -> Any:
    """The tokens of some tables, in a step's ``count`` rows, as ``at`` says; 0 if not finite."""
    table = torch.cat([one[:, :PLAIN_END] for one in found])
    tokens = torch.where(table[:, STATE] == UNSOUND, 0, table[:, TOKEN])
    return tokens.new_zeros(count).scatter_(0, at, tokens)


def _real(given: Any, column: int) -> Any:
    return given[:, column : column + 1].int().view(torch.float32)


def _share(given: Any, column: int) -> Share:
    return given[:, column : column + 1], given[:, column + 1 : column + 2]
