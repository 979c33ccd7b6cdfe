"""A deterministic engine without a model: for tests, demonstrations and overhead measurements.

It keeps the contract to the letter, so it is the reference for other engines. The likeliest next
token is a pure function of the tokens so far; what the text says comes from ``scripted_text``. The
logits are noise in [0, 1) with that token lifted above it, so every kind of sampling has a
meaning. Under a constraint the scripted token is taken if it is allowed, else another one by the
noise; every few tokens what leads to an end comes first, so that every constrained answer has one.

Engine options (``--engine-option key=value``):

- ``step_ms``: time that a step with work takes. Steps that follow each other tick on one clock.
- ``token_us``: time on top for each computed token beyond the one that every decode computes.
- ``answer``: the text of every answer, then end of sequence. ``length``: end after so many tokens.
- ``crash_after_steps``: the process exits in the step after so many steps with work.
  ``wedge_after_steps``: that step never returns. ``lost_after_steps``: it raises ``EngineLost``.
- ``fail_sequence_after``: each sequence fails when it would draw one more token than that.
"""

import os
import threading
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

import numpy as np
from numpy.typing import NDArray

from shards.engines.base import (
    Engine,
    EngineInfo,
    EngineLost,
    EngineOptions,
    ModelError,
    Outcome,
    Plan,
    Progress,
    Scheduling,
)
from shards.engines.caller import settle
from shards.engines.scripted_text import Script
from shards.extras import Extras
from shards.grammar import Grammar
from shards.grammar_masks import Masks
from shards.prompt_logprobs import Scores, targets_of
from shards.residents import Limits, Resident, Residents
from shards.sampling import Sampler, splitmix64

# Steps whose plan was there this soon after the last one ended count as back to back.
GAP_MAX_S = 0.001
LIFT = 4.0
CRASH_CODE = 70
# Of this many tokens under a constraint, one ends what can be ended: a string, a list, the answer.
CLOSE_EVERY = 4
_MASK = (1 << 64) - 1


class ScriptedEngine(Engine):
    """See the module. Needs no model; ``options.model`` is ignored."""

    def __init__(self, options: EngineOptions, progress: Progress) -> None:
        extras = Extras("scripted", options.extra)
        self._step_s = extras.number("step_ms", 0.0) / 1e3
        self._token_s = extras.number("token_us", 0.0) / 1e6
        answer = extras.text("answer", "")
        self._length = extras.whole("length", 0)
        self._crash_after = extras.whole("crash_after_steps", 0)
        self._wedge_after = extras.whole("wedge_after_steps", 0)
        self._lost_after = extras.whole("lost_after_steps", 0)
        self._fail_after = extras.whole("fail_sequence_after", 0)
        length_max = extras.whole("length_max", 8192)
        extras.finish()
        if answer and self._length:
            raise ModelError("scripted: engine options answer and length exclude each other")
        self._script = Script()
        self._answer = self._script.encode(answer) if answer else []
        kv_tokens = options.kv_tokens or 1 << 20
        self._limits = Limits(
            kv_tokens=kv_tokens,
            page_tokens=1,
            sequences_max=options.sequences_max or 2048,
            step_tokens_max=options.step_tokens_max or 4096,
            length_max=min(length_max, kv_tokens),
            vocab_size=self._script.vocab_size,
        )
        self._residents = Residents(self._limits)
        self._sampler = Sampler(self._limits.vocab_size, threads=1)
        self._masks = Masks()
        self._closing = [self._script.eos, *self._script.encode('"}],')]
        self._scores = Scores()
        self._info = self._describe(options)
        self._steps = 0
        self._ended_s = 0.0
        self._closed = threading.Event()
        progress(1.0)

    def _describe(self, options: EngineOptions) -> EngineInfo:
        return EngineInfo(
            engine="scripted",
            engine_version=_version(),
            device="none",
            model_id=options.model_id,
            dtype="none",
            scheduling=Scheduling.CALLER,
            kv_tokens=self._limits.kv_tokens,
            page_tokens=1,
            sequences_max=self._limits.sequences_max,
            step_tokens_max=self._limits.step_tokens_max,
            length_max=self._limits.length_max,
            vocab_size=self._limits.vocab_size,
            eos_token_ids=(self._script.eos,),
            features=(
                "logprobs",
                "penalties",
                "seed",
                "logit_bias",
                "min_tokens",
                "typical_p",
                "prefix_sharing",
                "prompt_logprobs",
                "grammar",
                "ranks",
                "watermark",
            ),
            rank=options.rank,
            world=options.world,
        )

    def describe(self) -> EngineInfo:
        """See ``Engine``."""
        return self._info

    def tokenizer_files(self) -> dict[str, bytes]:
        """See ``Engine``."""
        return self._script.files()

    def reset(self) -> None:
        """See ``Engine``."""
        self._residents.clear()

    def guide_with(self, grammar: Grammar) -> None:
        """See ``Engine``."""
        self._masks.grammar = grammar

    def close(self) -> None:
        """Lets a wedged step go."""
        self._closed.set()

    def step(self, plan: Plan) -> Outcome:
        """See ``Engine``. Sequences draw in the order of the plan's work, plain ones first."""
        began_s = time.monotonic()
        residents = self._residents
        residents.check(plan)
        for sequence in plan.drops:
            residents.drop(sequence)
        for admit in plan.admits:
            resident = residents.admit(admit)
            if admit.sampling.constraint is not None:
                resident.guide = self._masks.guide(admit.sampling.constraint, self)
        outcome = Outcome()
        if plan.work:
            self._fault()
            extra = self._compute(plan, outcome)
            self._pace(began_s, extra)
        return outcome

    def _compute(self, plan: Plan, outcome: Outcome) -> int:
        """Applies the work; returns how many tokens were computed beyond one per sequence."""
        residents, fail_after = self._residents, self._fail_after
        by_sequence, compute = residents.by_sequence, residents.compute
        sampled: list[Resident] = []
        sequences, tokens = outcome.sequences, outcome.tokens
        extra = 0
        for sequence, count in plan.work:
            resident = by_sequence[sequence]
            if resident.failed:
                continue
            extra += count - 1
            if resident.sampling.prompt_logprobs:
                self._score(resident, count)
            if not compute(resident, count):
                continue
            if fail_after and len(resident.tokens) - resident.prompt_len >= fail_after:
                resident.failed = True
                outcome.failures[sequence] = f"the script fails after {fail_after} tokens"
            elif resident.plain:
                token = self._next(resident)
                resident.tokens.append(token)
                sequences.append(sequence)
                tokens.append(token)
            else:
                sampled.append(resident)
        if sampled:
            self._sample(sampled, outcome)
        self._scores.tell(outcome)
        return extra

    def _score(self, resident: Resident, count: int) -> None:
        """Scores the part of a prompt that is being computed, row by row: they need few bytes."""
        for index, target in enumerate(targets_of(resident, count)):
            known = resident.tokens[: resident.computed + 1 + index]
            logits = self._noise(known, self._script.follow(known))
            self._scores.take(resident, (target,), logits[None])

    def _next(self, resident: Resident) -> int:
        """The likeliest token after the known ones."""
        known = resident.tokens
        if self._answer or self._length:
            drawn = len(known) - resident.prompt_len
            if drawn < len(self._answer):
                return self._answer[drawn]
            if drawn >= self._length:
                return self._script.eos
        return self._script.follow(known)

    def _sample(self, rows: list[Resident], outcome: Outcome) -> None:
        self._masks.begin(rows)
        logits = np.stack([self._logits(row) for row in rows])
        settle(rows, self._sampler.draw(logits, rows), outcome)

    def _logits(self, row: Resident) -> NDArray[np.float32]:
        """What follows; under a constraint, every few tokens, rather what leads to its end."""
        logits = self._noise(row.tokens, self._next(row))
        drawn = len(row.tokens) - row.prompt_len
        if row.guide is not None and not self._answer and drawn % CLOSE_EVERY == CLOSE_EVERY - 1:
            logits[self._closing] += np.float32(2 * LIFT)
        return logits

    def _noise(self, known: Sequence[int], scripted: int) -> NDArray[np.float32]:
        """Noise that depends on the last two tokens and the position, and the scripted token."""
        context = len(known) << 32 ^ known[-1] << 16 ^ known[max(0, len(known) - 2)]
        keys = np.arange(self._limits.vocab_size, dtype=np.uint64) + np.uint64(
            splitmix64(context) & (_MASK >> 1)
        )
        keys *= np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
        keys *= np.uint64(0xBF58476D1CE4E5B9)
        logits = (keys >> np.uint64(40)).astype(np.float32) / np.float32(1 << 24)
        logits[scripted] += np.float32(LIFT)
        return logits

    def _fault(self) -> None:
        """Counts a step with work; does what the options say should go wrong in it."""
        self._steps += 1
        if 0 < self._crash_after < self._steps:
            os._exit(CRASH_CODE)
        if 0 < self._wedge_after < self._steps:
            self._closed.wait()
            raise EngineLost("the script wedged, and was closed")
        if 0 < self._lost_after < self._steps:
            raise EngineLost(f"the script loses its device after {self._lost_after} steps")

    def _pace(self, began_s: float, extra: int) -> None:
        """Waits until the step's time is over.

        The end is measured from the end of the last step if this one was ready by then, so that a
        fed engine ticks without drift, and an idle one starts its clock anew.
        """
        took_s = self._step_s + self._token_s * extra
        if took_s == 0.0:
            return
        start_s = self._ended_s if began_s - self._ended_s < GAP_MAX_S else began_s
        self._ended_s = start_s + took_s
        remaining_s = self._ended_s - time.monotonic()
        if remaining_s > 0:
            self._closed.wait(remaining_s)


def _version() -> str:
    try:
        return version("roundhouse-llm")
    except PackageNotFoundError:
        return "0"


def load(options: EngineOptions, progress: Progress) -> Engine:
    """Makes the engine; see ``shards.engines``."""
    return ScriptedEngine(options, progress)
