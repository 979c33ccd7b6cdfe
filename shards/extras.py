"""Reading of ``--engine-option key=value``: one faulty value is one clear line."""

from collections.abc import Sequence

from shards.engines.base import ModelError


class Extras:
    """The options of one engine. Every key must be read, or ``finish`` names those that are not."""

    def __init__(self, engine: str, extra: Sequence[tuple[str, str]]) -> None:
        self._engine = engine
        self._values = dict(extra)
        self._known: list[str] = []

    def text(self, key: str, default: str) -> str:
        """The value as it was given."""
        self._known.append(key)
        return self._values.get(key, default)

    def number(self, key: str, default: float) -> float:
        """A finite number that is not negative."""
        given = self.text(key, str(default))
        try:
            value = float(given)
        except ValueError:
            value = -1.0
        if not 0.0 <= value < float("inf"):
            raise ModelError(f"{self._engine}: engine option {key}={given} is not a number >= 0")
        return value

    def whole(self, key: str, default: int) -> int:
        """An integer that is not negative."""
        value = self.number(key, default)
        if value != int(value):
            raise ModelError(f"{self._engine}: engine option {key} takes a whole number")
        return int(value)

    def choice(self, key: str, default: str, choices: Sequence[str]) -> str:
        """One of a few words."""
        value = self.text(key, default)
        if value not in choices:
            words = ", ".join(choices)
            raise ModelError(f"{self._engine}: engine option {key}={value} is not one of {words}")
        return value

    def finish(self) -> None:
        """Raises ``ModelError`` if an option was given that the engine does not know."""
        unknown = sorted(set(self._values) - set(self._known))
        if unknown:
            raise ModelError(
                f"{self._engine}: unknown engine option {', '.join(unknown)};"
                f" it has {', '.join(sorted(set(self._known)))}"
            )
