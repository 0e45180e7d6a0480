"""A run while it trains: what every step works on, and what makes it the same run when it is resumed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from dreambooth.batches import Batches, PromptEmbedder
from dreambooth.loss import Objective
from dreambooth.prepare import Encoded, Pictures
from inference.prediction import Prediction
from methods.adapter import Adapter
from methods.components import TEXT_ENCODERS
from runs.checkpoints import identity
from runs.exports import save_adapter
from settings.training import TrainConfig
from trainer.best_adapter import RunJudge
from trainer.diagnostics import GradientWatch
from trainer.models import save_state
from trainer.optimizer import Average, build_optimizer, build_schedule, parameter_groups


@dataclass(frozen=True)
class Run:
    """What every step works on."""

    config: TrainConfig
    accelerator: Accelerator
    adapter: Adapter
    models: dict[str, nn.Module]  # component -> model with what learns inside
    prepared: dict[str, nn.Module]  # the same, as the accelerator wraps them
    parameters: list[nn.Parameter]  # what learns
    batches: Batches
    embedder: PromptEmbedder
    objective: Objective
    optimizer: AcceleratedOptimizer
    schedule: Any  # of the learning rate
    average: Average
    watch: GradientWatch
    dtype: torch.dtype  # of the frozen base

    def save(self, folder: Path, **formats: bool) -> list[str]:
        """Write the adapter as it is now; returns the names of the files. See `save_adapter`."""
        return save_adapter(self.adapter, self.models, folder, new_word=self.config.text.new_word, **formats)


def start_run(
    config: TrainConfig,
    accelerator: Accelerator,
    adapter: Adapter,
    models: dict[str, nn.Module],
    encoded: Encoded,
    objective: Objective,
    judge: RunJudge,
    dtype: torch.dtype,
    checkpoint: Path | None,
) -> Run:
    """Optimizer, schedule and draws over models that are ready to learn, as they were in the checkpoint.

    Args:
        judge: its memory is part of a checkpoint.
    """
    total_steps = config.loop.max_train_steps
    parameters = [parameter for model in models.values() for parameter in model.parameters() if parameter.requires_grad]
    groups = parameter_groups(config.optimizer, config.text.text_encoder_lr, adapter, models)
    optimizer = build_optimizer(config.optimizer, groups)
    schedule = build_schedule(config.optimizer, optimizer, total_steps)
    prepared = {name: accelerator.prepare(model) for name, model in models.items()}
    run = Run(
        config=config,
        accelerator=accelerator,
        adapter=adapter,
        models=models,
        prepared=prepared,
        parameters=parameters,
        batches=_batches(config, encoded, accelerator, objective),
        embedder=_embedder(config, encoded, models, prepared),
        objective=objective,
        optimizer=accelerator.prepare(optimizer),
        schedule=schedule,
        average=Average(parameters, config.optimizer.ema_decay),
        watch=GradientWatch({} if checkpoint else models, accelerator.mixed_precision),
        dtype=dtype,
    )
    remembering = [adapter] if adapter.state_dict() else []
    accelerator.register_for_checkpointing(schedule, run.average, judge, *remembering)
    accelerator.register_save_state_pre_hook(partial(_save_models, run, judge))
    accelerator.register_load_state_pre_hook(lambda models, _: models.clear())  # they were restored before
    if checkpoint:
        accelerator.load_state(str(checkpoint))
    return run


def _save_models(
    run: Run, judge: RunJudge, models: list[nn.Module], weights: list[dict[str, torch.Tensor]], folder: str
) -> None:
    """What a checkpoint holds of the models: what learns alone, exact and as the files that inference reads."""
    weights.clear()  # what accelerate would save: the whole base
    if run.accelerator.is_main_process:
        save_state(run.adapter, run.models, Path(folder))
        with run.average.applied():
            run.save(Path(folder))
        judge.save_best(Path(folder))


def _batches(config: TrainConfig, encoded: Encoded, accelerator: Accelerator, objective: Objective) -> Batches:
    loop = config.loop
    return Batches(
        encoded,
        seed=loop.seed,
        total_steps=loop.max_train_steps,
        batch_size=loop.train_batch_size,
        accumulation=loop.gradient_accumulation_steps,
        share=(accelerator.process_index, accelerator.num_processes),
        num_train_timesteps=objective.num_train_timesteps,
        noise_offset=config.loss.noise_offset,
        caption_dropout=config.data.caption_dropout,
        prior_loss_weight=config.prior.prior_loss_weight,
        teacher=config.prior.prior_teacher,
        device=accelerator.device,
    )


def _embedder(
    config: TrainConfig, encoded: Encoded, models: dict[str, nn.Module], prepared: dict[str, nn.Module]
) -> PromptEmbedder:
    if not config.text.learns:
        return PromptEmbedder(encoded)
    plain, wrapped = ([some[name] for name in TEXT_ENCODERS] for some in (models, prepared))
    return PromptEmbedder(encoded, plain, wrapped, config.text.steps(config.loop.max_train_steps))


def run_identity(
    config: TrainConfig,
    accelerator: Accelerator,
    fingerprints: dict[str, str],
    predicts: Prediction,
    encoded: Encoded,
    pictures: Pictures,
) -> dict[str, Any]:
    """What a resumed run must have the same.

    Args:
        fingerprints: of the base's models that learn, by component.
        predicts: what the base predicts, whatever said so.
    """
    return identity(
        config.flags() | predicts.flags(),
        config.plans_ahead(),
        base=fingerprints,
        autoencoder_and_text_encoders=encoded.encoders,
        pictures_and_prompts=pictures.hash(),
        number_of_processes=accelerator.num_processes,
    )
