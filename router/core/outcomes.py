"""Whether what a group says of a plan can be true. One that says what is not so is given up."""

from router.core.events import StepDone
from router.core.scoring import doubt
from router.core.state import Group


def untrue(group: Group, event: StepDone) -> str | None:
    """Why the outcome cannot be an answer to the oldest plan in flight, if it cannot."""
    if not group.in_flight or group.in_flight[0].plan_id != event.plan_id:
        return f"an outcome for plan {event.plan_id} came out of turn"
    if len(event.sequences) != len(event.tokens):
        return f"plan {event.plan_id} drew tokens for nobody"
    due = dict(group.in_flight[0].samples)
    for request, _ in event.failures:
        due.pop(request, None)
    if len(event.sequences) != len(due) or due.keys() != set(event.sequences):
        return f"plan {event.plan_id} did not draw one token for each sequence that was due"
    scores = event.prompts or group.in_flight[0].scored
    return doubt(group, event) if scores else None
