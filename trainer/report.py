"""The page of a run, made of what lies in its folder: written while it trains, and at its end."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from inference.charts import thinned
from inference.figures import cost_figures, format_seconds, method_title
from inference.run_page import RunPage, RunPicture, curve, render_run_page, small_picture
from methods.components import RUN_RECORD
from runs.card import best_score
from runs.record import METRICS, RUN_PAGE, SAMPLES, Clock, MetricsLog, is_run_page, read_metrics
from settings.training import FLAGS
from storage.files import read_json, write_atomic
from storage.pictures import drawn_here, png_text
from storage.text import counted, first_line
from trainer.best_adapter import RunJudge
from trainer.optimizer import check_rates
from trainer.run import Run

# What samples may add to the page: a page of 10 MB opens at once on a phone, and goes by mail.
MOST_PICTURES = 400
MOST_BYTES = 8_000_000


class Report:
    """Writes ``run.html`` into the run's folder; in the main process alone.

    It is to look at: whatever goes wrong with it is said once, and never ends the training. As a context it says on the
    page why the loop inside was left.
    """

    def __init__(self, run: Run, clock: Clock, metrics: MetricsLog, judge: RunJudge) -> None:
        self.run, self.clock, self.metrics, self.judge = run, clock, metrics, judge
        self.folder = Path(run.config.output.output_dir)
        self.is_due = True  # after the first step, so that there is a page to reload
        self.rests_until = 0.0  # see `look`
        self.pictures: dict[tuple[Path, int], RunPicture] = {}  # (file, time of its last change), each made small once
        self.peak_memory_mb, self.failed = 0.0, False

    def __enter__(self) -> Report:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if error is not None and not self.is_due:
            reason = "asked to stop" if isinstance(error, SystemExit | KeyboardInterrupt) else first_line(error)
            self.write(self.peak_memory_mb, stopped=reason)

    def look(self, peak_memory_mb: float) -> None:
        """`write`, unless the last time was so short ago that the page would take more than a twentieth of the run."""
        if time.perf_counter() >= self.rests_until:
            self.write(peak_memory_mb)

    def write(self, peak_memory_mb: float, stopped: str | None = None) -> None:
        """Write the page anew.

        Args:
            peak_memory_mb: of the training so far.
            stopped: why the run ended before its last step.
        """
        self.is_due, self.peak_memory_mb = False, peak_memory_mb
        if not self.run.accelerator.is_main_process:
            return
        path, started = self.folder / RUN_PAGE, time.perf_counter()
        try:
            if path.exists() and not is_run_page(path):
                raise ValueError("a file that is no page of a run is there")
            write_atomic(path, render_run_page(self._page(stopped)))
        except Exception as error:
            if not self.failed:
                print(f"warning: {path} was not written ({first_line(error)}); the training goes on", file=sys.stderr)
            self.failed = True
        self.rests_until = time.perf_counter() + 20 * (time.perf_counter() - started)

    def _page(self, stopped: str | None) -> RunPage:
        metrics, config = read_metrics(self.folder / METRICS), self.run.config
        record = read_json(self.folder / RUN_RECORD) if (self.folder / RUN_RECORD).is_file() else None
        step = max((line["step"] for line in metrics), default=0)
        total = config.loop.max_train_steps if record is None else step
        pictures, left_out = self._pictures(step)
        return RunPage(
            title=f"{self.folder.resolve().name}: {method_title(config.method.name)}",
            state=state_text(step, total, finished=record is not None, stopped=stopped),
            alarms=self._alarms(metrics, stopped),
            facts=self._facts(metrics),
            costs=cost_figures([record or self._record_so_far()]),
            flags={name: value for name, value in config.flags().items() if name != "hub_token"},
            changed={name for name, value in config.flags().items() if value != FLAGS[name].default},
            metrics=metrics,
            last_step=total,
            pictures=pictures,
            best_step=self.judge.best["step"] if self.judge.best else None,
            left_out=left_out,
        )

    def _record_so_far(self) -> dict[str, Any]:
        """What run.json will say of the costs, as far as it is known."""
        return {
            "trainable_parameters": sum(parameter.numel() for parameter in self.run.parameters),
            "timings": self.clock.timings | self.metrics.timings,
            "peak_memory_mb": self.peak_memory_mb,
        }

    def _alarms(self, metrics: list[dict[str, Any]], stopped: str | None) -> list[str]:
        config = self.run.config
        found = [] if stopped is None else [f"stopped: {stopped}"]
        found += [warning for line in metrics for warning in line.get("warnings", [])]
        return [*found, *check_rates(config.optimizer, config.loop.max_train_steps)]

    def _facts(self, metrics: list[dict[str, Any]]) -> dict[str, str]:
        facts = {
            "Base": self.run.config.base.pretrained_model_name_or_path,
            "Time": format_seconds(self.clock.total),
            "Written": time.strftime("%Y-%m-%d %H:%M"),
        }
        if best := self.judge.best:
            facts["Best adapter"] = f"step {best['step']}, by {best['by']}: {best_score(best)}"
        if losses := curve(metrics, "validation_loss"):
            lowest = min(losses, key=lambda point: point[1])
            facts["Validation loss"] = f"{losses[-1][1]:.4g}, lowest {lowest[1]:.4g} at step {lowest[0]}"
        return facts

    def _pictures(self, last_step: int) -> tuple[list[RunPicture], int]:
        """The samples in the folder by step, prompt by prompt; and how many steps of them are left out."""
        steps: dict[int, list[tuple[Path, dict[str, str]]]] = {}
        for path in sorted((self.folder / SAMPLES).rglob("*.png")):
            if path.stat().st_size and drawn_here(path):
                text = png_text(path)
                steps.setdefault(int(text.get("step") or step_of(path, last_step)), []).append((path, text))
        kept = sorted(steps)
        while sum(len(steps[step]) for step in kept) > MOST_PICTURES and len(kept) > 1:  # before any is read
            kept = thinned(kept, (len(kept) + 1) // 2)
        order = {prompt: place for place, prompt in enumerate(self.run.config.validation.validation_prompt or [])}
        found = [self._picture(path, step, text) for step in kept for path, text in steps[step]]
        found.sort(key=lambda one: (one.step, order.get(one.prompt, len(order)), one.prompt, one.seed))
        shown = within_limit(found)
        return shown, len(steps) - len({one.step for one in shown})

    def _picture(self, path: Path, step: int, text: Mapping[str, str]) -> RunPicture:
        key = path, path.stat().st_mtime_ns
        if key not in self.pictures:
            prompt, seed = text.get("prompt", path.stem), int(text.get("seed", 0))
            self.pictures[key] = RunPicture(step, prompt, seed, small_picture(path))
        return self.pictures[key]


def step_of(path: Path, last_step: int) -> int:
    """The step of a sample that doesn't say it itself: its folder's, or the run's last."""
    found = re.fullmatch(r"step-(\d+)", path.parent.name)
    return int(found[1]) if found else last_step


def state_text(step: int, total: int, *, finished: bool, stopped: str | None) -> str:
    if finished:
        return f"Finished after {counted(step, 'step')}"
    return f"{'At' if stopped is None else 'Stopped at'} step {step:,} of {total:,}"


def within_limit(pictures: list[RunPicture]) -> list[RunPicture]:
    """Those that the page may hold: every second step goes until they are small enough, then the last pictures."""

    def size(chosen: list[RunPicture]) -> int:
        return sum(len(one.data["uri"]) for one in chosen)

    kept = sorted({one.step for one in pictures})
    while size(pictures) > MOST_BYTES and len(kept) > 1:
        kept = thinned(kept, (len(kept) + 1) // 2)
        pictures = [one for one in pictures if one.step in kept]
    while size(pictures) > MOST_BYTES:
        pictures = pictures[:-1]
    return pictures
