"""Answers that have begun and have no group to go on in: how long the core waits for one."""

from dataclasses import replace
from random import Random

from router.core.scheduler import Core
from tests.sim.books import Books, Request
from tests.sim.worker import ensure
from tests.sim.world import World


def add_patience(rng: Random, world: World) -> None:
    """Lets some worlds wait for less time than groups are away, or keeps groups away for longer.

    And draws what counts as progress between two losses.
    """
    patience_ms = rng.choice((1, 4, 15, 60, 10_000, 10_000))
    world.config = replace(world.config, resume_timeout_ms=patience_ms)
    world.down_ms_max *= rng.choice((1, 1, 1, 8))
    progress = rng.choice((1, 2, 4, 16))
    world.config = replace(world.config, progress_tokens_min=progress)


def note_stranded(books: Books, core: Core) -> None:
    """After a turn: who waits now, and since when."""
    former, books.stranded, books.aside = books.stranded, {}, set()
    for number, request in books.open.items():
        line = core._lines[core._live[number].facts.model]
        groups, aside = books.serving(request.model), set_aside(core, request)
        if aside:
            books.aside.add(number)
            able = any(group.able(request) for group in groups)
            ensure(request.tokens and not able, f"{number} was set aside for nothing")
            books.seen["set aside"] += number not in former
        if number in line and request.tokens and (aside or not groups):
            books.seen["stranded"] += number not in former
            books.stranded[number] = former.get(number, books.now)


def set_aside(core: Core, request: Request) -> bool:
    """Whether it waits where it holds up nobody."""
    line = core._lines[request.facts.model]
    return any(sequence.id == request.id for sequence in line.aside())
