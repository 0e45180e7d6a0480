"""Flags that have no effect beside others: said where they are given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from methods.registry import METHODS

Config = Any  # a `TrainConfig`, whose module imports this one
Idle = Sequence[tuple[Sequence[str], Callable[[Config], object], str]]
# Flags, when they do something, and where they don't. Given there, these are refused:
IDLE: Idle = (
    (
        ("base_config",),
        lambda config: config.base.pretrained_model_name_or_path.endswith(".safetensors"),
        "with a base that is no single file, and so has its own",
    ),
    (("dataset_config_name",), lambda config: config.data.dataset_name, "without --dataset_name"),
    (
        ("cache_variants",),
        lambda config: config.data.varies or config.data.cache_variants == 1,
        "with --center_crop and without --random_flip: all are one crop",
    ),
    (
        ("class_data_dir", "class_prompt", "prior_teacher", "prior_loss_weight", "num_class_images"),
        lambda config: config.prior.with_prior_preservation,
        "without --with_prior_preservation",
    ),
    (("num_class_images",), lambda config: not config.prior.prior_teacher, "with --prior_teacher, which needs none"),
    (
        ("output_kohya_dtype",),
        lambda config: config.output.writes_tools_file(METHODS[config.method.name].low_rank),
        "without the file for drawing programs",
    ),
    (("huber_c",), lambda config: config.loss.loss_type == "huber", "without --loss_type huber"),
    (("train_text_encoder_frac",), lambda config: config.text.train_text_encoder, "without --train_text_encoder"),
    (
        ("token_abstraction", "num_new_tokens_per_abstraction", "train_text_encoder_ti_frac"),
        lambda config: config.text.train_text_encoder_ti,
        "without --train_text_encoder_ti",
    ),
    (
        ("validation_data_dir",),
        lambda config: config.validation.validation_loss_steps is not None or config.evaluation.best_by == "val_loss",
        "without --validation_loss_steps",
    ),
    (
        ("best_by", "early_stopping_patience", "eval_protocol", "num_eval_images", "clip", "dino"),
        lambda config: config.evaluation.eval_steps is not None,
        "without --eval_steps",
    ),
    (("hub_model_id", "hub_token"), lambda config: config.output.push_to_hub, "without --push_to_hub"),
)
# diffusers' script takes these without a word, and its commands run here: they get a warning.
IDLE_AS_IN_DIFFUSERS: Idle = (
    (("image_column",), lambda config: config.data.dataset_name, "without --dataset_name"),
    (
        ("prior_generation_precision",),
        lambda config: config.prior.draws_class_images,
        "where no class images are drawn",
    ),
    (
        ("text_encoder_lr", "adam_weight_decay_text_encoder"),
        lambda config: config.text.learns,
        "where no text encoder is trained",
    ),
    (
        ("text_encoder_lr",),
        lambda config: not config.text.learns or not config.optimizer.is_prodigy,
        "with --optimizer prodigy, which has one learning rate",
    ),
    (
        ("prodigy_beta3", "prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"),
        lambda config: config.optimizer.is_prodigy,
        "without --optimizer prodigy",
    ),
    (("lr_warmup_steps",), lambda config: config.optimizer.lr_scheduler != "constant", "with --lr_scheduler constant"),
    (
        ("lr_num_cycles",),
        lambda config: config.optimizer.lr_scheduler == "cosine_with_restarts",
        "without --lr_scheduler cosine_with_restarts",
    ),
    (
        ("lr_power",),
        lambda config: config.optimizer.lr_scheduler == "polynomial",
        "without --lr_scheduler polynomial",
    ),
    (("num_train_epochs",), lambda config: config.loop.max_train_steps is None, "beside --max_train_steps"),
    (
        ("validation_epochs",),
        lambda config: config.validation.validation_prompt and config.validation.validation_steps is None,
        "without --validation_prompt, or beside --validation_steps",
    ),
)


def check_idle(config: Config, defaults: Mapping[str, Any]) -> Iterator[str]:
    """Warnings of flags that were given and do nothing, where diffusers' script takes them too.

    Args:
        defaults: of every flag; one with another value was given.

    Raises:
        ValueError: for one that diffusers' script doesn't have.
    """
    for name, where in _idle(config, IDLE, defaults):
        raise ValueError(f"--{name} has no effect {where}: leave it out, or change that")
    for name, where in _idle(config, IDLE_AS_IN_DIFFUSERS, defaults):
        yield f"--{name} has no effect {where}"


def _idle(config: Config, table: Idle, defaults: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, where) of a table's flags that were given and do nothing."""
    values = config.flags()
    idle = [(name, where) for names, works, where in table if not works(config) for name in names]
    return [(name, where) for name, where in idle if values[name] != defaults[name]]
