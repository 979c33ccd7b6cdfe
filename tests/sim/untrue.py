"""Outcomes that cannot be true, each of which must make the core give up the group."""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace
from random import Random

from router.core.events import StepDone
from tests.sim.books import Request

NOBODY = 10**9


def untrue(
    rng: Random, outcome: StepDone, last: StepDone | None, present: Mapping[int, Request]
) -> tuple[str, StepDone]:
    """A wrong answer in the place of ``outcome``, and its kind. ``last`` was the one before.

    ``present`` are the requests of which it can tell.
    """
    for place, (number, _, values) in enumerate(outcome.prompts):
        if number in present and rng.random() < 0.5:
            return _misscored(rng, outcome, place, present[number], values)
    sequences, tokens = list(outcome.sequences), list(outcome.tokens)
    kind = rng.choice(("repeated", "skipped", "missing", "hidden", "surplus", "uneven", "swapped"))
    where = rng.randrange(len(tokens)) if tokens else 0
    match kind:
        case "repeated" if last is not None:
            return kind, last
        case "missing" if tokens:
            del sequences[where], tokens[where]
        case "hidden" if tokens:
            del sequences[where], tokens[where]
            return kind, _with(outcome, sequences, tokens, ((NOBODY, "not one of ours"),))
        case "surplus":
            sequences.append(sequences[where] if tokens and rng.random() < 0.5 else NOBODY)
            tokens.append(1)
        case "uneven":
            tokens.append(1)
        case "swapped" if tokens:
            others = [number for number in sequences if number != sequences[where]]
            sequences[where] = rng.choice([*others, NOBODY])
        case _:
            return "skipped", replace(outcome, plan_id=outcome.plan_id + 1)
    return kind, _with(outcome, sequences, tokens, ())


def _misscored(
    rng: Random, outcome: StepDone, place: int, request: Request, values: Seq[object]
) -> tuple[str, StepDone]:
    """Log probabilities of a prompt that have a gap, go on behind it, or are left out."""
    prompts, length = list(outcome.prompts), len(request.facts.prompt)
    due = request.id in outcome.sequences and request.scored < length
    kind = rng.choice(("gap", "overlong", "unscored" if due else "gap"))
    match kind:
        case "gap":
            prompts[place] = (request.id, request.scored + 1, values)
        case "overlong":
            prompts[place] = (request.id, 1, (None,) * length)
        case _:
            del prompts[place]
    return kind, replace(outcome, prompts=tuple(prompts))


def _with(
    outcome: StepDone, sequences: list[int], tokens: list[int], more: tuple[tuple[int, str], ...]
) -> StepDone:
    """The outcome with other tokens. Logprobs stay parallel if there are any."""
    logprobs = tuple(None for _ in sequences) if outcome.logprobs else ()
    failures = outcome.failures + more
    return replace(
        outcome, sequences=sequences, tokens=tokens, logprobs=logprobs, failures=failures
    )
