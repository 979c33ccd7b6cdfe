"""Groups that were up a moment ago and are likely to come up again, as after a crash.

What only such a group can do is not refused at once because a lesser one is up meanwhile: it waits,
set aside, until the group is back, or has been away for too long, or is gone for good.
"""

from router.core.state import CoreConfig, Group, new_group


class Away:
    """The groups that are away, each as it was, but empty, and until when they are waited for."""

    def __init__(self, config: CoreConfig) -> None:
        self._config = config
        self.groups: dict[str, tuple[int, Group]] = {}

    def went(self, now_ms: int, group: Group) -> None:
        """A group has gone down."""
        if group.returns:
            until_ms = now_ms + self._config.resume_timeout_ms
            self.groups[group.up.group] = until_ms, new_group(group.up, self._config)

    def forget(self, name: str) -> None:
        """A group is not waited for any more: it is up, or gone for good."""
        self.groups.pop(name, None)

    def give_up(self, now_ms: int) -> bool:
        """Forgets those that have been away for too long; says whether there were any."""
        over = [name for name, (until_ms, _) in self.groups.items() if until_ms <= now_ms]
        for name in over:
            del self.groups[name]
        return bool(over)

    def due_ms(self) -> int:
        """When the first of them has been away for too long. There is one."""
        return min(until_ms for until_ms, _ in self.groups.values())

    def of(self, model: str) -> list[Group]:
        """Those that serve a model."""
        return [group for _, group in self.groups.values() if group.up.model == model]
