"""The trainer's whole command line: a record for each concern, and what is checked between them.

Flags that diffusers' ``train_dreambooth_lora_sdxl.py`` has keep their name, default and meaning; docs/flags.md lists
the few that differ, and why.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from methods.help import method_help, methods_help
from methods.registry import METHODS
from settings.base import BaseOptions
from settings.command_line import exit_with, parse_config
from settings.idle import check_idle
from settings.learning import (
    LOW_VRAM,
    LR_SCHEDULES,
    PAPER_STEPS,
    POLYNOMIAL_END,
    UNPLANNED,
    HardwareOptions,
    LoopOptions,
    LossOptions,
    OptimizerOptions,
)
from settings.method import MethodOptions, TextOptions
from settings.pictures import DataOptions, PriorOptions
from settings.record import Record
from settings.watching import EvaluationOptions, OutputOptions, ValidationOptions

DESCRIPTION = "Teach SDXL a subject from a few pictures, with NoRA (arXiv 2408.10280) or another adapter method."


def is_first_process() -> bool:
    """Of those that were launched, and the one that speaks; known before there is an accelerator."""
    return os.environ.get("RANK", "0") == "0"


@dataclass(frozen=True)
class TrainConfig:
    """The flags of ``train_dreambooth_nora_sdxl.py``; the defaults are the paper's subject-driven run.

    Made by `of`, from the flags' names.
    """

    base: BaseOptions
    data: DataOptions
    prior: PriorOptions
    method: MethodOptions
    text: TextOptions
    loss: LossOptions
    optimizer: OptimizerOptions
    loop: LoopOptions
    hardware: HardwareOptions
    validation: ValidationOptions
    evaluation: EvaluationOptions
    output: OutputOptions

    @classmethod
    def of(cls, **flags: Any) -> TrainConfig:
        """The configuration that the flags say, with what follows from one for another.

        Raises:
            ValueError: for an unknown flag, a wrong value, a contradiction, or a flag that has no effect.
        """
        if unknown := sorted(set(flags) - set(FLAGS)):
            raise ValueError(f"--{unknown[0]} is no flag of the trainer")
        config = cls(**{part: record(**_own(record, flags)) for part, record in RECORDS.items()})
        config = config.replace(**_implied(config))
        check(config, set(flags))
        return config

    def flags(self) -> dict[str, Any]:
        """Every flag by its name, in the order of the records."""
        return {name: value for part in RECORDS for name, value in getattr(self, part)}

    def plans_ahead(self) -> list[str]:
        """The flags by which what a step does depends on how many the run has."""
        text, flags = self.text, []
        if self.optimizer.lr_scheduler not in UNPLANNED:
            flags.append(f"--lr_scheduler {self.optimizer.lr_scheduler}")
        if text.learns and text.fraction < 1:
            flags.append(f"--{text.fraction_flag} {text.fraction:g}")
        if METHODS[self.method.name].plans_ahead:
            flags.append(f"--method {self.method.name}")
        return flags

    def replace(self, **flags: Any) -> TrainConfig:
        """A copy with other values of some flags."""
        parts = {part: getattr(self, part) for part in RECORDS}
        for part, record in RECORDS.items():
            if own := _own(record, flags):
                parts[part] = parts[part].replace(**own)
        return TrainConfig(**parts)


def parse_command_line(argv: Sequence[str] | None = None) -> TrainConfig:
    """The configuration that a command line says; help is printed, and what is wrong exits with status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if text := asked_help(argv):
        print(text)
        sys.exit(0)
    return parse_config(TrainConfig, argv, description=DESCRIPTION)


def asked_help(argv: Sequence[str]) -> str | None:
    """What ``--method help`` and ``--method NAME --method_args help`` ask for."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--method", default="nora")
    parser.add_argument("--method_args", "--method-args", nargs="*", default=[])
    try:
        given, _ = parser.parse_known_args(argv)
    except SystemExit:  # the whole parser says what is wrong
        return None
    if given.method == "help":
        return methods_help()
    if "help" in given.method_args:
        try:
            return method_help(given.method)
        except ValueError as error:
            exit_with(str(error))
    return None


RECORDS: dict[str, type[Record]] = {
    "base": BaseOptions,
    "data": DataOptions,
    "prior": PriorOptions,
    "method": MethodOptions,
    "text": TextOptions,
    "loss": LossOptions,
    "optimizer": OptimizerOptions,
    "loop": LoopOptions,
    "hardware": HardwareOptions,
    "validation": ValidationOptions,
    "evaluation": EvaluationOptions,
    "output": OutputOptions,
}
assert list(RECORDS) == [field.name for field in fields(TrainConfig)]
FLAGS = {name: field for record in RECORDS.values() for name, field in record.model_fields.items()}
# Flags that name what a training reads: never cleared nor written over, and what another training is told by.
SUBJECT_INPUTS = ("instance_data_dir", "class_data_dir")  # an entry of --concepts_list has them too
INPUTS = (
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    *SUBJECT_INPUTS,
    "dataset_name",
    "concepts_list",
    "mask_data_dir",
    "validation_data_dir",
    "eval_protocol",
    "clip",
    "dino",
)


def _own(record: type[Record], flags: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if name in record.model_fields}


def _implied(config: TrainConfig) -> dict[str, Any]:
    """Flags that follow from others."""
    implied: dict[str, Any] = dict(config.method.settled())
    hardware = config.hardware
    if hardware.vram is None:  # which else decides once the base's shapes are known
        implied |= {"vram": LOW_VRAM} if hardware.low_vram else {"quantize_base": hardware.quantize_base or "none"}
    if config.loop.max_train_steps is None and config.loop.num_train_epochs is None:
        implied["max_train_steps"] = PAPER_STEPS
    return implied


# --- what is refused before anything is read --------------------------------------------------------------------------


def check(config: TrainConfig, given: set[str]) -> None:
    """Refuse contradictions; warn of what has no effect where diffusers' script takes it without a word.

    Args:
        given: names of the flags that were said.

    Raises:
        ValueError: with the value, the limit and the fix.
    """
    for sentences in (_data, _prior, _loss, _optimizer, _text, _method, _hardware, _looking, _output):
        for sentence in sentences(config):
            raise ValueError(sentence)
    defaults = {name: field.default for name, field in FLAGS.items()}
    warnings = [*check_idle(config, defaults), *_warnings(config, given)]
    if is_first_process():
        for warning in warnings:
            print(f"warning: {warning}", file=sys.stderr)


def _data(config: TrainConfig) -> Iterator[str]:
    data, prior = config.data, config.prior
    sources = {
        "instance_data_dir": data.instance_data_dir,
        "dataset_name": data.dataset_name,
        "concepts_list": data.concepts_list,
    }
    given = [name for name, value in sources.items() if value is not None]
    if len(given) != 1:
        named = " and ".join(f"--{name}" for name in given) or "no pictures"
        yield f"{named}: name exactly one of " + ", ".join(f"--{name}" for name in sources)
    if data.concepts_list is None and data.instance_prompt is None:
        yield '--instance_prompt is empty: say what the pictures show, such as "a photo of [V] cat"'
    if data.concepts_list is not None:
        theirs = {
            "instance_prompt": data.instance_prompt,
            "class_prompt": prior.class_prompt,
            "class_data_dir": prior.class_data_dir,
        }
        for name, value in theirs.items():
            if value is not None:
                yield f"--{name} belongs into the entries of --concepts_list: leave the flag out"
    if data.mask_data_dir is not None and (data.alpha_mask or data.instance_data_dir is None):
        yield "--mask_data_dir goes with --instance_data_dir and without --alpha_mask: choose one"
    if data.resolution is not None and data.resolution % 8:
        yield f"--resolution {data.resolution} must be a multiple of 8"


def _prior(config: TrainConfig) -> Iterator[str]:
    prior = config.prior
    if not prior.with_prior_preservation:
        return
    if prior.prior_teacher and prior.class_data_dir:
        yield "--prior_teacher needs no class images: leave --class_data_dir out, or --prior_teacher"
    if config.data.concepts_list is None:
        if prior.class_data_dir is None and not prior.prior_teacher:
            yield "--with_prior_preservation needs --class_data_dir"
        if prior.class_prompt is None:
            yield "--with_prior_preservation needs --class_prompt"


def _loss(config: TrainConfig) -> Iterator[str]:
    loss = config.loss
    if loss.snr_gamma is not None and loss.debiased_estimation:
        yield "--snr_gamma and --debiased_estimation weight the same loss: choose one"
    if loss.do_edm_style_training and (loss.snr_gamma is not None or loss.debiased_estimation):
        yield "--do_edm_style_training has weights of its own: leave the other ones out"


def _optimizer(config: TrainConfig) -> Iterator[str]:
    options = config.optimizer
    if options.lr_scheduler not in LR_SCHEDULES:
        yield f"--lr_scheduler {options.lr_scheduler} is not known: choose {', '.join(LR_SCHEDULES)}"
    if options.lr_scheduler == "polynomial" and options.learning_rate <= POLYNOMIAL_END:
        yield (
            f"--learning_rate {options.learning_rate} must be above {POLYNOMIAL_END}, where --lr_scheduler polynomial "
            "ends"
        )
    if options.is_prodigy and config.method.loraplus_lr_ratio is not None:
        yield "--loraplus_lr_ratio needs learning rates of its own, and --optimizer prodigy has one"
    if options.use_8bit_adam and options.optimizer.lower() != "adamw":
        yield f"--use_8bit_adam is AdamW's, not --optimizer {options.optimizer}'s: leave one out"


def _text(config: TrainConfig) -> Iterator[str]:
    text, method = config.text, METHODS[config.method.name]
    if text.train_text_encoder and text.train_text_encoder_ti:
        yield "--train_text_encoder and --train_text_encoder_ti both teach the text encoders: choose one"
    if text.train_text_encoder and method.no_text_encoders:
        yield f"--train_text_encoder with --method {method.name} {method.no_text_encoders}: leave one out"


def _method(config: TrainConfig) -> Iterator[str]:
    method, output = METHODS[config.method.name], config.output
    lora_file = method.low_rank or method.name == "dora"
    if output.output_kohya_format and not method.low_rank:
        yield (
            f"--output_kohya_format with --method {method.name}: its update is no pair of factors, which kohya's names "
            "stand for; leave it out"
        )
    if output.convert_to_lora is not None and method.low_rank:
        yield f"--convert_to_lora has no effect with --method {method.name}, whose LoRA file is exact: leave it out"
    if not output.output_peft_format and not lora_file:
        yield f"--output_peft_format False would leave nothing of --method {method.name}: leave it out"


def _hardware(config: TrainConfig) -> Iterator[str]:
    hardware = config.hardware
    if hardware.low_vram and hardware.vram != LOW_VRAM:
        yield f"--low_vram is --vram {LOW_VRAM}, and --vram {hardware.vram} is given too: leave one out"
    if hardware.gradient_checkpointing and hardware.selective_checkpointing == "feed_forward":
        yield (
            "--gradient_checkpointing computes feed-forward layers again as it is: leave --selective_checkpointing "
            "feed_forward out, or that"
        )


def _looking(config: TrainConfig) -> Iterator[str]:
    validation = config.validation
    prompts = validation.validation_prompt or []
    if not all(prompt.strip() for prompt in prompts):
        yield "--validation_prompt has an empty prompt: it must say something"
    for prompt in prompts:
        if prompts.count(prompt) > 1:
            yield f"--validation_prompt has {prompt!r} twice: once is enough"
    if validation.num_validation_images == 0 and (prompts or validation.validation_steps):
        yield "--num_validation_images 0 draws nothing: leave --validation_prompt and _steps out"
    if config.evaluation.eval_steps is not None and config.data.concepts_list:
        yield "--eval_steps scores one subject: leave it out with --concepts_list"


def _output(config: TrainConfig) -> Iterator[str]:
    folder = Path(config.output.output_dir).resolve()
    if not Path(os.path.normpath(folder / config.output.logging_dir)).is_relative_to(folder):
        yield f"--logging_dir {config.output.logging_dir} must be inside --output_dir: name a folder there"
    if config.output.hub_token is not None and config.output.report_to not in ("tensorboard", "none"):
        yield (
            f"--hub_token with --report_to {config.output.report_to}, which may keep the command line, would show the "
            "token there: leave it out and use hf auth login"
        )


def _warnings(config: TrainConfig, given: set[str]) -> Iterator[str]:
    method = METHODS[config.method.name]
    if method.rates is not None and "learning_rate" not in given and not config.optimizer.is_prodigy:
        yield (
            f"--method {method.name} usually learns at {method.rates}, and --learning_rate is at its default, "
            f"{config.optimizer.learning_rate:g}"
        )
