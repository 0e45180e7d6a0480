"""What happens between the steps of a run: logs, looks, checkpoints, and reasons to stop."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from accelerate import Accelerator
from tqdm.auto import tqdm

from dreambooth.validation import validation_loss
from methods.components import BEST
from runs.checkpoints import GracefulStop, clear_earlier_run, find_checkpoint, save_checkpoint
from runs.exports import results
from runs.record import SAMPLES, Clock, MetricsLog, PeakMemory, samples_after, step_samples
from settings.learning import LoopOptions
from trainer.accelerator import end_training
from trainer.best_adapter import RunJudge
from trainer.report import Report
from trainer.run import Run
from trainer.samples import Sampler, keep_samples


class Step(NamedTuple):
    """A step that was made."""

    number: int  # counted from 1
    loss: float
    learning_rate: float
    seconds: float


class Hook(Protocol):
    def after_step(self, step: Step) -> bool | None:
        """Every process calls it; True ends the run here, as if this were its last step."""


class ClearEarlier:
    """Once a step is made, the run works: only then may the results of an earlier one go.

    Args:
        judge: whose best adapter comes back, where the run goes on from an older checkpoint.
        first_step, total_steps: of the run; where nothing is left to do, they go at once.
        checkpoint: that the run goes on from; its earlier samples stay.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        folder: Path,
        judge: RunJudge,
        first_step: int,
        total_steps: int,
        checkpoint: Path | None,
    ) -> None:
        self.accelerator, self.judge, self.checkpoint, self.cleared = accelerator, judge, checkpoint, False
        names = [*results(folder), *(samples_after(folder, first_step) if checkpoint else [SAMPLES, BEST])]
        self.clear = partial(clear_earlier_run, accelerator, folder, names, keep_state=checkpoint is not None)
        if first_step == total_steps:
            self.after_step()

    def after_step(self, step: Step | None = None) -> None:
        if self.cleared:
            return
        self.clear()
        if self.checkpoint and self.accelerator.is_main_process:
            self.judge.restore_best(self.checkpoint)
        self.cleared = True


class Log:
    """Metrics on disk, trackers and the progress bar."""

    def __init__(self, accelerator: Accelerator, metrics: MetricsLog, progress: tqdm) -> None:
        self.accelerator, self.metrics, self.progress = accelerator, metrics, progress

    def after_step(self, step: Step) -> None:
        logged = {"loss": step.loss, "learning_rate": step.learning_rate}
        self.metrics.write(step.number, **logged, seconds=round(step.seconds, 5))
        self.accelerator.log(logged, step=step.number)
        self.progress.set_postfix(loss=f"{step.loss:.4f}", lr=f"{step.learning_rate:.1e}")


class Look:
    """Validation loss, scores and samples after the steps at which the flags ask for them, by the averaged weights.

    Looking is not training: its time counts for no step, and its memory not at all. The run's page is written after
    each look, and after the first step.

    Args:
        samples_every: steps; 0: at the end only.
    """

    def __init__(
        self,
        run: Run,
        clock: Clock,
        memory: PeakMemory,
        metrics: MetricsLog,
        judge: RunJudge,
        sampler: Sampler,
        samples_every: int,
        report: Report,
    ) -> None:
        self.run, self.clock, self.memory, self.metrics = run, clock, memory, metrics
        self.judge, self.sampler, self.samples_every, self.report = judge, sampler, samples_every, report
        self.accelerator = run.accelerator

    def after_step(self, step: Step) -> None:
        number = step.number
        judges = self.judge.due(number)
        config, every = self.run.config, self.run.config.validation.validation_loss_steps
        validates = judges or bool(every and number % every == 0)
        last = number == config.loop.max_train_steps  # its samples are drawn from the saved adapter
        samples = bool(self.samples_every and number % self.samples_every == 0 and not last)
        if not (validates or samples or self.report.is_due):
            return
        peak = self.memory.megabytes
        with self.clock.pause(), self.memory.pause():
            with self.run.average.applied():
                loss = self._validate(number) if validates else None
                if judges:
                    self._evaluate(number, loss)
                if samples:
                    self._sample(number)
            self.report.look(peak)

    def _sample(self, step: int) -> None:
        config = self.run.config
        seeds = range(config.loop.seed, config.loop.seed + config.validation.num_validation_images)
        drawn = self.sampler.samples(config.validation.validation_prompt, seeds)
        keep_samples(self.accelerator, drawn, Path(config.output.output_dir) / step_samples(step), step)

    def _validate(self, step: int) -> float:
        embedder, batch_size = self.run.embedder, self.run.config.loop.train_batch_size
        unet, pictures = self.run.models["unet"], embedder.encoded.held_out
        loss = validation_loss(unet, pictures, embedder.current(), self.run.objective, batch_size)
        self.accelerator.log({"validation_loss": loss}, step=step)
        self.metrics.write(step, validation_loss=loss)
        return loss

    def _evaluate(self, step: int, loss: float) -> None:
        drawn = self.sampler.draw(self.judge.prompts, self.judge.seeds)
        if self.accelerator.is_main_process:
            scores = self.judge.look(step, drawn, loss, self.run.save)
            self.accelerator.log({f"eval/{name}": score for name, score in scores.items()}, step=step)
            self.metrics.write(step, **scores, intervals=self.judge.intervals, warnings=self.judge.warnings)


class Checkpoints:
    """The state of the run every so many steps."""

    def __init__(self, accelerator: Accelerator, folder: Path, loop: LoopOptions, identity: Mapping[str, Any]) -> None:
        self.every, limit = loop.checkpointing_steps, loop.checkpoints_total_limit
        named = None if loop.resume_from_checkpoint == "latest" else loop.resume_from_checkpoint
        keep = find_checkpoint(named, folder)
        self.save = partial(save_checkpoint, accelerator, folder, identity=identity, total_limit=limit, keep=keep)

    def after_step(self, step: Step) -> None:
        if step.number % self.every == 0:
            self.save(step=step.number)


class EarlyStop:
    """Ends the run when no better adapter came for a while."""

    def __init__(self, judge: RunJudge) -> None:
        self.judge = judge

    def after_step(self, step: Step) -> bool:
        return self.judge.due(step.number) and self.judge.gives_up()


class Interruption:
    """Saves and leaves when the process is asked to stop."""

    def __init__(self, run: Run, stop: GracefulStop, checkpoints: Checkpoints) -> None:
        self.run, self.stop, self.checkpoints = run, stop, checkpoints

    def after_step(self, step: Step) -> None:
        accelerator, total_steps = self.run.accelerator, self.run.config.loop.max_train_steps
        if self.stop.asked(accelerator) and step.number < total_steps:
            path = self.checkpoints.save(step=step.number)
            end_training(accelerator, self.run.prepared)
            if accelerator.is_main_process:
                print(f"stopped; {path} is whole, go on with --resume_from_checkpoint latest", file=sys.stderr)
            sys.exit(128 + self.stop.signal)  # as shells do
