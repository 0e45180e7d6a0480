"""What a run looks at while it trains: its validation loss, its scores, and samples."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from dreambooth.loss import Objective
from dreambooth.prepare import Encoded, current_prompts
from dreambooth.validation import validation_loss
from runs.exports import save_adapter
from runs.record import MetricsLog, step_samples
from settings.training import TrainConfig
from trainer.best_adapter import RunJudge
from trainer.optimizer import Average
from trainer.samples import draw_pictures, draw_samples, keep_samples


class Observer:
    """Looks at the run after the steps at which the flags ask for it, with the averaged weights where there are any.

    Args:
        trained: component name -> model with the adapter inside.
        tokenizers: of the pipeline, by name; they may know a new word.
        sampling_steps: samples are drawn every so many steps; None: not while training.
    """

    def __init__(
        self,
        config: TrainConfig,
        accelerator: Accelerator,
        trained: Mapping[str, nn.Module],
        tokenizers: Mapping[str, Any],
        dtype: torch.dtype,
        encoded: Encoded,
        objective: Objective,
        average: Average,
        judge: RunJudge,
        metrics: MetricsLog,
        sampling_steps: int | None,
    ) -> None:
        self.config, self.accelerator, self.trained, self.dtype = config, accelerator, trained, dtype
        self.parts = {**trained, **tokenizers}
        self.encoded, self.objective, self.average = encoded, objective, average
        self.judge, self.metrics, self.sampling_steps = judge, metrics, sampling_steps

    def look(self, step: int) -> None:
        """After ``step`` optimiser steps; every process calls it."""
        every = self.config.validation_loss_steps
        judges = self.judge.due(step)
        validates = judges or bool(every and step % every == 0)
        last = step == self.config.max_train_steps  # its samples are drawn from the saved adapter
        samples = bool(self.sampling_steps and step % self.sampling_steps == 0 and not last)
        if not (validates or samples):
            return
        with self.average.applied():
            loss = self._validate(step) if validates else None
            if judges:
                self._judge(step, loss)
            if samples:
                drawn = draw_samples(self.config, self.accelerator, self.parts, self.dtype)
                keep_samples(self.accelerator, drawn, Path(self.config.output_dir) / step_samples(step), step)

    def _validate(self, step: int) -> float:
        prompts = current_prompts(self.config, self.trained, self.encoded)
        pictures, batch_size = self.encoded.held_out, self.config.train_batch_size
        loss = validation_loss(self.trained["unet"], pictures, prompts, self.objective, batch_size)
        self.accelerator.log({"validation_loss": loss}, step=step)
        self.metrics.write(step, validation_loss=loss)
        return loss

    def _judge(self, step: int, loss: float) -> None:
        judge = self.judge
        drawn = draw_pictures(self.config, self.accelerator, self.parts, self.dtype, judge.prompts, judge.seeds)
        if self.accelerator.is_main_process:
            scores = judge.look(step, drawn, loss, partial(save_adapter, self.config, self.trained))
            self.accelerator.log({f"eval/{name}": score for name, score in scores.items()}, step=step)
            self.metrics.write(step, **scores)
