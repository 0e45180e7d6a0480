"""Optimizer, learning rates and schedule from the flags."""

from __future__ import annotations

import ast
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from settings.training import TrainConfig

# Arguments that every group of parameters sets for itself.
FLAGS = {
    "lr": "--learning_rate and --text_encoder_lr",
    "weight_decay": "--adam_weight_decay and --adam_weight_decay_text_encoder",
}


def optimizer_class(config: TrainConfig) -> type[torch.optim.Optimizer]:
    """The class that ``--optimizer`` and ``--use_8bit_adam`` name.

    Raises:
        ValueError: for an unknown name, or a package that is not installed.
    """
    name = config.optimizer
    if config.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise ValueError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes, or leave it out") from error
        return bitsandbytes.optim.AdamW8bit
    if name.lower() == "prodigy":
        try:
            from prodigyopt import Prodigy
        except ImportError as error:
            raise ValueError("--optimizer prodigy needs prodigyopt: pip install prodigyopt, or use AdamW") from error
        return Prodigy
    classes = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }
    found = classes.get(name.lower())
    if found is None:
        known = ", ".join(sorted(value.__name__ for value in classes.values()))
        raise ValueError(f"--optimizer {name} is not known: choose prodigy or a class of torch.optim ({known})")
    if found in (torch.optim.LBFGS, torch.optim.SparseAdam):
        raise ValueError(f"--optimizer {name} can't train an adapter in this loop: choose another one")
    return found


def parse_optimizer_args(arguments: Sequence[str] | None) -> dict[str, Any]:
    """``["momentum=0.9", "nesterov=True"]`` as keyword arguments."""
    parsed = {}
    for argument in arguments or ():
        name, equals, value = argument.partition("=")
        if not equals or not name.isidentifier():
            raise ValueError(f"--optimizer_args {argument} must look like momentum=0.9")
        if name in FLAGS:
            raise ValueError(f"--optimizer_args {argument} would have no effect: use {FLAGS[name]}")
        try:
            parsed[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError):
            parsed[name] = value
    return parsed


def check_optimizer(config: TrainConfig) -> None:
    """Refuse what can't be built or makes no step, before anything is loaded.

    Raises:
        ValueError: for a class, or arguments of it, that are not there, contradict each other or don't work.
    """
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    shapes = [(2, 2), (2,)] if config.use_dora else [(2, 2)]  # DoRA's magnitudes are vectors
    parameters = [nn.Parameter(torch.ones(shape, device=device)) for shape in shapes]
    optimizer = build_optimizer(config, [{"params": parameters, "weight_decay": config.adam_weight_decay}])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except Exception as error:  # a class may raise anything for an argument that it can't use
        raise ValueError(f"--optimizer {config.optimizer} fails with its --optimizer_args: {error!r}") from error
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise ValueError(f"--optimizer {config.optimizer} makes NaN or infinity with its --optimizer_args")


def build_optimizer(config: TrainConfig, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer over groups of `parameter_groups`, with the flags that its class has.

    Raises:
        ValueError: for arguments that the class does not take.
    """
    cls = optimizer_class(config)
    takes = dict(list(inspect.signature(cls).parameters.items())[1:])
    options = {
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "beta3": config.prodigy_beta3,
        "decouple": config.prodigy_decouple,
        "use_bias_correction": config.prodigy_use_bias_correction,
        "safeguard_warmup": config.prodigy_safeguard_warmup,
    }
    # Adafactor's eps is a pair, which --adam_epsilon can't mean
    options = {
        name: value
        for name, value in options.items()
        if name in takes and isinstance(takes[name].default, (type(value), type(None)))
    }
    given = parse_optimizer_args(config.optimizer_args)
    if unknown := sorted(set(given) - set(takes)):
        raise ValueError(f"--optimizer_args {unknown[0]}: {cls.__name__} takes {', '.join(takes)}")
    if "weight_decay" not in takes:
        groups = [{name: value for name, value in group.items() if name != "weight_decay"} for group in groups]
    try:
        return cls(list(groups), **({"lr": config.learning_rate} | options | given))
    except Exception as error:  # as above
        raise ValueError(f"--optimizer {cls.__name__} refuses its arguments: {error}") from error


def parameter_groups(config: TrainConfig, models: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
    """Trainable parameters by component and by side of the update, with their learning rate and weight decay.

    ``name`` is the component; B factors are apart where ``--loraplus_lr_ratio`` makes them learn faster.
    """
    prodigy = config.optimizer.lower() == "prodigy"
    groups = []
    for component, model in models.items():
        text = component != "unet"
        # Prodigy scales all groups by one estimate: it wants one learning rate, as diffusers gives it.
        rate = config.text_encoder_lr if text and not prodigy else config.learning_rate
        decay = config.adam_weight_decay_text_encoder if text else config.adam_weight_decay
        for ratio, wanted in ((1.0, False), (config.loraplus_lr_ratio or 1.0, True)):
            parameters = [
                parameter
                for name, parameter in model.named_parameters()
                if parameter.requires_grad and is_output_side(name) == wanted
            ]
            if parameters:
                groups.append({"params": parameters, "lr": rate * ratio, "weight_decay": decay, "name": component})
    return groups


def is_output_side(name: str) -> bool:
    """Whether a parameter is the B factor of an update (LoRA's lora_B, NoRA's B')."""
    return "lora_B" in name or "nora_inner_B" in name


def scaled_learning_rate(config: TrainConfig, num_processes: int) -> float:
    """``--scale_lr``: the rate times the samples of an optimiser step, as in diffusers."""
    factor = config.train_batch_size * config.gradient_accumulation_steps * num_processes if config.scale_lr else 1
    return config.learning_rate * factor


def build_schedule(config: TrainConfig, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Advanced once an optimiser step."""
    return get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=config.lr_warmup_steps,
        num_training_steps=config.max_train_steps,
        num_cycles=config.lr_num_cycles,
        power=config.lr_power,
    )


class Average:
    """Exponential moving average of the trained parameters; does nothing where no decay is given.

    Its decay is ramped up from the first steps (diffusers' EMAModel), so that the start is forgotten.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float | None) -> None:
        self.parameters = list(parameters)
        self.ema = EMAModel(self.parameters, decay=decay) if decay is not None else None

    def step(self) -> None:
        if self.ema:
            self.ema.step(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the parameters are the average."""
        if self.ema is None:
            yield
            return
        self.ema.store(self.parameters)
        self.ema.copy_to(self.parameters)
        try:
            yield
        finally:
            self.ema.restore(self.parameters)

    def copy_to_parameters(self) -> None:
        if self.ema:
            self.ema.copy_to(self.parameters)

    def state_dict(self) -> dict[str, Any]:
        return self.ema.state_dict() if self.ema else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.ema:
            self.ema.load_state_dict(state)
            self.ema.to(self.parameters[0].device)  # accelerate reads it to the CPU
