"""Log probabilities of prompts: whether they can be true, and which of them are news.

A worker tells them as it computes a prompt, all of them by the first token that it draws. Where a
sequence was preempted or lost, its prompt is computed and told once more. The first telling of each
position counts, so that a client gets every position once and in order.
"""

from collections.abc import Sequence as Seq

from router.core.events import StepDone
from router.core.state import Group, Sequence


def doubt(group: Group, event: StepDone) -> str | None:
    """Why what an outcome says of prompts cannot be true, if it cannot."""
    told: dict[int, int] = {}
    for request, start, values in event.prompts:
        sequence = _meant(group, request, event.plan_id)
        if sequence is None:
            continue
        told[request] = start + len(values)
        follows = 0 < start <= sequence.scored and told[request] <= sequence.prompt_len
        if not follows or not sequence.scores_prompt:
            return f"plan {event.plan_id} told log probabilities of a prompt that were not due"
    for request in group.in_flight[0].scored:
        sequence = _meant(group, request, event.plan_id)
        if sequence is None or any(request == failed for failed, _ in event.failures):
            continue
        if max(sequence.scored, told.get(request, 0)) < sequence.prompt_len:
            return f"plan {event.plan_id} did not tell all log probabilities of a prompt"
    return None


def news(group: Group, event: StepDone) -> list[tuple[int, Seq[object]]]:
    """What is to be delivered of prompts; from now on it counts as delivered."""
    found: list[tuple[int, Seq[object]]] = []
    for request, start, values in event.prompts:
        sequence = _meant(group, request, event.plan_id)
        if sequence is None:
            continue
        fresh = values[sequence.scored - start :]
        if fresh:
            sequence.scored += len(fresh)
            found.append((request, fresh))
    return found


def _meant(group: Group, request: int, plan_id: int) -> Sequence | None:
    """The running sequence of this number, if it was resident already when the plan was sent."""
    sequence = group.placed(request)
    if sequence is None or not 0 < sequence.admitted_by <= plan_id:
        return None
    return sequence
