"""Means of scores, and how sure they are; imports no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """A score and how sure it is."""

    mean: float
    std: float  # between the means of the seeds; 0 for a single seed
    low: float  # 95 % interval of the mean
    high: float


def spread(values: Mapping[int, Sequence[float]], resamples: int = 2000) -> Spread:
    """Mean over pictures, its spread over seeds, and a bootstrap interval.

    Args:
        values: seed -> that seed's scores, one a prompt. Pictures are resampled, all seeds together, with a fixed seed.
    """
    means = [float(np.mean(scores)) for scores in values.values()]
    everything = np.array([score for scores in values.values() for score in scores])
    rng = np.random.default_rng(0)
    drawn = everything[rng.integers(len(everything), size=(resamples, len(everything)))].mean(axis=1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    std = float(np.std(means, ddof=1)) if len(means) > 1 else 0.0
    return Spread(float(everything.mean()), std, float(low), float(high))


def confidence_interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean of a few independent runs, and half of its 95 % interval by Student's t; NaN for a single run."""
    from scipy import stats  # takes a second to import, which no --help should wait for

    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan
    return mean, float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1))
