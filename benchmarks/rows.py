"""One line of the result: what was measured, against what, and whether it reaches its bar."""

from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Row:
    """A measured value beside its baseline.

    ``ratio`` is ours / baseline. ``bar`` is what ratio (if there is a baseline) or ours must reach,
    from above or from below; None: for information only. ``unit`` is that of ours and baseline.
    """

    scenario: str
    what: str
    ours: float
    baseline: float | None
    ratio: float | None
    bar: float | None
    passed: bool | None
    unit: str = ""
    at_least: bool = True
    note: str = ""

    @classmethod
    def against(
        cls,
        scenario: str,
        what: str,
        ours: float,
        baseline: float,
        bar: float | None,
        *,
        unit: str = "tokens/s",
        note: str = "",
        valid: bool = True,
    ) -> Self:
        """Ours / baseline must be at least ``bar``; not passed if the run was not ``valid``."""
        ratio = ours / baseline if baseline else 0.0
        passed = None if bar is None else valid and ratio >= bar
        return cls(scenario, what, ours, baseline, ratio, bar, passed, unit, True, note)

    @classmethod
    def at_most(
        cls, scenario: str, what: str, ours: float, bar: float, *, unit: str, note: str = ""
    ) -> Self:
        """Ours must not be above ``bar``."""
        return cls(scenario, what, ours, None, None, bar, ours <= bar, unit, False, note)

    @classmethod
    def fact(cls, scenario: str, what: str, ours: float, *, unit: str, note: str = "") -> Self:
        """A value without a bar."""
        return cls(scenario, what, ours, None, None, None, None, unit, True, note)

    def as_json(self) -> dict[str, Any]:
        """Fields with four digits; "pass" is what the field ``passed`` says."""
        fields = asdict(self)
        fields["pass"] = fields.pop("passed")
        return {
            key: float(f"{value:.4g}") if isinstance(value, float) else value
            for key, value in fields.items()
        }
