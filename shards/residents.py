"""The sequences that an engine holds, and what a plan may do with them.

Engines whose scheduling is ``caller`` share this account, so that they refuse the same plans with
the same words. A plan is checked as a whole before anything changes.

Memory is counted in KV cells, one per computed token, in whole pages. Sequences that share a
prefix share its cells, so the computed tokens form a tree: each ``_Span`` is a run of cells, its
parent holds the cells that come before. A span lives while a sequence or a child refers to it.
Prefixes are shared in whole pages, so every span starts on a page of its own.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from shards.engines.base import Admit, Plan, PlanError, SamplingParams
from shards.grammar_masks import Guide


@dataclass(frozen=True, slots=True)
class Limits:
    """What the engine can hold and do; counts are in tokens or sequences, as in ``EngineInfo``."""

    kv_tokens: int
    page_tokens: int
    sequences_max: int
    step_tokens_max: int
    length_max: int
    vocab_size: int


@dataclass(slots=True, eq=False)
class _Span:
    """Cells for the positions ``start`` to ``end``; ``refs`` counts sequences and children."""

    parent: "_Span | None"
    start: int
    end: int
    refs: int = 1


@dataclass(slots=True, eq=False)
class Resident:
    """One sequence. ``tokens`` are known, the first ``computed`` of them are in the KV cache."""

    sequence: int
    tokens: list[int]
    prompt_len: int
    sampling: SamplingParams
    slot: int
    computed: int
    span: _Span
    plain: bool
    adapter: str = ""
    failed: bool = False
    guide: Guide | None = None


def is_plain(sampling: SamplingParams) -> bool:
    """Whether the next token is always the argmax of the raw logits, with nothing to report."""
    return (
        sampling.temperature == 0.0
        and not sampling.logit_bias
        and sampling.repetition_penalty == 1.0
        and sampling.frequency_penalty == 0.0
        and sampling.presence_penalty == 0.0
        and sampling.min_tokens == 0
        and not sampling.logprobs
        and sampling.constraint is None
        and sampling.watermark is None
    )


class Residents:
    """All resident sequences of one engine, by number, and the cells that they occupy."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.by_sequence: dict[int, Resident] = {}
        self.kv_used = 0
        self._slots = list(range(limits.sequences_max))

    def clear(self) -> None:
        """Forgets every sequence."""
        self.by_sequence.clear()
        self.kv_used = 0
        self._slots = list(range(self.limits.sequences_max))

    # What a plan may do ------------------------------------------------------------------------

    def check(self, plan: Plan) -> None:
        """Raises ``PlanError`` if any part of the plan breaks the contract; changes nothing."""
        dropped = self._check_drops(plan.drops) if plan.drops else set()
        admitted = self._check_admits(plan.admits, dropped) if plan.admits else {}
        cells = self._check_work(plan.work, dropped, admitted)
        count = len(self.by_sequence) - len(dropped) + len(admitted)
        if count > self.limits.sequences_max:
            raise PlanError(
                f"{count} sequences would be resident; sequences_max is {self.limits.sequences_max}"
            )
        if self.kv_used + cells > self.limits.kv_tokens:
            used = self.kv_used - self._freed_by(dropped) + cells
            if used > self.limits.kv_tokens:
                raise PlanError(
                    f"{used} KV tokens would be in use; kv_tokens is {self.limits.kv_tokens}"
                )

    def _check_drops(self, drops: Iterable[int]) -> set[int]:
        dropped: set[int] = set()
        for sequence in drops:
            if sequence not in self.by_sequence or sequence in dropped:
                raise PlanError(f"drop of sequence {sequence}, which is not resident")
            dropped.add(sequence)
        return dropped

    def _check_admits(self, admits: Iterable[Admit], dropped: set[int]) -> dict[int, Admit]:
        admitted: dict[int, Admit] = {}
        for admit in admits:
            sequence = admit.sequence
            if sequence in admitted or (sequence in self.by_sequence and sequence not in dropped):
                raise PlanError(f"admit of sequence {sequence}, which is already resident")
            self._check_tokens(admit)
            if admit.share_len:
                self._check_share(admit, dropped, admitted)
            admitted[sequence] = admit
        return admitted

    def _check_tokens(self, admit: Admit) -> None:
        tokens, limits = admit.tokens, self.limits
        if not tokens:
            raise PlanError(f"admit of sequence {admit.sequence} without tokens")
        if len(tokens) > limits.length_max:
            raise PlanError(
                f"admit of sequence {admit.sequence} with {len(tokens)} tokens;"
                f" length_max is {limits.length_max}"
            )
        if not 0 < admit.prompt_len <= len(tokens):
            raise PlanError(
                f"admit of sequence {admit.sequence} with prompt_len {admit.prompt_len}"
                f" of {len(tokens)} tokens"
            )
        if max(tokens) >= limits.vocab_size or min(tokens) < 0:
            raise PlanError(
                f"admit of sequence {admit.sequence} with a token id outside the vocabulary"
                f" of {limits.vocab_size}"
            )

    def _check_share(self, admit: Admit, dropped: set[int], admitted: dict[int, Admit]) -> None:
        share, donor = admit.share_len, admit.share_from
        what = f"sequence {admit.sequence} shares {share} tokens of sequence {donor}"
        if not 0 < share < len(admit.tokens):
            raise PlanError(f"{what}, but has {len(admit.tokens)} tokens")
        if share % self.limits.page_tokens:
            raise PlanError(f"{what}; pages hold {self.limits.page_tokens}")
        if donor in admitted:
            fellow = admitted[donor]
            known, computed, adapter = fellow.tokens, fellow.share_len, fellow.adapter
        elif donor in self.by_sequence and donor not in dropped:
            resident = self.by_sequence[donor]
            known, computed, adapter = resident.tokens, resident.computed, resident.adapter
        else:
            raise PlanError(f"{what}, which is not resident")
        if adapter != admit.adapter:
            raise PlanError(f"{what}, but they have different adapters")
        if share > computed:
            raise PlanError(f"{what}, of which {computed} are computed")
        if list(known[:share]) != list(admit.tokens[:share]):
            raise PlanError(f"{what}, but the tokens differ")

    def _check_work(
        self, work: Sequence[tuple[int, int]], dropped: set[int], admitted: dict[int, Admit]
    ) -> int:
        # Once per sequence and step: the difference of two ``pages`` without their calls.
        total = cells = 0
        seen: set[int] = set()
        by_sequence, page = self.by_sequence, self.limits.page_tokens
        for sequence, count in work:
            resident = by_sequence.get(sequence)
            if sequence in admitted:
                admit = admitted[sequence]
                known, computed = len(admit.tokens), admit.share_len
            elif resident is None or sequence in dropped:
                raise PlanError(f"work for sequence {sequence}, which is not resident")
            elif resident.failed:
                continue
            else:
                known, computed = len(resident.tokens), resident.computed
            if not 0 < count <= known - computed:
                raise PlanError(
                    f"work of {count} tokens for sequence {sequence},"
                    f" which has {known - computed} to compute"
                )
            if computed + count > self.limits.length_max:
                raise PlanError(
                    f"sequence {sequence} would hold {computed + count} tokens;"
                    f" length_max is {self.limits.length_max}"
                )
            seen.add(sequence)
            total += count
            cells += page * (-(-(computed + count) // page) + -computed // page)
        if len(seen) != len(work) and len({sequence for sequence, _ in work}) != len(work):
            raise PlanError("a sequence appears twice in the work of one plan")
        if total > self.limits.step_tokens_max:
            raise PlanError(
                f"work of {total} tokens; step_tokens_max is {self.limits.step_tokens_max}"
            )
        return cells

    def pages(self, tokens: int) -> int:
        """Cells of the whole pages that hold so many tokens."""
        return -(-tokens // self.limits.page_tokens) * self.limits.page_tokens

    def _freed_by(self, dropped: set[int]) -> int:
        """How many cells become free when these sequences go, without letting them go."""
        lost: dict[int, int] = {}
        freed = 0
        for sequence in dropped:
            span: _Span | None = self.by_sequence[sequence].span
            while span is not None:
                lost[id(span)] = lost.get(id(span), 0) + 1
                if lost[id(span)] < span.refs:
                    break
                freed += self.pages(span.end) - span.start
                span = span.parent
        return freed

    # What a checked plan does -------------------------------------------------------------------

    def drop(self, sequence: int) -> Resident:
        """Lets a sequence go and frees the cells that no other sequence shares."""
        resident = self.by_sequence.pop(sequence)
        heappush(self._slots, resident.slot)
        span: _Span | None = resident.span
        while span is not None:
            span.refs -= 1
            if span.refs:
                break
            self.kv_used -= self.pages(span.end) - span.start
            span = span.parent
        return resident

    def admit(self, admit: Admit) -> Resident:
        """Takes a sequence in; it starts with the cells that it shares, and a free slot."""
        parent = None
        if admit.share_len:
            parent = self._branch(self.by_sequence[admit.share_from].span, admit.share_len)
        resident = Resident(
            sequence=admit.sequence,
            tokens=list(admit.tokens),
            prompt_len=admit.prompt_len,
            sampling=admit.sampling,
            slot=heappop(self._slots),
            computed=admit.share_len,
            span=_Span(parent, admit.share_len, admit.share_len),
            plain=is_plain(admit.sampling),
            adapter=admit.adapter,
        )
        self.by_sequence[admit.sequence] = resident
        return resident

    def _branch(self, leaf: _Span, length: int) -> _Span:
        """The span that ends exactly at ``length``, split off if need be, with one more child."""
        span = leaf
        while span.start >= length:
            assert span.parent is not None, "the first span starts at 0, and length is positive"
            span = span.parent
        if span.end > length or span is leaf:
            # The lower part becomes a parent of its own; whoever held the span keeps the rest.
            span.parent = _Span(span.parent, span.start, length)
            span.start = length
            span = span.parent
        span.refs += 1
        return span

    def compute(self, resident: Resident, count: int) -> bool:
        """Marks the next ``count`` tokens as computed; says whether a token is to be drawn now."""
        page, computed = self.limits.page_tokens, resident.computed + count
        # As in ``_check_work``.
        self.kv_used += page * (-(-computed // page) + -resident.computed // page)
        resident.computed = computed
        resident.span.end += count
        return resident.computed == len(resident.tokens)
