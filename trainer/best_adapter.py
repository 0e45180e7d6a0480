"""Scores of a run while it trains: which step was the best one, and when there is no better to come."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dreambooth.prepare import Pictures
from inference.sampling import GeneratedImage
from judging.prompts import FIRST_SEED, Protocol, subject_of_prompt, with_article
from judging.scorer import Scorer
from judging.tables import warn_of_memorisation
from methods.components import BEST, BEST_SCORES
from runs.record import file_sizes
from settings.columns import CLIP, DINO
from settings.watching import EvaluationOptions
from storage.files import replacing_folder, write_atomic
from storage.pictures import open_image


class RunJudge:
    """Looks at the run every ``--eval_steps``; nothing where the flag is not given.

    The best adapter has the highest score of ``--best_by`` (the lowest, for val_loss) among the evaluations in which
    the memorisation alarm is silent. An equal one later is no better.

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
        scores = self.scorer.score(drawn)
        copied = scores["memorisation"]
        found = {name: scores[name].mean for name in ("dino", "clip_i", "clip_t")}
        found |= {"val_loss": val_loss, "nearest_training_image": copied.nearest}
        if copied.alarm:
            warn_of_memorisation(f"step {step}", copied._asdict())
            if self.before and found["dino"] > self.before["dino"]:
                print(
                    f"warning: step {step}: fidelity rises only by memorising, it is not kept as the best",
                    file=sys.stderr,
                )
        self.before = found
        self.waited += 1
        if not copied.alarm and self._is_better(found):
            self.waited = 0
            self.best = {"step": step, "by": self.options.best_by, **found}
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
