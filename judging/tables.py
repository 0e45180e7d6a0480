"""Scores as Markdown tables, and the warning of copied training images."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from inference.score_labels import (
    COPIES_LABEL,
    SCORE_LABELS,
    difference_cells,
    difference_sentences,
    score_cells,
)
from runs.interval import LEVEL

UNKNOWN = "–"


def score_table(result: Mapping[str, Any]) -> str:
    """The scores of `judging.evaluate` or `trainer.compare`, costs before them, the paired differences below them."""
    costs = result.get("costs", {})
    unknown = {label: UNKNOWN for own in costs.values() for label in own}  # of the base, which costs nothing
    columns = {name: {**unknown, **costs.get(name, {}), **score_cells(one)} for name, one in result["scores"].items()}
    parts = [table_of(columns)]
    if differences := result.get("differences"):
        others = {
            f"{name} − {differences['first']}": difference_cells(own) for name, own in differences["others"].items()
        }
        several = f", 95 % intervals together ({1 - (1 - LEVEL) / len(others):.1%} each), p by Holm for {len(others)}"
        parts.append(f"Paired differences{several if len(others) > 1 else ''}:")
        parts += [table_of(others), "\n".join(f"- {sentence}" for sentence in difference_sentences(differences))]
    return "\n\n".join(parts)


def table_of(rows: Mapping[str, Mapping[str, str]]) -> str:
    """Markdown, one row a name, scores last and in their order; a cell that a row lacks is a dash."""
    found = dict.fromkeys(label for cells in rows.values() for label in cells)
    order = [*SCORE_LABELS.values(), COPIES_LABEL]
    labels = [label for label in found if label not in order] + [label for label in order if label in found]
    return markdown_table(
        ["", *labels], [[name, *(cells.get(label, UNKNOWN) for label in labels)] for name, cells in rows.items()]
    )


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def copies_warning(name: str, found: Mapping[str, Any]) -> str | None:
    """The alarm as a sentence; None where there is none."""
    if not found["alarm"]:
        return None
    return (
        f"{name} draws its training images: {found['count']} of its {found['pictures']} pictures are "
        f"copies of one (p {found['p_value']:.2g}, were the detector wrong in {found['false_alarm_rate']:.0%}); "
        "train for fewer steps, at a lower learning rate, or with --with_prior_preservation"
    )


def warn_of_copies(name: str, found: Mapping[str, Any]) -> None:
    if warning := copies_warning(name, found):
        print(f"warning: {warning}", file=sys.stderr)
