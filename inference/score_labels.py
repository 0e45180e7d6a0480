"""What scores are called and how they are written, on the gallery's page and in the tables of `judging`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SCORE_LABELS = {
    "dino": "DINO ↑",
    "clip_i": "CLIP-I ↑",
    "clip_t": "CLIP-T ↑",
    "drift": "Drift ↓",
    "class_drift": "Class drift ↓",
    "diversity": "Diversity ↑",
}


def format_score(score: Mapping[str, float] | None) -> str:
    return "–" if score is None else f"{score['mean']:.3f} ± {score['std']:.3f}"


def format_memorisation(found: Mapping[str, Any]) -> str:
    return f"{found['nearest']:.2f}" + (" **MEMORISED**" if found["alarm"] else "")
