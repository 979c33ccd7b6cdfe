"""Which tokens each constrained sequence may draw next, found out while the step is computed.

Before an engine computes a step it says which sequences will draw (``Masks.begin``). One thread
then tells their matchers what was drawn last, and asks them what is allowed now; llguidance lets
the other threads of Python run meanwhile. The sampler takes the masks when it has the logits.
"""

import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from queue import Full, Queue
from typing import Protocol

import numpy as np
from llguidance import LLMatcher

from shards.allowed import GuideError, Words
from shards.engines.base import Constraint, Engine, EngineLost
from shards.grammar import ConstraintError, Grammar, TokenizerError, grammar_for, start_thread
from shards.grammar_probe import is_cost, one_line

MASK_S = 5.0
"""Seconds that one mask may take. The bounds of the compiler keep it below 0.1 s; this is for what
escapes them."""
STUCK_MAX = 2
"""Masks that may go on computing after they were given up."""
# The job of one step, and what a step left behind that did not come to draw.
JOBS_MAX = 8


class Guide:
    """Where one sequence stands in its constraint. Owned by the engine thread.

    Between ``Masks.begin`` and the end of ``allowed`` the matcher belongs to the masks' thread.
    """

    def __init__(
        self, masks: "Masks", matcher: LLMatcher | None, kind: str, vocab_size: int, fault: str = ""
    ) -> None:
        self._masks = masks
        self._matcher = matcher
        self._kind = kind
        self._words: Words = np.zeros(-(-vocab_size // 32), np.uint32)
        self.fault = fault
        self.consumed = 0
        self.ready = threading.Event()

    def allowed(self) -> Words:
        """The tokens that may be drawn now, until the next ``begin``. Raises ``GuideError``."""
        if not self.fault:
            self._masks.wait(self)
        if self.fault:
            raise GuideError(self.fault)
        return self._words

    def advance(self, drawn: Sequence[int]) -> str:
        """Takes in what was drawn, and finds what is allowed; says what is wrong, if anything is.

        Behind an end there are only ends: the sequence is over, and nobody has told us yet.
        """
        matcher = self._matcher
        assert matcher is not None, "a guide without a matcher has a fault"
        if matcher.is_stopped() or matcher.consume_tokens(list(drawn)):
            matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        if not matcher.is_error():
            return ""
        told = matcher.get_error()
        if is_cost(told):
            # The router knows by these words that the request is at fault: ``TOO_COSTLY`` there.
            return f"the constraint became too expensive to follow: {one_line(told, self._kind)}"
        return "what was generated before does not match the constraint"


class Row(Protocol):
    """What is to be known of a sequence that draws."""

    @property
    def guide(self) -> Guide | None:
        """Its guide, if it is constrained."""

    @property
    def tokens(self) -> Sequence[int]:
        """All tokens so far."""

    @property
    def prompt_len(self) -> int:
        """How many of them are prompt."""


class Masks:
    """The guides of one engine, and the thread that moves them on. Used by the engine thread.

    ``grammar`` is what compiles constraints; if none was given, one is made when it is needed.
    """

    def __init__(self) -> None:
        self.grammar: Grammar | None = None
        self._worker: _Worker | None = None
        self._work: list[_Work] = []
        self._stuck: list[threading.Thread] = []

    def guide(self, constraint: Constraint, engine: Engine) -> Guide:
        """A guide at the start of the constraint; one that cannot be compiled fails when used."""
        kind = constraint.kind.value
        try:
            if self.grammar is None:
                self.grammar = grammar_for(engine, engine.tokenizer_files())
            grammar = self.grammar
            return Guide(self, grammar.matcher(constraint), kind, grammar.vocab_size)
        except (ConstraintError, TokenizerError, OSError) as error:
            return Guide(self, None, kind, 0, f"the constraint cannot be compiled: {error}")

    def begin(self, rows: Sequence[Row]) -> None:
        """These sequences draw in the step that begins now."""
        work: list[_Work] = []
        for row in rows:
            guide = row.guide
            if guide is None or guide.fault:
                continue
            start = row.prompt_len + guide.consumed
            guide.consumed = len(row.tokens) - row.prompt_len
            guide.ready.clear()
            work.append((guide, row.tokens[start:]))
        if work:
            self._put(work)

    def _put(self, work: "list[_Work]") -> None:
        self._work = work
        if self._worker is None:
            self._worker = _Worker()
            weakref.finalize(self, self._worker.give_up)
        self._worker.jobs.put(work)

    def wait(self, guide: Guide) -> None:
        """Waits for the mask of one sequence, and gives up on one that does not end.

        Raises ``EngineLost`` when too many do not end.
        """
        while not guide.ready.wait(MASK_S):
            worker, self._worker = self._worker, None
            assert worker is not None, "a guide that is not ready was put to a worker"
            worker.give_up()
            self._stuck = [thread for thread in (*self._stuck, worker.thread) if thread.is_alive()]
            if len(self._stuck) > STUCK_MAX:
                raise EngineLost(f"{len(self._stuck)} masks of constraints do not come to an end")
            left = [(one, drawn) for one, drawn in self._work if not one.ready.is_set()]
            if left:
                # They are taken in order, so the first is the one that does not end.
                hung, _ = left[0]
                hung.fault = f"the constraint needs more than {MASK_S:g} s for one token"
                hung.ready.set()
                self._put(left[1:])


_Work = tuple[Guide, Sequence[int]]
"""A guide, and the tokens that its matcher does not know yet."""


class _Worker:
    """One thread that moves guides on, until it is given up; then it touches no further one."""

    def __init__(self) -> None:
        self.jobs: Queue[list[_Work] | None] = Queue(JOBS_MAX)
        self._lock = threading.Lock()
        self._given_up = False
        self.thread = start_thread(self._run, name="masks")

    def _run(self) -> None:
        while self._move(self.jobs.get()):
            pass  # nothing of the last job is held while the next one is waited for

    def _move(self, work: list[_Work] | None) -> bool:
        """Moves the guides of one job on; says whether there may be a next one."""
        for guide, drawn in work or ():
            try:
                fault = guide.advance(drawn)
            except BaseException as error:  # noqa: BLE001 - a bug there ends this sequence only
                fault = f"the constraint cannot be followed: {type(error).__name__}: {error}"
            if not self._publish(guide, fault):
                return False
        return work is not None

    def _publish(self, guide: Guide, fault: str) -> bool:
        """Says what became of a guide, unless that is of no interest any more."""
        with self._lock:
            if not self._given_up:
                guide.fault = fault
                guide.ready.set()
            return not self._given_up

    def give_up(self) -> None:
        """Leaves the thread to itself."""
        with self._lock:
            self._given_up = True
        with suppress(Full):  # then it is at work, and sees it when it has done what it does
            self.jobs.put_nowait(None)
