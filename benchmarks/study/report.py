"""The study's tables: each setting's means, and paired differences from the first of its group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from inference.score_labels import SCORE_LABELS
from judging.statistics import Draws, differences
from judging.tables import UNKNOWN, markdown_table
from runs.interval import format_difference

LABELS = {"held_out": "Held-out loss ↓", **SCORE_LABELS, "copies": "Copies ↓"}
Records = Sequence[Mapping[str, Any]]  # of one setting: one a subject and seed, as `value` reads them


def value(record: Mapping[str, Any], score: str) -> float | None:
    """A training's figure."""
    if score in ("held_out", "copies"):
        return record.get(score)
    return record.get("scores", {}).get(score)


def draws(records: Records, score: str) -> Draws:
    """Subject -> training seed -> figure: what differences are paired by."""
    found: dict[str, dict[int, float]] = {}
    for record in records:
        if (one := value(record, score)) is not None:
            found.setdefault(record["subject"], {})[record["seed"]] = one
    return found


def group_table(rows: Mapping[str, Records]) -> str:
    """Means over subjects and seeds, the base's beside them, with each setting's rate and costs."""
    known = [score for score in LABELS if any(value(one, score) is not None for own in rows.values() for one in own)]
    lines = []
    for name, records in rows.items():
        if not records:
            continue
        costs = [f"{records[0]['trained_parameters']:,}", f"{records[0]['rate']:g}", f"{mean(records, 'seconds'):.0f}"]
        lines.append([name, *costs, *(shown(mean_of(records, score)) for score in known)])
    base = [one["base"] for own in rows.values() for one in own if "base" in one]
    if base:
        means = {score: [one[score] for one in base if score in one] for score in known} | {"held_out": [1.0]}
        cells = (shown(sum(own) / len(own) if own else None) for own in means.values())
        lines.insert(0, ["base", UNKNOWN, UNKNOWN, UNKNOWN, *cells])
    header = ["", "trained", "learning rate", "CPU s", *(LABELS[score] for score in known)]
    return markdown_table(header, lines)


def difference_table(rows: Mapping[str, Records]) -> str | None:
    """Of each row from the first, paired by subject and seed, p by Holm over the rows; None where there is one row."""
    there = [(name, records) for name, records in rows.items() if records]
    if len(there) < 2:
        return None
    (first, of_first), *others = there
    cells: dict[str, dict[str, str]] = {name: {} for name, _ in others}
    for score, label in LABELS.items():
        reference = draws(of_first, score)
        paired = {name: {0: own} for name, records in others if (own := draws(records, score)) and reference}
        if paired and all(own[0].keys() == reference.keys() for own in paired.values()):
            for name, found in differences({0: reference}, paired).items():
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
