"""One group: joins its ranks into one thing that the core can send plans to.

    down ──every rank described──► agreed ──streams open──► up (a new epoch) ──any fault──► down
      ▲                                                      │                               ▲ │
      │                                                      └──leaves──► nothing runs there ┘ │
      └────────────────────────────── pause, longer each time ◄────────────────────────────────┘

A life begins with ``GroupUp`` and ends with ``GroupDown``, both with its epoch. Within it every
rank gets the same bytes, and an outcome counts once every rank has answered that plan with the same
digest. One rank's fault ends the life of all: ranks that differ cannot be told from ranks that are
wrong. The group tries again for as long as the router runs, unless it is retired. It leaves when it
is retired, or when a worker says that it has been told to leave.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from time import monotonic
from typing import Protocol, TypeVar

from router.config import GroupSpec
from router.core.effects import Abandon, Left, RunPlan
from router.core.events import Event, GroupDown, GroupLeaving, GroupUp, StepDone
from router.described import card_of
from router.fleet import Fleet, GroupCard, MismatchError
from router.life import AbandonedError, LeftError, Life
from router.link import (
    Backoff,
    ClosedError,
    Link,
    LinkDownError,
    SilentError,
    UnreachableError,
)
from router.metrics import Metrics
from router.text.tokenizer import Tokenizer
from router.together import all_of
from router.trial import try_out
from shards.v1.shard_pb2 import Constraint, DescribeResponse

log = logging.getLogger(__name__)
T = TypeVar("T")

PROVEN_S = 5.0
"""A life that lasted so long, or did any step, lets the next attempt come without a long pause."""

SILENCES_MAX = 2
"""How often in a row a worker that was given up may let an attempt to reconnect run out of time,
before whoever looks after it hears of that. A step that was merely long has ended by then."""

CAUSES_KEPT = 16
"""Causes of which is remembered that they have been logged."""


class Inbox(Protocol):
    """Where a group's news goes: the driver."""

    def post(self, event: Event) -> None:
        """Takes an event; never refuses, never waits."""

    def act(self, event: Event) -> None:
        """Takes an event, and acts on it before it returns."""


class Group:
    """Owner of one group's links. ``run`` is its task; no other method but ``wait_up`` waits.

    ``epochs`` gives a number that no life of any group has had. ``dial`` makes a new link to an
    address, with slots for all plans that the core may have in flight. ``silent`` is called with
    the group's name when its workers hang: they have been given up, are still there, and answer
    nothing.
    """

    def __init__(
        self,
        spec: GroupSpec,
        *,
        inbox: Inbox,
        fleet: Fleet,
        metrics: Metrics,
        epochs: Callable[[], int],
        dial: Callable[[str], Link],
        silent: Callable[[str], None] = lambda _: None,
        random: Random | None = None,
    ) -> None:
        self.spec = spec
        self._inbox = inbox
        self._fleet = fleet
        self._epochs = epochs
        self._dial = dial
        self._backoff = Backoff(random or Random())  # noqa: S311 - spreads attempts
        self._life: Life | None = None
        self._calls = metrics.batches.group(spec.name)
        self._silent = silent
        self._silences: int | None = None
        self._told = deque[str](maxlen=CAUSES_KEPT)
        self._retired = False
        self._returns = True
        self._settled = asyncio.Event()
        self._refusal = ""
        self._trial_s: float | None = None

    @property
    def leaving(self) -> bool:
        """Whether its present life gets no more requests."""
        return self._life is not None and self._life.leaving

    def try_first(self, limit_s: float) -> None:
        """Has it tried out, for so many seconds at most, before it serves for the first time."""
        self._trial_s = limit_s

    async def wait_up(self) -> None:
        """Waits until it serves. Raises ``MismatchError`` if it cannot, alone or beside others."""
        await self._settled.wait()
        if self._refusal:
            raise MismatchError(self._refusal)

    def retire(self, *, at_once: bool = False, returns: bool = False) -> bool:
        """Lets ``run`` end with the present life, which gets no more requests, if there is one.

        Returns whether there is. ``at_once``: what runs there has to go now, even if no other group
        can take it. ``returns``: another of its name is likely to come up, so what only it can do
        waits for that.
        """
        self._retired = True
        self._returns = returns
        if self._life is None:
            return False
        self._leave(at_once)
        return True

    def left(self, effect: Left) -> None:
        """Ends the present life, if it is the one that is meant: nothing runs there any more."""
        if self._life is not None and effect.epoch == self._life.epoch:
            self._life.left()

    def write(self, plan: RunPlan) -> None:
        """Sends a plan to every rank, if it is for the present life."""
        if self._life is not None and plan.epoch == self._life.epoch:
            self._calls.sent(plan)
            self._life.write(plan)

    def abandon(self, effect: Abandon) -> None:
        """Ends the present life, if it is the one that is meant."""
        if self._life is not None and effect.epoch == self._life.epoch:
            self._life.end(AbandonedError(effect.detail))

    async def run(self) -> None:
        """Lives again and again, until cancelled or retired."""
        while not self._retired:
            try:
                await self._attempt()
            except LeftError:
                log.info("group %s has left", self.spec.name)
            except (LinkDownError, MismatchError) as failure:
                self._tell(failure)
                self._listen_for(failure)
                self._refuse(failure)
            self._fleet.turns.over(self.spec.name)
            if not self._retired:
                await asyncio.sleep(self._backoff.pause_s())

    def _tell(self, failure: Exception) -> None:
        """Logs why the group is down, each cause once until it is up again.

        That nobody is there any more goes without saying once it is known to be down.
        """
        cause = str(failure)
        absent = isinstance(failure, UnreachableError) and not isinstance(failure, ClosedError)
        known = cause in self._told or (self._told and absent)
        if not known:
            log.warning("group %s is down: %s", self.spec.name, cause)
            self._told.append(cause)

    def _refuse(self, failure: Exception) -> None:
        """Lets those who wait for it know that it cannot serve."""
        if isinstance(failure, MismatchError):
            self._refusal = str(failure)
            self._settled.set()

    def _leave(self, at_once: bool = False) -> None:
        """Its present life gets no more requests, and ends when the last has left."""
        life = self._life
        assert life is not None, "only a group that is up can leave"
        if not life.leaving:
            log.info("group %s takes no more requests", self.spec.name)
        life.leaving = True
        self._fleet.leaving(self.spec.name)
        self._inbox.post(GroupLeaving(self.spec.name, life.epoch, at_once, self._returns))

    def _listen_for(self, failure: Exception) -> None:
        """Notices when workers that were given up do not answer any more, though they are there.

        Those that are loading do not answer, either; so only the first attempts after a life count.
        """
        if isinstance(failure, AbandonedError):
            self._silences = 0
        elif not isinstance(failure, SilentError):
            self._silences = None
        elif self._silences is not None:
            self._silences += 1
            if self._silences == SILENCES_MAX:
                self._silences = None
                self._silent(self.spec.name)

    async def _attempt(self) -> None:
        """Tries to connect every rank, and lives on until one fails."""
        links = [self._dial(address) for address in self.spec.addresses]
        try:
            described = await all_of(link.describe() for link in links)
            card = card_of(self.spec, described)
            links = [links[place] for place in _places(described)]
            await self._fleet.turns.wait(card.name, card.model)
            with self._fleet.claim(card):
                tokenizer = await self._tokenizer(card, links[0])
                await self._fleet.agree(card, tokenizer)
                await self._try([link.address for link in links])
                await all_of(link.open() for link in links)
                await self._live(card, tokenizer, links)
        finally:
            for link in links:
                await link.close()

    async def _try(self, addresses: Sequence[str]) -> None:
        """Tries the group out, once. Raises ``MismatchError`` if it computes nothing."""
        if self._trial_s is None:
            return
        try:
            async with asyncio.timeout(self._trial_s):
                await try_out([self._dial(address) for address in addresses], self._epochs())
        except TimeoutError:
            late = f"its first steps were not answered within {self._trial_s:g} s"
            raise MismatchError(late) from None
        except LinkDownError as error:
            raise MismatchError(f"it fails at its first steps: {error}") from None
        self._trial_s = None

    async def _tokenizer(self, card: GroupCard, link: Link) -> Tokenizer:
        known = self._fleet.tokenizer(card.tokenizer_sha256)
        if known is not None:
            return known
        files = await link.tokenizer_files()
        try:
            tokenizer = await asyncio.to_thread(Tokenizer.from_files, files)
        except Exception as error:  # noqa: BLE001 - a worker's file must not end the router
            cause = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise MismatchError(f"{link.address}: unusable tokenizer files: {cause}") from None
        self._fleet.keep_files(card.tokenizer_sha256, files)
        return tokenizer

    async def _live(self, card: GroupCard, tokenizer: Tokenizer, links: list[Link]) -> None:
        name, epoch = card.name, self._epochs()
        life = self._life = Life(name, epoch, links, self._stepped, self._leave)
        began_s = monotonic()
        self._fleet.up(card, tokenizer, life.embed, partial(_prepare, links))
        self._inbox.post(
            GroupUp(name, epoch, card.model, card.engine, card.limits, card.features, card.adapters)
        )
        log.info("group %s is up: %s on %s, epoch %d", name, card.engine, card.device, epoch)
        for warning in card.warnings:
            log.warning("group %s: %s", name, warning)
        self._told.clear()
        self._refusal = ""
        self._settled.set()
        try:
            await life.run()
        except LinkDownError:
            self._calls.died()
            raise
        finally:
            if life.steps or monotonic() - began_s > PROVEN_S:
                self._backoff.reset()
            self._life = None
            self._calls.lost()
            self._fleet.down(name)
            self._inbox.post(GroupDown(name, epoch))

    def _stepped(self, done: StepDone, step_s: float) -> None:
        self._calls.answered(step_s)
        self._inbox.act(done)


async def _prepare(links: Sequence[Link], constraint: Constraint) -> None:
    """Has a constraint compiled by every rank. Raises as ``Link.prepare``."""
    await all_of(link.prepare(constraint) for link in links)


def _places(described: Sequence[DescribeResponse]) -> list[int]:
    """Where each rank is in the list, rank 0 first."""
    return sorted(range(len(described)), key=lambda place: described[place].rank)
