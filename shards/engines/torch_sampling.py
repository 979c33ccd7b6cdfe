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
"""

import math
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from shards.engines.base import Logprobs, SamplingParams
from shards.engines.torch_filters import Cut, Near, Share, cut, invert, parts, units, weigh
from shards.engines.torch_late import Fetch
from shards.filters import Floats
from shards.sampling import NOT_FINITE, Drawn, Row, Sampler, adjusts, uniform

# The likeliest tokens that are looked at first; small sorts are fast up to a few thousand.
WIDTH = 1024
# Logits that are worked on at once: 32 MiB in single precision, and a few times that of scratch.
# To sort them all takes more of it for each.
AT_ONCE = 1 << 23
SORTED_AT_ONCE = 1 << 22
# Columns of what is uploaded for each row; numbers that are not whole go by their bits.
_AT, _TOP_K, _TOPS, _SPARE, _CHANCE, _TEMPERATURE, _MIN_P = 0, 1, 2, 3, 5, 7, 8
# Columns of what comes back, and of what comes back for rows with log probabilities.
_TOKEN, _STATE, _PLAIN_END = range(3)
_RANK, _TOTAL, _CHOSEN, _PEAK, _TOPS_START = range(2, 7)
_SURE, _DOUBTFUL, _UNSOUND = range(3)
_SPARE_STEPS = 2.0**40


class Draw(Enum):
    """How a token is found: the likeliest, from all tokens, or from those that a filter leaves."""

    BEST = "best"
    WHOLE = "whole"
    CUT = "cut"


class Kind(NamedTuple):
    """Rows that are computed alike; ``told`` says whether log probabilities are wanted."""

    draw: Draw
    told: bool


class Group(NamedTuple):
    """Rows of one kind, by their indices in the step.

    ``tops`` is how many likely tokens are told at most, ``ranks`` whether any row wants its rank.
    ``whole`` and ``min_p`` say whether any row needs the mass of all tokens, and min_p.
    """

    kind: Kind
    rows: list[int]
    tops: int
    ranks: bool
    whole: bool
    min_p: bool

    def columns(self) -> int:
        """How many numbers come back of each row."""
        return _TOPS_START + 2 * self.tops if self.kind.told else _PLAIN_END


class Pending(NamedTuple):
    """What the device was given to draw: its ``tokens`` there, in the order of the step's rows."""

    groups: list[Group]
    tokens: Any
    told: Fetch | None


class DeviceSampler:
    """Draws the rows of a step, on the device where it can and else by the host's sampler.

    ``upload`` brings an array to the device, ``to_host`` logits from there. ``width`` is how many
    of the likeliest tokens are looked at first.
    """

    def __init__(
        self,
        vocab_size: int,
        sampler: Sampler,
        upload: Callable[[NDArray[np.int64]], Any],
        to_host: Callable[[Any], Floats],
        width: int = WIDTH,
    ) -> None:
        self._vocab = vocab_size
        self._sampler = sampler
        self._upload = upload
        self._to_host = to_host
        self._width = min(width, vocab_size)
        # So many bits for the likeliest token, that all of them have no more than 62.
        self._bits = 62 - (vocab_size - 1).bit_length()

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
            pending = self._launch(logits, rows, here, self._width)
        return DeviceDrawing(self, logits, rows, there, pending)

    def finish(self, drawing: "DeviceDrawing") -> Drawn:
        """What a drawing is, once the device is done, with what the host has to do."""
        logits, rows, drawn = drawing.logits, drawing.rows, Drawn([0] * len(drawing.rows))
        with torch.inference_mode():
            if drawing.there:
                self._draw_there(logits, rows, drawing.there, drawn)
            again = self._take(drawing.pending, rows, drawn)
            if again:
                self._take(self._launch(logits, rows, again, self._vocab), rows, drawn)
        return drawn

    def _draw_there(
        self, logits: Any, rows: Sequence[Row], there: Sequence[int], drawn: Drawn
    ) -> None:
        """Draws the rows that ask for more, on the host, while the device is at work."""
        if len(there) < len(rows):
            logits = logits.index_select(0, self._upload(np.array(there, np.int64)))
        found = self._sampler.draw(self._to_host(logits), [rows[index] for index in there])
        for place, index in enumerate(there):
            drawn.tokens[index] = found.tokens[place]
            if place in found.logprobs:
                drawn.logprobs[index] = found.logprobs[place]
            if place in found.failures:
                drawn.failures[index] = found.failures[place]

    def _launch(
        self, logits: Any, rows: Sequence[Row], wanted: Sequence[int], width: int
    ) -> "Pending":
        """Has the device draw some rows; does not wait for it."""
        if not wanted:
            return Pending([], torch.empty(0, dtype=torch.int64, device=logits.device), None)
        groups = self._group(rows, wanted, width)
        order = [index for group in groups for index in group.rows]
        uploaded = self._upload(self._pack(rows, order))
        found, start = [], 0
        for group in groups:
            given = uploaded[start : start + len(group.rows)]
            start += len(group.rows)
            # All rows of a step in their order need not be copied.
            every = group.rows == list(range(len(logits)))
            mine = logits if every else logits.index_select(0, given[:, _AT])
            found.append(self._compute(mine.float(), given, group, width))
        told = torch.cat([table.reshape(-1) for table in found])
        return Pending(groups, _tokens(found, uploaded[:, _AT], len(logits)), Fetch(told))

    def _group(self, rows: Sequence[Row], wanted: Sequence[int], width: int) -> list[Group]:
        """Rows of a kind together, no more at once than there is scratch memory for."""
        kinds: dict[Kind, list[int]] = {}
        for index in wanted:
            kinds.setdefault(kind_of(rows[index].sampling, self._vocab), []).append(index)
        at_once = AT_ONCE if width < self._vocab else SORTED_AT_ONCE
        most = max(1, at_once // self._vocab)
        groups = []
        for kind, members in kinds.items():
            for start in range(0, len(members), most):
                part = members[start : start + most]
                asked = [rows[index].sampling for index in part]
                groups.append(
                    Group(
                        kind,
                        part,
                        tops=min(width, max(self._tops(one) for one in asked)),
                        ranks=any(one.ranks for one in asked),
                        whole=any(not 0 < one.top_k < self._vocab for one in asked),
                        min_p=any(one.min_p > 0.0 for one in asked),
                    )
                )
        return groups

    def _tops(self, sampling: SamplingParams) -> int:
        return min(sampling.top_logprobs, self._vocab) if sampling.logprobs else 0

    def _pack(self, rows: Sequence[Row], order: Sequence[int]) -> NDArray[np.int64]:
        """What the device must know of the rows, in one array."""
        whole, real = [], []
        for index in order:
            sampling = rows[index].sampling
            top_k = sampling.top_k if 0 < sampling.top_k < self._vocab else self._vocab
            left_out = spare_share(sampling.top_p)
            chance = uniform(sampling.seed, len(rows[index].tokens))
            shares = *parts(left_out), *parts(chance)
            whole.append((index, top_k, self._tops(sampling), *shares))
            real.append((sampling.temperature, min(sampling.min_p, 1.0)))
        return np.hstack((np.array(whole, np.int64), np.array(real, np.float32).view(np.int32)))

    # On the device ------------------------------------------------------------------------------

    def _compute(self, raw: Any, given: Any, group: Group, width: int) -> Any:
        """What comes back of the rows of a group: [rows, columns] of int64."""
        draw, told = group.kind
        token = raw.argmax(dim=-1, keepdim=True)
        peak = raw.gather(1, token)
        doubtful = torch.zeros_like(token, dtype=torch.bool)
        near = Near(raw, width) if draw is Draw.CUT or group.tops else None
        if draw is not Draw.BEST:
            weights = None
            if draw is Draw.WHOLE or (group.whole and width < self._vocab):
                weights = weigh(raw, peak, _real(given, _TEMPERATURE))
            if near is not None and draw is Draw.CUT:
                token, doubtful = cut(near, peak, self._given(given), weights, self._bits)
            else:
                token = self._open(weights, given, group)
        columns = [token]
        if told:
            if near is not None:
                doubtful = doubtful | near.doubts(given[:, _TOPS : _TOPS + 1])
            columns += self._tell(raw, token, peak, near, group)
        # NaN counts as the largest value, so the largest tells.
        state = torch.where(torch.isfinite(peak), doubtful.long(), _UNSOUND)
        return torch.cat([columns[0], state, *columns[1:]], dim=1)

    def _open(self, weights: Any, given: Any, group: Group) -> Any:
        """Tokens that are drawn from all, or those that min_p leaves."""
        if group.min_p:
            weights *= weights >= _real(given, _MIN_P)
        return invert(weights, self._bits, _share(given, _CHANCE))

    def _given(self, given: Any) -> Cut:
        top_k = given[:, _TOP_K : _TOP_K + 1]
        return Cut(
            _real(given, _TEMPERATURE),
            top_k,
            top_k < self._vocab,
            _share(given, _SPARE),
            _real(given, _MIN_P),
            _share(given, _CHANCE),
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
                group.rows, table[:, :_PLAIN_END].tolist(), strict=True
            ):
                if state == _DOUBTFUL:
                    again.append(index)
                elif state == _UNSOUND:
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
            if whole[_STATE] != _SURE:
                continue
            sampling = rows[index].sampling
            # In units; the likeliest token has 2 to the power of ``bits``.
            log_total = real[_PEAK] + math.log(whole[_TOTAL]) - self._bits * math.log(2.0)
            ends = _TOPS_START + self._tops(sampling), _TOPS_START + group.tops
            told[index] = Logprobs(
                real[_CHOSEN] - log_total,
                whole[_TOPS_START : ends[0]],
                [value - log_total for value in real[ends[1] : ends[1] + ends[0] - _TOPS_START]],
                whole[_RANK] if sampling.ranks else 0,
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
        cuts = any(group.kind.draw is Draw.CUT or group.tops for group in pending.groups)
        self.sure = not there and not cuts
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
    table = torch.cat([one[:, :_PLAIN_END] for one in found])
    tokens = torch.where(table[:, _STATE] == _UNSOUND, 0, table[:, _TOKEN])
    return tokens.new_zeros(count).scatter_(0, at, tokens)


def serves(row: Row) -> bool:
    """Whether the device draws a row as the host would."""
    sampling = row.sampling
    typical = 0.0 < sampling.typical_p < 1.0 and sampling.temperature > 0.0
    return not (typical or adjusts(row) or row.guide is not None)


def spare_share(top_p: float) -> float:
    """The share of the mass that may be left out.

    Rounded up, a little: of 300 equal tokens 0.9 keeps 270, though the nearest number to 0.9 in
    double precision is more than that.
    """
    return math.ceil((1.0 - top_p) * _SPARE_STEPS) / _SPARE_STEPS if 0.0 < top_p < 1.0 else 0.0


def kind_of(sampling: SamplingParams, vocab_size: int) -> Kind:
    """How a row that is drawn on the device is computed."""
    if sampling.temperature <= 0.0:
        draw = Draw.BEST
    elif 0 < sampling.top_k < vocab_size or 0.0 < sampling.top_p < 1.0:
        draw = Draw.CUT
    else:
        draw = Draw.WHOLE
    return Kind(draw, sampling.logprobs)


def _real(given: Any, column: int) -> Any:
    return given[:, column : column + 1].int().view(torch.float32)


def _share(given: Any, column: int) -> Share:
    return given[:, column : column + 1], given[:, column + 1 : column + 2]
