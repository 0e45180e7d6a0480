"""A run's page: its curves, samples, scores, costs and flags in one HTML file that works from disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inference.charts import Series, chart
from inference.page import UNKNOWN, picture_data, render_template
from inference.score_labels import SCORE_LABELS
from runs.interval import Interval, format_interval
from runs.plot import moving_average
from runs.record import PAGE_MARK
from storage.pictures import open_image

SIDE = 320  # pixels, longest side of a sample on the page; the whole picture is in the run's folder
QUALITY = 80  # of its WebP
SCORED = ("dino", "clip_i", "clip_t")


@dataclass(frozen=True)
class RunPicture:
    """A sample on the page: `data` is that of `picture_data`."""

    step: int
    prompt: str
    seed: int
    data: Mapping[str, Any]


@dataclass(frozen=True)
class RunPage:
    """What the page shows.

    Args:
        state: how far the run is, a sentence.
        alarms: what is wrong, or was likely to be, a sentence each.
        facts, costs: label -> how it is written.
        flags: name -> value; `changed` are those that are not the trainer's defaults.
        metrics: lines of metrics.jsonl; only they say what the curves and scores are.
        last_step: where the curves' axis ends: the last step that is planned, or that was made.
        best_step: of the best adapter.
        left_out: steps whose samples are in the folder, and not on the page.
    """

    title: str
    state: str
    alarms: Sequence[str]
    facts: Mapping[str, str]
    costs: Mapping[str, str]
    flags: Mapping[str, Any]
    changed: Collection[str]
    metrics: Sequence[Mapping[str, Any]]
    last_step: int
    pictures: Sequence[RunPicture] = ()
    best_step: int | None = None
    left_out: int = 0


def small_picture(path: Path) -> dict[str, Any]:
    """A sample as the page embeds it."""
    image = open_image(path)
    image.thumbnail((SIDE, SIDE))  # in place, and never larger than it was
    return picture_data(image, QUALITY)


def render_run_page(page: RunPage) -> str:
    """The whole HTML file."""
    places = list(dict.fromkeys((one.prompt, one.seed) for one in page.pictures))
    ladders = {place: [one for one in page.pictures if (one.prompt, one.seed) == place] for place in places}
    charts = [one for one in _charts(page) if one is not None]
    prompts = list(dict.fromkeys(prompt for prompt, _ in places))
    last = {place: ladder[-1] for place, ladder in ladders.items()}
    data = {
        "steps": sorted({one.step for one in page.pictures}),
        # the last of each is in the file once: the script takes its URI from the image itself
        "pictures": [
            [{"step": one.step, **one.data, "uri": None if one is ladder[-1] else one.data["uri"]} for one in ladder]
            for ladder in (ladders[place] for prompt in prompts for place in places if place[0] == prompt)
        ],
        "charts": [
            {
                "last_step": one["last_step"],
                "series": [{key: line[key] for key in ("label", "steps", "values")} for line in one["series"]],
            }
            for one in charts
        ],
    }
    return render_template(
        "run.html.j2",
        mark=PAGE_MARK,
        page=page,
        data=data,
        charts=charts,
        samples=[(prompt, [last[place] for place in places if place[0] == prompt]) for prompt in prompts],
        flags=[(name, flag_text(value), name in page.changed) for name, value in page.flags.items()],
        scores=_scores(page),
    )


def flag_text(value: Any) -> str:
    if value is None or value == []:
        return UNKNOWN
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def curve(metrics: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, value) of every line that has it."""
    return [(line["step"], line[name]) for line in metrics if name in line]


def _charts(page: RunPage) -> list[dict[str, Any] | None]:
    losses, rates = curve(page.metrics, "loss"), curve(page.metrics, "learning_rate")
    window, means = moving_average([loss for _, loss in losses])
    smoothed = list(zip([step for step, _ in losses][window - 1 :], means))
    loss = [
        Series("each step", "faint", losses),
        Series(f"mean of the last {window} steps", "line", smoothed),
        Series("validation, fixed timesteps and noise", "points", curve(page.metrics, "validation_loss")),
    ]
    charts = [
        chart("Loss", loss if window > 1 else [loss[0], loss[2]], page.last_step),
        chart("Learning rate", [Series("learning rate", "line", rates)], page.last_step),
    ]
    for name in SCORED:
        found = [(line["step"], Interval.read(own)) for line in page.metrics if (own := _interval(line, name))]
        bars = [(step, one.low, one.high) for step, one in found if one.low is not None and one.high is not None]
        scores = Series(SCORE_LABELS[name], "points", curve(page.metrics, name), bars)
        charts.append(chart(SCORE_LABELS[name], [scores], page.last_step))
    return charts


def _interval(line: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return line.get("intervals", {}).get(name)


def _scores(page: RunPage) -> dict[str, Any] | None:
    """The table of the evaluations: a row a step."""
    lines = [line for line in page.metrics if SCORED[0] in line]
    if not lines:
        return None

    def cell(line: Mapping[str, Any], name: str) -> str:
        own = _interval(line, name)
        return format_interval(Interval.read(own) if own else Interval(line[name]))

    return {
        "labels": [*(SCORE_LABELS[name] for name in SCORED), "Validation loss ↓", "Copies of training images ↓"],
        "rows": [
            {
                "step": line["step"],
                "best": line["step"] == page.best_step,
                "cells": [
                    *(cell(line, name) for name in SCORED),
                    f"{line['val_loss']:.4g}",
                    f"{line['copies']:.0%}",
                ],
            }
            for line in lines
        ],
    }
