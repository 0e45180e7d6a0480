"""Methods beside each other: each one's scores with their intervals, and paired differences from the first one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from inference.score_labels import SCORE_LABELS, SCORE_RANGES
from judging.copies import Copies
from judging.statistics import Draws, differences, interval

Trainings = Mapping[int, Mapping[str, Any]]  # training seed -> score -> draws; "copies" -> `Copies`


def score_summary(trainings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Score -> fields of its interval over all that there are several of, and how many pictures are copies."""
    known = [key for key in SCORE_LABELS if all(key in scores for scores in trainings)]
    summary: dict[str, Any] = {
        key: interval([scores[key] for scores in trainings], SCORE_RANGES.get(key)).fields() for key in known
    }
    summary["copies"] = Copies.sum([scores["copies"] for scores in trainings]).fields()
    return summary


def method_differences(methods: Mapping[str, Trainings]) -> dict[str, Any] | None:
    """The first method's name, and of each other one: score -> fields of the difference. None for a single method."""
    (first, of_first), *others = methods.items()
    if not others:
        return None
    found: dict[str, dict[str, Any]] = {name: {} for name, _ in others}
    for key in SCORE_LABELS:
        if of_first_key := _draws(of_first, key):
            paired = {name: draws for name, trainings in others if (draws := _draws(trainings, key))}
            for name, difference in differences(of_first_key, paired).items():
                found[name][key] = difference.fields()
    return {"first": first, "others": found}


def _draws(trainings: Trainings, key: str) -> dict[int, Draws]:
    return {seed: scores[key] for seed, scores in trainings.items() if key in scores}
