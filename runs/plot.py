"""The loss of a run as a picture, for its model card."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from runs.record import read_metrics

# A step's loss depends mostly on its timesteps: only an average over many steps shows whether the run learns.
SMOOTHED_SHARE = 0.1


def moving_average(losses: Sequence[float]) -> tuple[int, list[float]]:
    """The mean of the last tenth of all steps, from the first step that has so many: how many, and the means."""
    window = max(1, round(len(losses) * SMOOTHED_SHARE))
    return window, np.convolve(losses, np.full(window, 1 / window), mode="valid").tolist() if len(losses) else []


def loss_plot(metrics: Path) -> bytes:
    """PNG of the losses in a ``metrics.jsonl``: every step, a moving average, and the validation loss where measured.

    Returns:
        the file's bytes, 960 × 480 pixels.
    """
    lines = read_metrics(metrics)
    known = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    steps, losses = np.array(known or [(0, np.nan)]).T  # nothing is known where a finished run's log was lost
    watched = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
    window, smoothed = moving_average(losses)
    axes = (figure := Figure(figsize=(9.6, 4.8), dpi=100, layout="constrained")).add_subplot()
    axes.plot(steps, losses, ".", markersize=2, color="0.7", label="each step")
    axes.plot(steps[window - 1 :], smoothed, color="C0", label=f"mean of the last {window} steps")
    if watched:
        axes.plot(*zip(*watched), "o-", markersize=4, color="C3", label="validation, fixed timesteps and noise")
    axes.set(xlabel="step", ylabel="loss", ylim=(0, None), xlim=(0, steps[-1] + 1))
    axes.grid(alpha=0.3)
    axes.legend()
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
