"""The study's plots: how each setting differs from the first of its group, and how its losses fall."""

from __future__ import annotations

import io
from collections.abc import Mapping
from itertools import cycle

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.study.report import LABELS, Records, paired_differences
from runs.interval import Difference

# Is it that subject, where it was asked for: by the reader, the encoder, the loss; the first three that are known.
PLOTTED = ("kept", "attributes", "dino", "held_out")
PANELS = 3
OVER_STEPS = {"losses": "1000 × training loss", "curve": "1000 × held-out loss"}  # what a record has of each
STYLES = [{"linestyle": line, "color": f"C{number}"} for line in ("-", "--", ":") for number in range(10)]


def group_plot(rows: Mapping[str, Records]) -> bytes | None:
    """PNG of a group: a panel of differences for each score, and of losses; None where nothing can be compared."""
    found = {score: paired_differences(rows, score) for score in PLOTTED}
    found = dict([(score, own) for score, own in found.items() if own][:PANELS])
    if not found:
        return None
    falls = {what: less_first(rows, name) for name, what in OVER_STEPS.items()}
    falls = {what: own for what, own in falls.items() if own}
    columns = len(found) + len(falls)
    figure = Figure(figsize=(2.4 * columns + 2, 1.6 + 0.25 * len(rows)), dpi=100, layout="constrained")
    panels = figure.subplots(1, columns, squeeze=False)[0]
    lines = dict(zip(rows, cycle(STYLES)))  # a row's look, the same in all panels
    for axes in panels:
        axes.tick_params(labelsize=7)
        axes.xaxis.set_major_locator(MaxNLocator(4))
    for axes, (score, differences) in zip(panels, found.items()):
        draw_differences(axes, differences, lines, named=axes is panels[0])
        axes.set_title(f"{LABELS[score]},\nless {next(iter(rows))}", fontsize=8)
    for axes, (what, curves) in zip(panels[len(found) :], falls.items()):
        draw_lines(axes, curves, lines)
        axes.set_title(f"{what} over steps,\nless {next(iter(rows))}", fontsize=8)
    if falls:
        panels[-1].legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()


def draw_differences(
    axes: Axes, differences: Mapping[str, Difference], lines: Mapping[str, Mapping[str, str]], named: bool
) -> None:
    """A dot and its interval to a row."""
    heights = -np.arange(len(differences))
    for height, (row, one) in zip(heights, differences.items()):
        axes.plot(one.interval.estimate, height, "o", color=lines[row]["color"], markersize=4)
        if one.interval.low is not None and one.interval.high is not None:
            axes.plot((one.interval.low, one.interval.high), (height, height), **lines[row])
    axes.axvline(0, color="0.6", linewidth=1)
    axes.set_yticks(heights, differences if named else [""] * len(differences), fontsize=8)


def draw_lines(axes: Axes, curves: Mapping[str, np.ndarray], lines: Mapping[str, Mapping[str, str]]) -> None:
    for row, curve in curves.items():
        axes.plot(*curve, label=row, **lines[row])


def less_first(rows: Mapping[str, Records], name: str) -> dict[str, np.ndarray]:
    """(2, points) steps, and 1000 × losses less the first row's of the same subject and seed, mean of all trainings.

    Empty where no row has any to compare.

    Args:
        name: "losses" in training, of the same pictures and noise, or the "curve" on held-out pictures.
    """
    losses = {
        row: {(one["subject"], one["seed"]): np.array(one[name]).T for one in records if name in one}
        for row, records in rows.items()
    }
    first = losses[next(iter(rows))]
    found = {}
    for row, own in losses.items():
        if shared := [place for place in own if place in first]:
            less = [1000 * (own[place][1] - first[place][1]) for place in shared]
            found[row] = np.array([own[shared[0]][0], np.mean(less, axis=0)])
    return found if len(found) > 1 else {}
