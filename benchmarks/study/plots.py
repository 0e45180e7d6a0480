"""The study's plots: how each setting differs from the first of its group, and how its losses fall."""

from __future__ import annotations

import io
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.study.report import LABELS, Records, paired_differences
from runs.interval import Difference

# Is it that subject, where it was asked for: by the reader, the encoder, the loss; the first three that are known.
PLOTTED = ("kept", "attributes", "dino", "held_out")
PANELS = 3


def group_plot(rows: Mapping[str, Records]) -> bytes | None:
    """PNG of a group: a panel of differences for each score, and two of losses; None where nothing can be compared."""
    there = {name: records for name, records in rows.items() if records}
    found = {score: paired_differences(there, score) for score in PLOTTED} if there else {}
    found = dict([(score, own) for score, own in found.items() if own][:PANELS])
    if not found:
        return None
    figure = Figure(figsize=(2.4 * (len(found) + 2) + 2, 1.6 + 0.25 * len(there)), dpi=100, layout="constrained")
    *panels, fits, curves = figure.subplots(1, len(found) + 2)
    for axes in (*panels, fits, curves):
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    for panel, (score, differences) in zip(panels, found.items()):
        draw_differences(panel, differences, named=panel is panels[0])
        panel.set_title(f"{LABELS[score]},\nless {next(iter(there))}", fontsize=8)
    draw_fits(fits, there)
    draw_curves(curves, there)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def draw_differences(axes: Axes, differences: Mapping[str, Difference], named: bool) -> None:
    """A dot and its interval to a row."""
    heights = -np.arange(len(differences))
    for height, one in zip(heights, differences.values()):
        axes.plot(one.interval.estimate, height, "o", color="C0", markersize=4)
        if one.interval.low is not None and one.interval.high is not None:
            axes.plot((one.interval.low, one.interval.high), (height, height), color="C0")
    axes.axvline(0, color="0.6", linewidth=1)
    axes.set_yticks(heights, differences if named else [""] * len(differences), fontsize=8)


def draw_fits(axes: Axes, rows: Mapping[str, Records]) -> None:
    """The training loss over the steps, less the first setting's at the same subject, seed, pictures and noise."""
    first = next(iter(rows))
    losses = {
        name: {(one["subject"], one["seed"]): np.array(one["losses"]) for one in records if "losses" in one}
        for name, records in rows.items()
    }
    for own in losses.values():
        if pairs := [
            (one[:, 0], (one - losses[first][place])[:, 1]) for place, one in own.items() if place in losses[first]
        ]:
            steps, less = np.array(pairs).mean(axis=0)
            axes.plot(steps, less)
    axes.set_title(f"training loss over steps,\nless {first}", fontsize=8)


def draw_curves(axes: Axes, rows: Mapping[str, Records]) -> None:
    """The loss on held-out pictures over the steps, as a share of the first, mean of a setting's trainings."""
    for name, records in rows.items():
        if curves := [record["curve"] for record in records if record["curve"]]:
            steps, losses = np.array(curves).mean(axis=0).T
            axes.plot(steps, losses / losses[0], label=name)
    axes.set_title("loss on held-out pictures\nover steps", fontsize=8)
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
