"""Answers that have begun and have no group to go on in: how long the core waits for one."""

from dataclasses import replace
from random import Random

from router.core.scheduler import Core
from tests.sim.books import Books
from tests.sim.world import World


def add_patience(rng: Random, world: World) -> None:
    """Lets some worlds wait for less time than groups are away, or keeps groups away for longer."""
    patience_ms = rng.choice((1, 4, 15, 60, 10_000, 10_000))
    world.config = replace(world.config, resume_timeout_ms=patience_ms)
    world.down_ms_max *= rng.choice((1, 1, 1, 8))


def note_stranded(books: Books, core: Core) -> None:
    """After a turn: who waits now, and since when."""
    former, books.stranded = books.stranded, {}
    for number, request in books.open.items():
        waits = number in core._lines[core._live[number].facts.model]
        if waits and request.tokens and not books.serving(request.model):
            books.seen["stranded"] += number not in former
            books.stranded[number] = former.get(number, books.now)
