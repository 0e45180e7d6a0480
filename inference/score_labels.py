"""What scores are called and how they are written, on the gallery's page and in the tables of `judging`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from runs.interval import Difference, Interval, describe_difference, format_difference, format_interval

SCORE_LABELS = {
    "attributes": "Attributes ↑",
    "scene": "Scene ↑",
    "dino": "DINO ↑",
    "clip_i": "CLIP-I ↑",
    "clip_t": "CLIP-T ↑",
    "drift": "Drift ↓",
    "class_drift": "Class drift ↓",
    "diversity": "Diversity ↑",
}
# Shares and cosines: an interval ends where no score can be.
SCORE_RANGES = dict.fromkeys(("attributes", "scene"), (0.0, 1.0)) | dict.fromkeys(
    ("dino", "clip_i", "clip_t"), (-1.0, 1.0)
)
PICTURE_SCORES = ("attributes", "scene", "dino", "clip_i", "clip_t")  # a picture by itself has one
COPIES_LABEL = "Copies of training images ↓"
SCORES_VERSION = 2  # of the files of judging.evaluate


def score_cells(scores: Mapping[str, Any]) -> dict[str, str]:
    """Label -> how it is written, of a column's scores in a file of judging.evaluate.

    Raises:
        KeyError, TypeError: if they have another form.
    """
    cells = {label: format_interval(Interval.read(scores[key])) for key, label in SCORE_LABELS.items() if key in scores}
    return cells | ({COPIES_LABEL: format_copies(scores["copies"])} if "copies" in scores else {})


def difference_cells(found: Mapping[str, Any]) -> dict[str, str]:
    """Label -> how it is written, of a column's differences from the first one."""
    return {
        label: format_difference(Difference.read(found[key])) for key, label in SCORE_LABELS.items() if key in found
    }


def difference_sentences(differences: Mapping[str, Any]) -> list[str]:
    """What follows from each difference, in words."""
    return [
        describe_difference(name, differences["first"], label.split(" ↑")[0].split(" ↓")[0], Difference.read(own[key]))
        for name, own in differences["others"].items()
        for key, label in SCORE_LABELS.items()
        if key in own
    ]


def format_copies(found: Mapping[str, Any]) -> str:
    """ "3 of 24", and a word where that is more than the detector's own errors would give."""
    return f"{found['count']} of {found['pictures']}" + (" **COPIES**" if found["alarm"] else "")
