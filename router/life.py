"""One life of a group: the streams of one epoch. An answer counts once every rank has given it.

Every rank gets the same bytes. One rank's fault ends the life of all: ranks that differ cannot be
told from ranks that are wrong.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from router.core.effects import RunPlan
from router.core.events import StepDone
from router.link import Link, LinkDownError, encode
from router.together import together
from shards.v1.shard_pb2 import Outcome, PromptLogprobs, TokenLogprobs


class AbandonedError(LinkDownError):
    """The core has given up a life of the group."""


class LeftError(Exception):
    """Nothing runs any more in a group that was to leave."""


class Life:
    """The streams of one epoch. ``stepped`` gets each finished step and the engine's seconds.

    ``links`` are in order of rank. ``steps`` counts the plans that every rank has answered.
    ``told_to_leave`` is called when a worker says so.
    """

    def __init__(
        self,
        name: str,
        epoch: int,
        links: Sequence[Link],
        stepped: Callable[[StepDone, float], None],
        told_to_leave: Callable[[], None],
    ) -> None:
        self.name = name
        self.epoch = epoch
        self.steps = 0
        self.leaving = False
        self._links = links
        self._stepped = stepped
        self._told_to_leave = told_to_leave
        self._sent = 0
        self._embeds = 0
        self._is_left = False
        self._answers: list[deque[Outcome]] = [deque() for _ in links]
        self._ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def write(self, plan: RunPlan) -> None:
        """Sends a plan to every rank."""
        self._sent = plan.plan_id
        wire = encode(plan)
        for link in self._links:
            link.write(wire)

    def end(self, why: AbandonedError | LeftError) -> None:
        """Ends this life."""
        if not self._ended.done():
            self._ended.set_exception(why)

    def left(self) -> None:
        """Ends this life when what rank 0 embeds is done: of that the core knows nothing."""
        self._is_left = True
        if not self._embeds:
            self.end(LeftError())

    async def embed(self, inputs: Sequence[Sequence[int]]) -> list[Sequence[float]]:
        """Has inputs turned into vectors. Otherwise as ``Link.embed``."""
        self._embeds += 1
        try:
            return await self._links[0].embed(inputs)
        finally:
            self._embeds -= 1
            if self._is_left:
                self.left()

    async def run(self) -> None:
        """Passes on what comes from the open streams, until the first fault."""
        work: list[asyncio.Future[None]] = [self._ended]
        for rank, link in enumerate(self._links):
            work.append(asyncio.create_task(link.write_plans()))
            work.append(asyncio.create_task(link.read_outcomes(partial(self._answered, rank))))
        await together(work)

    def _answered(self, rank: int, outcome: Outcome) -> None:
        """A rank has answered a plan; a step is done when the last of them has."""
        if outcome.leaving:
            self._told_to_leave()
            return
        answers = self._answers
        due = self.steps + len(answers[rank]) + 1
        if outcome.epoch != self.epoch or outcome.plan_id != due or due > self._sent:
            raise LinkDownError(
                f"{self._links[rank].address}: answered plan {outcome.plan_id} of epoch "
                f"{outcome.epoch}, but plan {due} of epoch {self.epoch} is due"
            )
        answers[rank].append(outcome)
        if not all(answers):
            return
        first, *others = map(deque.popleft, answers)
        self.steps = due
        for other in others:
            if other.digest != first.digest:
                digests = ", ".join(f"{one.digest:016x}" for one in (first, *others))
                raise LinkDownError(f"the ranks differ after plan {due}: {digests}")
        self._stepped(step_done(self.name, first), first.step_us / 1e6)


def step_done(group: str, outcome: Outcome) -> StepDone:
    """Rank 0's outcome as the core reads it: plain lists, and logprobs parallel to the tokens.

    Of prompts each position has a ``TokenLogprobs``, whose sequence is not set.
    """
    sequences = list(outcome.sequences)
    logprobs: list[object] = []
    if outcome.logprobs:
        sparse = {one.sequence: one for one in outcome.logprobs}
        logprobs = [sparse.get(sequence) for sequence in sequences]
    failures, prompts = outcome.failures, outcome.prompt_logprobs
    return StepDone(
        group,
        outcome.epoch,
        outcome.plan_id,
        sequences,
        list(outcome.tokens),
        logprobs,
        tuple((one.sequence, one.message) for one in failures) if failures else (),
        tuple((one.sequence, one.start, _scores(one)) for one in prompts) if prompts else (),
    )


def _scores(prompt: PromptLogprobs) -> list[object]:
    """One message for each token; if there are likeliest ones for some only, for those."""
    if not prompt.likeliest:
        found = [TokenLogprobs(logprob=logprob) for logprob in prompt.logprobs]
    else:
        found = [
            TokenLogprobs(logprob=logprob, top_tokens=top.tokens, top_values=top.values)
            for logprob, top in zip(prompt.logprobs, prompt.likeliest, strict=False)
        ]
    for one, rank in zip(found, prompt.ranks, strict=False):
        one.rank = rank
    return list(found)
