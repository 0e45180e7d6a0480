"""A score and how sure it is, as tables, pages, model cards and JSON files show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate, and the interval that holds the true value in `level` of such experiments.

    Args:
        low, high: None where nothing varies, because there is one unit only or all have the same value.
        varies: what the estimate is over, such as ("trainings", "prompts"); another draw of these would give another
            estimate. What is not named is fixed, and nothing is claimed about it.
        count: how many there are of each.
    """

    estimate: float
    low: float | None = None
    high: float | None = None
    level: float = LEVEL
    varies: tuple[str, ...] = ()
    count: tuple[int, ...] = ()

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Interval:
        """From JSON; other keys are left alone.

        Raises:
            KeyError, TypeError: if one is missing, or is no such value.
        """
        low, high = fields["low"], fields["high"]
        return cls(
            float(fields["estimate"]),
            None if low is None else float(low),
            None if high is None else float(high),
            float(fields["level"]),
            tuple(fields["varies"]),
            tuple(fields["count"]),
        )

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @property
    def units(self) -> str:
        """ "3 trainings × 6 prompts × 2 seeds", or "one picture"."""
        return units(dict(zip(self.varies, self.count)))


@dataclass(frozen=True)
class Difference:
    """Of a method from the first one, over the draws that both have.

    Args:
        interval: of the paired differences.
        p_value: of no difference, corrected for the number of methods; None where nothing varies.
        detectable: the smallest true difference that would have been shown with a chance of 80 %.
    """

    interval: Interval
    p_value: float | None = None
    detectable: float | None = None

    @classmethod
    def read(cls, fields: Mapping[str, Any]) -> Difference:
        """From JSON, with `Interval.read`'s errors."""
        return cls(Interval.read(fields), fields["p_value"], fields["detectable"])

    def fields(self) -> dict[str, Any]:
        """For JSON."""
        return {**self.interval.fields(), "p_value": self.p_value, "detectable": self.detectable}

    @property
    def shown(self) -> bool:
        return self.p_value is not None and self.p_value < 1 - LEVEL


def units(counts: Mapping[str, int]) -> str:
    return " × ".join(f"{count} {name}" for name, count in counts.items()) or "one draw"


def format_interval(found: Interval | None, sign: str = "") -> str:
    """The one way in which scores are written: "0.897 [0.875, 0.919]", without brackets where there is no interval.

    Args:
        sign: "+" for differences.
    """
    if found is None:
        return "–"
    if found.low is None or found.high is None:
        return f"{found.estimate:{sign}.3f}"
    return f"{found.estimate:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def format_difference(found: Difference | None) -> str:
    """ "+0.030 [+0.010, +0.050], p 0.012"."""
    if found is None:
        return "–"
    text = format_interval(found.interval, "+")
    if found.p_value is None:
        return text
    return f"{text}, p {'< 0.001' if found.p_value < 0.001 else f'{found.p_value:.3f}'}"


def describe_difference(name: str, first: str, score: str, found: Difference) -> str:
    """One sentence: what follows from a difference, or what would have followed from a larger one."""
    if found.p_value is None or found.detectable is None:
        if found.interval.varies:
            return (
                f"{name} and {first} in {score}: {found.interval.estimate:+.3f} in each of {found.interval.units}, "
                "which doesn't say how others would vary."
            )
        return f"{name} and {first} in {score}: one draw of each shows nothing."
    if found.shown:
        way = "higher" if found.interval.estimate > 0 else "lower"
        return (
            f"{name} is {abs(found.interval.estimate):.3f} {way} than {first} in {score}: {format_difference(found)}."
        )
    return (
        f"{name} and {first} in {score}: no difference shown at {found.interval.units}; "
        f"one of {found.detectable:.3f} would have been (with a chance of 80 %)."
    )
