"""Scores of a run while it trains: which step was the best one, and when there is no better to come."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dreambooth.prepare import Pictures
from inference.sampling import GeneratedImage
from inference.score_labels import SCORE_RANGES
from judging.prompts import FIRST_SEED, Protocol, subject_of_prompt, with_article
from judging.scorer import Scorer
from judging.statistics import interval
from judging.tables import copies_warning
from methods.components import BEST, BEST_SCORES
from runs.record import file_sizes
from settings.columns import CLIP, DINO
from settings.watching import EvaluationOptions
from storage.files import read_json, replacing_folder, write_atomic
from storage.pictures import open_image


class RunJudge:
    """Looks at the run every ``--eval_steps``; nothing where the flag is not given.

    The best adapter has the highest score of ``--best_by`` (the lowest, for val_loss) among the evaluations in which
    no alarm says that it draws copies of training images: more of them than the detector's own errors would give. An
    equal one later is no better.

    Raises:
        ValueError: if an encoder or the protocol can't be had.
    """

    def __init__(
        self,
        options: EvaluationOptions,
        accelerator: Accelerator,
        pictures: Pictures,
        output_dir: Path,
        total_steps: int,
    ) -> None:
        self.options, self.output_dir, self.total_steps = options, output_dir, total_steps
        self.best: dict[str, Any] | None = None
        self.before: dict[str, float] | None = None  # the scores of the last evaluation
        self.waited = 0  # evaluations since the best one
        self.intervals: dict[str, Any] = {}  # of the last evaluation's scores
        self.warnings: list[str] = []  # of the last evaluation
        if options.eval_steps is None:
            return
        words = subject_of_prompt(pictures.concepts[0].instance_prompt)
        self.prompts = [with_article(one, words) for one in Protocol.read(options.eval_protocol, None, False).prompts]
        self.seeds = range(FIRST_SEED, FIRST_SEED + options.num_eval_images)
        if accelerator.is_main_process:
            instances = [open_image(one.example.read(), one.example.name) for one in pictures.instance]
            # On the CPU: a few small pictures now and then are not worth the training's memory.
            self.scorer = Scorer(options.clip or CLIP, options.dino or DINO, instances, torch.device("cpu"))

    def due(self, step: int) -> bool:
        every = self.options.eval_steps
        return every is not None and (step % every == 0 or step == self.total_steps)

    def look(
        self, step: int, drawn: list[GeneratedImage], val_loss: float, save_adapter: Callable[[Path], Sequence[str]]
    ) -> dict[str, float]:
        """Score the pictures, keep the adapter if it is the best so far; returns what is to be logged. Main process.

        Args:
            save_adapter: writes the adapter's files into a folder, and returns their names.
        """
        scores, copied = self.scorer.score(drawn), self.scorer.copies(drawn)
        intervals = {name: interval([scores[name]], SCORE_RANGES[name]) for name in ("dino", "clip_i", "clip_t")}
        found = {name: one.estimate for name, one in intervals.items()}
        found |= {"val_loss": val_loss, "copies": copied.share}
        self.intervals = {name: one.fields() for name, one in intervals.items()}
        self.warnings = [warning] if (warning := copies_warning(f"step {step}", copied.fields())) else []
        if copied.alarm and self.before and found["dino"] > self.before["dino"]:
            self.warnings.append(f"step {step}: fidelity rises only by memorising, it is not kept as the best")
        for warning in self.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        self.before = found
        self.waited += 1
        if not copied.alarm and self._is_better(found):
            self.waited = 0
            self.best = {"step": step, "by": self.options.best_by, **found}
            if (by := intervals.get(self.options.best_by)) is not None:
                self.best["interval"] = by.fields()
            self._keep(save_adapter)
        return found

    def _is_better(self, found: Mapping[str, float]) -> bool:
        name = self.options.best_by
        if self.best is None:
            return True
        return found[name] < self.best[name] if name == "val_loss" else found[name] > self.best[name]

    def _keep(self, save_adapter: Callable[[Path], Sequence[str]]) -> None:
        assert self.best is not None
        with replacing_folder(self.output_dir / BEST) as fresh:
            self.best["files"] = file_sizes(fresh, save_adapter(fresh))
            write_atomic(fresh / BEST_SCORES, json.dumps(self.best, indent=1) + "\n")

    def save_best(self, checkpoint: Path) -> None:
        """Put a copy of best/ into a checkpoint: a run that goes on from it may find a later one in the folder."""
        if self.best is not None:
            shutil.make_archive(str(checkpoint / BEST), "zip", self.output_dir / BEST)

    def restore_best(self, checkpoint: Path) -> None:
        """Make best/ what it was when the checkpoint was saved: a later one is of steps that are made anew."""
        folder = self.output_dir / BEST
        found = read_json(folder / BEST_SCORES) if (folder / BEST_SCORES).is_file() else None
        if found == self.best:
            return
        if self.best is None:
            shutil.rmtree(folder)
            return
        copy = checkpoint / f"{BEST}.zip"
        if not copy.is_file():  # a checkpoint of before they had one
            print(
                f"warning: {checkpoint} has no copy of the best adapter, of step {self.best['step']}", file=sys.stderr
            )
            self.best = None
            shutil.rmtree(folder, ignore_errors=True)
            return
        with replacing_folder(folder) as fresh:
            shutil.unpack_archive(copy, fresh)

    def gives_up(self) -> bool:
        """Whether ``--early_stopping_patience`` is used up; every process gets the main one's answer."""
        patience = self.options.early_stopping_patience
        if patience is None:
            return False
        return broadcast_object_list([self.waited >= patience])[0]

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "before": self.before, "waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best, self.before, self.waited = state["best"], state["before"], state["waited"]
