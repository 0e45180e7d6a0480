"""Each setting's learning rate, chosen on subjects that are not scored, and the table of what it was chosen by."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.study.report import kept
from benchmarks.study.settings import Setting
from benchmarks.study.trainings import Laboratory, Training
from judging.tables import markdown_table

TUNING_SEED = 100  # none of those that are scored


def shortfall(record: Mapping[str, Any]) -> float:
    """What a training lacks: the subject's attributes and the prompts' scenes, both counting alike; 0 to 1.

    Endless where its loss became NaN.
    Without an attribute reader the loss on held-out pictures, which tells too high a rate from a good one, but hardly
    a good one from too low a rate: most of it is of the pose and the background, which no adapter can know.
    """
    if "failed" in record:
        return math.inf
    found = 1 - kept(record["reading"]) if "reading" in record else record["held_out"]
    return math.inf if math.isnan(found) else found


class Tuning(NamedTuple):
    """Learning rate -> `shortfall`: of half of the steps on the first subject, and of all steps on all subjects."""

    half: dict[float, float]
    whole: dict[float, float]

    @property
    def rate(self) -> float:
        return ranked(self.whole)[0]


def ranked(tried: Mapping[float, float]) -> list[float]:
    """Rates, the best first.

    Of several that are alike the highest, as nothing is learned yet by those; of several that diverged the lowest.
    """
    return sorted(tried, key=lambda rate: (tried[rate], -rate if math.isfinite(tried[rate]) else rate))


def tune(laboratory: Laboratory, one: Setting, subjects: Sequence[str], steps: int) -> Tuning:
    """The setting's best learning rate on subjects that are not scored, by `shortfall`: successive halving.

    All rates for half of the steps on the first subject; the better half of them for all steps on every subject. While
    the best one is at an end of what was tried, the next one three times beyond is tried too.

    Raises:
        NotMeasured: if one of these isn't, in a laboratory that doesn't train.
    """

    def lacking(rate: float, subject: str, count: int) -> float:
        return shortfall(laboratory.measure(Training(one, subject, TUNING_SEED, rate, count), scored=False))

    def mean(rate: float) -> float:
        return sum(lacking(rate, subject, steps) for subject in subjects) / len(subjects)

    half = {rate: lacking(rate, subjects[0], max(1, steps // 2)) for rate in one.rates}
    better = ranked(half)[: max(1, len(half) // 2)]
    found = Tuning(half, {rate: mean(rate) for rate in better})
    for _ in range(3):
        beyond = [float(f"{found.rate * step:.1e}") for step in (1 / 3, 3)]
        known = (*one.rates, *found.whole)
        missing = [rate for rate in beyond if (rate < min(known) or rate > max(known))]
        if not missing:
            break
        found.whole.update({rate: mean(rate) for rate in missing})
    return found


def rates_table(found: Mapping[str, Tuning], read: bool) -> str:
    """What each setting's learning rate was chosen by.

    Args:
        found: setting -> what was tried.
        read: whether pictures were, so that it is what is kept; else it is a loss.
    """

    def cell(tried: Mapping[float, float], chosen: float | None = None) -> str:
        parts = []
        for rate, lacking in sorted(tried.items()):
            said = "diverged" if math.isinf(lacking) else f"{1 - lacking if read else lacking:.3f}"
            parts.append(f"**{rate:g}: {said}**" if rate == chosen else f"{rate:g}: {said}")
        return ", ".join(parts)

    rows = [[setting, cell(one.half), cell(one.whole, one.rate)] for setting, one in found.items()]
    return markdown_table(["", "half of the steps, the first subject", "all steps, all of these subjects"], rows)
