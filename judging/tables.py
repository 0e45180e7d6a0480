"""Scores as Markdown tables, and the warning of a memorised subject."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from inference.score_labels import SCORE_LABELS, format_memorisation, format_score


def score_table(result: Mapping[str, Any]) -> str:
    """The scores of `judging.evaluate`: mean ± spread over seeds."""
    known = [key for key in SCORE_LABELS if any(key in scores for scores in result["scores"].values())]
    rows = [
        [name, *(format_score(scores.get(key)) for key in known), format_memorisation(scores["memorisation"])]
        for name, scores in result["scores"].items()
    ]
    return markdown_table(["", *(SCORE_LABELS[key] for key in known), "nearest training image"], rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def warn_of_memorisation(name: str, found: Mapping[str, Any]) -> None:
    if found["alarm"]:
        print(
            f"warning: {name} draws its training images: {found['share']:.0%} of its pictures are nearer to one of "
            f"them (median {found['nearest']:.2f}) than they are to each other ({found['between_instances']:.2f}); "
            "train for fewer steps, at a lower learning rate, or with --with_prior_preservation",
            file=sys.stderr,
        )
