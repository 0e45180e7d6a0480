"""Means of scores, how sure they are, and whether two methods differ; imports no torch.

Scores are drawn from three things that cross each other: trainings (their seeds), prompts, and the seeds of the
pictures. Each method is drawn with the same of them. An interval counts every one of the three that there are several
of:

    Var(mean) ≤ V_trainings + V_prompts + V_seeds,   V_k = variance between the means of k / number of k

with Satterthwaite's degrees of freedom (Biometrics Bulletin 2, 1946). Each V_k holds its share of the interactions and
of the noise, which are thus counted up to three times: the interval errs on the wide side, never on the narrow one. So
that few trainings or prompts are not taken for many, it is never narrower than Student's over the trainings alone or
the prompts alone. Where one thing varies, it is Student's. `tests/test_judging_statistics.py` measures the coverage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from runs.interval import LEVEL, Difference, Interval

if TYPE_CHECKING:
    from inference.sampling import GeneratedImage

AXES = ("trainings", "prompts", "seeds")
POWER = 0.8
ROUNDING = 1e-12  # scores and losses are of the order of 1: a smaller standard deviation is that of rounded sums
Draws = Mapping[str, Mapping[int, float]]  # prompt -> seed -> a picture's score


class Error(NamedTuple):
    """A standard error of a mean, and its degrees of freedom."""

    size: float
    freedom: float


def by_prompt(drawn: Sequence[GeneratedImage], values: Sequence[float]) -> Draws:
    """One value a picture: prompt -> seed -> value."""
    scores: dict[str, dict[int, float]] = {}
    for one, value in zip(drawn, values, strict=True):
        scores.setdefault(one.prompt, {})[one.seed] = value
    return scores


def interval(trainings: Sequence[Draws], bounds: tuple[float, float] | None = None) -> Interval:
    """Mean of a score over trainings, prompts and seeds, with its interval over those that there are several of.

    Args:
        trainings: the draws of each, one for a single one.
        bounds: the least and the greatest that the score can be. The interval is cut there, and holds the true mean
            as often as before.
    """
    found = _interval(as_array(trainings), LEVEL)
    if bounds is None or found.low is None or found.high is None:
        return found
    return replace(found, low=max(found.low, bounds[0]), high=min(found.high, bounds[1]))


def differences(first: Mapping[int, Draws], others: Mapping[str, Mapping[int, Draws]]) -> dict[str, Difference]:
    """Each method less the first one, paired by training seed, prompt and seed, corrected for their number by Holm.

    Intervals are simultaneous by Bonferroni (level 1 - 0.05 / number). Holm's p is never above what Bonferroni's would
    be: it may be below 0.05 where the interval still holds 0.
    Methods that share no draw with the first have none.

    Args:
        first, others: training seed -> draws.
    """
    paired = {}
    for name, trainings in others.items():
        shared = [_less(first[seed], draws) for seed, draws in trainings.items() if seed in first]
        if shared := [draws for draws in shared if draws]:
            paired[name] = as_array(shared)
    level = 1 - (1 - LEVEL) / max(1, len(paired))
    corrected = holm([p_value(values) for values in paired.values()])
    return {
        name: Difference(_interval(values, level), p, detectable(values, 1 - level))
        for (name, values), p in zip(paired.items(), corrected)
    }


def _less(first: Draws, other: Draws) -> Draws:
    pairs = {
        prompt: {seed: value - first[prompt][seed] for seed, value in seeds.items() if seed in first[prompt]}
        for prompt, seeds in other.items()
        if prompt in first
    }
    return {prompt: seeds for prompt, seeds in pairs.items() if seeds}


def as_array(trainings: Sequence[Draws]) -> np.ndarray:
    """(trainings, prompts, seeds) of the prompts that all have; a prompt's mean where not all have the same seeds."""
    prompts = [prompt for prompt in trainings[0] if all(prompt in draws for draws in trainings)]
    assert prompts, "trainings without a shared prompt"
    seeds = list(trainings[0][prompts[0]])
    if all(draws[prompt].keys() == set(seeds) for draws in trainings for prompt in prompts):
        return np.array([[[draws[prompt][seed] for seed in seeds] for prompt in prompts] for draws in trainings])
    return np.array([[[np.mean(list(draws[prompt].values()))] for prompt in prompts] for draws in trainings])


def errors(values: np.ndarray) -> list[Error]:
    """The standard errors that an interval must not be narrower than.

    None where all values are the same: they don't say how others would vary, as six scenes followed of six don't say
    that all are.

    Args:
        values: (trainings, prompts, seeds)
    """
    alone = {}
    for axis, name in enumerate(AXES):
        if (count := values.shape[axis]) > 1:
            means = values.mean(axis=tuple(other for other in range(3) if other != axis))
            alone[name] = spread(means) / count, count - 1
    total = sum(variance for variance, _ in alone.values())
    if total == 0:  # single values may vary all the same
        variance = spread(values) / values.size
        return [Error(math.sqrt(variance), values.size - 1)] if variance else []
    freedom = 1 / sum((variance / total) ** 2 / freedom for variance, freedom in alone.values())  # squares underflow
    # a seed's own effect is small beside noise: two seeds alone, with one degree of freedom, would widen all to nothing
    single = [
        Error(math.sqrt(variance), own) for name, (variance, own) in alone.items() if name != "seeds" and variance
    ]
    return [Error(math.sqrt(total), freedom), *single]


def spread(values: np.ndarray) -> float:
    """Their variance; 0 of one alone, and where they differ by rounding only."""
    found = float(values.var(ddof=1)) if values.size > 1 else 0.0
    return found if found > ROUNDING**2 else 0.0


def _interval(values: np.ndarray, level: float) -> Interval:
    from scipy import stats  # takes a second to import, which no --help should wait for

    estimate = float(values.mean())
    varying = [(name, count) for name, count in zip(AXES, values.shape) if count > 1]
    names, counts = tuple(name for name, _ in varying), tuple(count for _, count in varying)
    if not (found := errors(values)):
        return Interval(estimate, level=level, varies=names, count=counts)
    half = max(float(stats.t.ppf((1 + level) / 2, one.freedom)) * one.size for one in found)
    return Interval(estimate, estimate - half, estimate + half, level, names, counts)


def p_value(values: np.ndarray) -> float | None:
    """Of a true mean of 0, two-sided: the interval of level 1 - p ends at 0. None where all values are the same."""
    from scipy import stats

    found, mean = errors(values), abs(float(values.mean()))
    return max(2 * float(stats.t.sf(mean / one.size, one.freedom)) for one in found) if found else None


def detectable(values: np.ndarray, alpha: float) -> float | None:
    """The true mean that a test at alpha finds with a chance of 80 %, by the noncentral t distribution."""
    from scipy import optimize, stats

    def needed(error: Error) -> float:
        limit = stats.t.ppf(1 - alpha / 2, error.freedom)
        shifts = 0, 10 * (limit + 1)
        root = optimize.brentq(lambda shift: stats.nct.sf(limit, error.freedom, shift) - POWER, *shifts)
        return float(root) * error.size

    found = errors(values)
    return max(map(needed, found)) if found else None


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Holm's step-down correction (Scandinavian Journal of Statistics 6, 1979); None stays None and counts as 1."""
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, p * (len(p_values) - rank)))
        corrected[place] = largest
    return corrected
