"""Curves as SVG paths: a page draws them without a script, at any width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MOST_POINTS = 1000  # of a curve: more than a screen has pixels for
SIDE = 1000  # units of a drawing, both ways; the page stretches it


@dataclass(frozen=True)
class Series:
    """One curve.

    Args:
        kind: "faint", "line" or "points".
        points: (step, value).
        bands: (step, low, high), where a value has an interval.
    """

    label: str
    kind: str
    points: Sequence[tuple[int, float]]
    bands: Sequence[tuple[int, float, float]] = ()


def chart(title: str, series: Sequence[Series], last_step: int) -> dict[str, Any] | None:
    """What the template draws of curves over steps 0 to `last_step`; None where no curve has a point.

    Curves with more than 1000 points are drawn by every n-th, the last one among them. Of faint points the highest
    hundredth may be too high for the drawing, at whose edge they stand, so that one outlier doesn't flatten the rest.
    """
    series = [one for one in series if one.points]
    if not series:
        return None
    low, high = _range(series)
    series = [Series(one.label, one.kind, thinned(one.points, MOST_POINTS), one.bands) for one in series]

    def place(step: float, value: float) -> str:
        return f"{SIDE * step / max(1, last_step):.4g} {max(0, SIDE * (high - value) / (high - low)):.4g}"

    return {
        "title": title,
        "series": [
            {
                "label": one.label,
                "kind": one.kind,
                "path": " ".join(f"{'L' if number else 'M'}{place(*point)}" for number, point in enumerate(one.points)),
                "dots": "" if one.kind == "line" else " ".join(f"M{place(*point)}h0" for point in one.points),
                "bars": " ".join(f"M{place(step, below)}L{place(step, above)}" for step, below, above in one.bands),
                "steps": [step for step, _ in one.points],
                "values": [float(f"{value:.5g}") for _, value in one.points],
            }
            for one in series
        ],
        "last_step": last_step,
        "rows": [{"place": 100 * (tick - low) / (high - low), "text": f"{tick:.4g}"} for tick in ticks(low, high)],
        "columns": [
            {"place": 100 * tick / max(1, last_step), "text": f"{tick:,.0f}"} for tick in ticks(0, last_step, 4)
        ],
        "summary": _summary(series),
    }


def _summary(series: Sequence[Series]) -> str:
    """The last values, as the page's script says those of any step."""
    made = max(one.points[-1][0] for one in series)
    texts = [
        f"{one.label} {value:.4g}" + ("" if step == made else f" (step {step})")
        for one in series
        for step, value in one.points[-1:]
    ]
    return f"step {made}: " + "; ".join(texts)


def thinned(items: Sequence[Any], most: int) -> list[Any]:
    """Every n-th of them, counted from the last, so that at most so many are left."""
    every = max(1, math.ceil(len(items) / most))
    return list(items[(len(items) - 1) % every :: every])


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About so many multiples of 1, 2 or 5 times a power of ten from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _range(series: Sequence[Series]) -> tuple[float, float]:
    """From the lowest to the highest value, with a margin; faint points but for their highest hundredth."""
    values = []
    for one in series:
        own = sorted(value for _, value in one.points)
        values += own[: max(1, round(0.99 * len(own)))] if one.kind == "faint" else own
        values += [edge for _, *edges in one.bands for edge in edges]
    low, high = min(values), max(values)
    margin = 0.05 * ((high - low) or abs(high) or 1)
    return max(low - margin, 0.0) if low >= 0 else low - margin, high + margin
