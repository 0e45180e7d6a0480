"""The study's tables: each setting's means, and paired differences from the first of its group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from inference.score_labels import SCORE_LABELS
from judging.statistics import Draws, differences
from judging.tables import UNKNOWN, markdown_table
from runs.interval import Difference, format_difference

FIFTHS = {"first_loss": slice(0, 2), "last_loss": slice(-2, None)}  # of the ten parts that a training's losses have
LABELS = {
    "kept": "Attributes and scene ↑",
    "first_loss": "1000 × loss, first fifth ↓",
    "last_loss": "1000 × loss, last fifth ↓",
    "held_out": "Held-out loss ↓",
    **SCORE_LABELS,
    "copies": "Copies ↓",
}
Records = Sequence[Mapping[str, Any]]  # of one setting: one a subject and seed, as `value` reads them


def value(record: Mapping[str, Any], score: str) -> float | None:
    """A training's figure."""
    if score in ("held_out", "copies"):
        return record.get(score)
    if score in FIFTHS:
        return 1000 * fmean(loss for _, loss in record["losses"][FIFTHS[score]]) if "losses" in record else None
    scores = record.get("scores", {})
    if score == "kept":
        return kept(scores) if "attributes" in scores else None
    return scores.get(score)


def kept(shares: Mapping[str, float]) -> float:
    """What learning rates are chosen by and settings compared by: the subject's attributes and the scenes, alike."""
    return (shares["attributes"] + shares["scene"]) / 2


def draws(records: Records, score: str) -> Draws:
    """Subject -> training seed -> figure: what differences are paired by."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        if (one := value(record, score)) is not None:
            found.setdefault(record["subject"], {})[record["seed"]] = one
    return found


def group_table(rows: Mapping[str, Records], ranks: Mapping[str, str | None]) -> str:
    """Means over subjects and seeds, the base's beside them, with each setting's rank, rate and costs."""
    known = [score for score in LABELS if any(value(one, score) is not None for own in rows.values() for one in own)]
    lines = []
    for name, records in rows.items():
        if not records:
            continue
        costs = [f"{records[0]['trained_parameters']:,}", f"{records[0]['rate']:g}", f"{mean(records, 'seconds'):.0f}"]
        lines.append([name, ranks.get(name) or UNKNOWN, *costs, *(shown(mean_of(records, score)) for score in known)])
    base = [{"scores": one["base"], "held_out": 1.0} for own in rows.values() for one in own if "base" in one]
    if base:
        lines.insert(0, ["base", *[UNKNOWN] * 4, *(shown(mean_of(base, score)) for score in known)])
    header = ["", "rank, of the layers", "trained", "learning rate", "CPU s", *(LABELS[score] for score in known)]
    return markdown_table(header, lines)


def paired_differences(rows: Mapping[str, Records], score: str) -> dict[str, Difference]:
    """Of each row from the first, paired by subject and seed, p by Holm over the rows.

    None where a row hasn't the first one's draws: a mean over other subjects would be no difference of methods.
    """
    of_first, *others = ((name, draws(records, score)) for name, records in rows.items() if records)
    paired = {name: {0: own} for name, own in others if own}
    if not of_first[1] or not paired or any(own[0].keys() != of_first[1].keys() for own in paired.values()):
        return {}
    return differences({0: of_first[1]}, paired)


def difference_table(rows: Mapping[str, Records]) -> str | None:
    """The paired differences in all scores; None where there is one row."""
    first, *others = (name for name, records in rows.items() if records)
    if not others:
        return None
    cells: dict[str, dict[str, str]] = {name: {} for name in others}
    for score, label in LABELS.items():
        for name, found in paired_differences(rows, score).items():
            cells[name][label] = format_difference(found)
    labels = [label for label in LABELS.values() if any(label in own for own in cells.values())]
    body = [[f"{name} − {first}", *(own.get(label, UNKNOWN) for label in labels)] for name, own in cells.items()]
    return markdown_table(["", *labels], body)


def mean(records: Records, field: str) -> float:
    return sum(one[field] for one in records) / len(records)


def mean_of(records: Records, score: str) -> float | None:
    known = [found for one in records if (found := value(one, score)) is not None]
    return sum(known) / len(known) if known else None


def shown(number: float | None) -> str:
    return UNKNOWN if number is None else f"{number:.3f}"
