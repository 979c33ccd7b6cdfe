"""The first steps of a group, before any request is placed there and before any other goes for it.

A worker that has loaded need not compute: a kernel may lack, or memory, or the ranks may differ.
"""

import asyncio
from collections.abc import Sequence

from router.core.effects import Admit, RunPlan
from router.core.events import StepDone
from router.life import Life
from router.link import Link, LinkDownError
from router.together import all_of

SEQUENCE, TOKEN = 1, 1
"""What is computed: two tokens behind this one, which every vocabulary has."""


async def try_out(links: Sequence[Link], epoch: int) -> None:
    """Lets a group, by new links to its ranks in order, compute a prompt and a token more.

    Their streams are opened for that, and they are closed. The caller sets the limit. Raises
    ``LinkDownError`` if it fails.
    """
    plans = _plans(epoch)
    try:
        await all_of(link.open() for link in links)
        await _run(plans, links, epoch)
    finally:
        for link in links:
            await link.close()


async def _run(plans: Sequence[RunPlan], links: Sequence[Link], epoch: int) -> None:
    """Has the plans answered."""
    answered = asyncio.Event()

    def stepped(done: StepDone, _: float) -> None:
        for _sequence, why in done.failures:
            raise LinkDownError(why)
        if done.plan_id < len(plans) and list(done.sequences) != [SEQUENCE]:
            raise LinkDownError("it has drawn no token")
        if done.plan_id == len(plans):
            answered.set()

    life = Life("trial", epoch, links, stepped, told_to_leave=lambda: None)
    living, waiting = asyncio.create_task(life.run()), asyncio.create_task(answered.wait())
    try:
        for plan in plans:
            life.write(plan)
        await asyncio.wait((living, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not answered.is_set():
            living.result()  # raises why
    finally:
        living.cancel()
        waiting.cancel()
        await asyncio.wait((living, waiting))


def _plans(epoch: int) -> tuple[RunPlan, ...]:
    """A prompt, a decode, and the end of it."""
    admit = Admit(SEQUENCE, (TOKEN,), 1, 0, 0, None)
    work = (SEQUENCE,), (1,)
    return (
        RunPlan("trial", epoch, 1, (), (admit,), *work),
        RunPlan("trial", epoch, 2, (), (), *work),
        RunPlan("trial", epoch, 3, (SEQUENCE,), (), (), ()),
    )
