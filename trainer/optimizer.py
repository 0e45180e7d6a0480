"""Optimizer, learning rates and schedule from the flags."""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn

from methods.adapter import Adapter
from settings.learning import OptimizerOptions

PRODIGY_LEAST = 0.1  # below it diffusers' script and kohya's warn
ADAM_MOST = 0.1  # of a rate that anybody uses for an adapter
# Arguments that every group of parameters sets for itself.
FLAGS = {
    "lr": "--learning_rate and --text_encoder_lr",
    "weight_decay": "--adam_weight_decay and --adam_weight_decay_text_encoder",
}


def optimizer_class(options: OptimizerOptions) -> type[torch.optim.Optimizer]:
    """The class that ``--optimizer`` and ``--use_8bit_adam`` name.

    Raises:
        ValueError: for an unknown name, or a package that is not installed.
    """
    name = options.optimizer
    if options.use_8bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise ValueError("--use_8bit_adam needs bitsandbytes: pip install bitsandbytes, or leave it out") from error
        return bitsandbytes.optim.AdamW8bit
    if options.is_prodigy:
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


def check_optimizer(options: OptimizerOptions, vectors: bool = False) -> Iterator[str]:
    """Refuse what can't be built or makes no step, before anything is loaded; yields what has no effect with it.

    Args:
        vectors: they are trained beside matrices.

    Raises:
        ValueError: for a class, or arguments of it, that are not there, contradict each other or don't work.
    """
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    shapes = [(2, 2), (2,)] if vectors else [(2, 2)]
    parameters = [nn.Parameter(torch.ones(shape, device=device)) for shape in shapes]
    optimizer = build_optimizer(options, [{"params": parameters, "weight_decay": options.adam_weight_decay}])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer.step()
    except Exception as error:  # a class may raise anything for an argument that it can't use
        raise ValueError(f"--optimizer {options.optimizer} fails with its --optimizer_args: {error!r}") from error
    if not all(bool(parameter.isfinite().all()) for parameter in parameters):
        raise ValueError(f"--optimizer {options.optimizer} makes NaN or infinity with its --optimizer_args")
    taken = {name for name, value in flag_arguments(options).items() if takes(optimizer_class(options), name, value)}
    for argument, flags in (("betas", ("adam_beta1", "adam_beta2")), ("eps", ("adam_epsilon",))):
        for flag in flags:
            if argument not in taken and getattr(options, flag) != OptimizerOptions.model_fields[flag].default:
                yield f"--{flag} has no effect with this --optimizer"


def takes(cls: type[torch.optim.Optimizer], argument: str, value: Any) -> bool:
    """Whether an optimizer has an argument of that kind: Adafactor's eps is a pair, which --adam_epsilon can't mean."""
    parameter = inspect.signature(cls).parameters.get(argument)
    return parameter is not None and isinstance(parameter.default, (type(value), type(None)))


def flag_arguments(options: OptimizerOptions) -> dict[str, Any]:
    """Arguments of optimizers that have a flag."""
    return {
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
        "beta3": options.prodigy_beta3,
        "decouple": options.prodigy_decouple,
        "use_bias_correction": options.prodigy_use_bias_correction,
        "safeguard_warmup": options.prodigy_safeguard_warmup,
    }


def build_optimizer(options: OptimizerOptions, groups: Sequence[dict[str, Any]]) -> torch.optim.Optimizer:
    """The optimizer over groups of `parameter_groups`, with the flags that its class has.

    Raises:
        ValueError: for arguments that the class does not take.
    """
    cls = optimizer_class(options)
    known = list(inspect.signature(cls).parameters)[1:]
    flags = {name: value for name, value in flag_arguments(options).items() if takes(cls, name, value)}
    given = parse_optimizer_args(options.optimizer_args)
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"--optimizer_args {unknown[0]}: {cls.__name__} takes {', '.join(known)}")
    if "weight_decay" not in known:
        groups = [{name: value for name, value in group.items() if name != "weight_decay"} for group in groups]
    try:
        return cls(list(groups), **({"lr": options.learning_rate} | flags | given))
    except Exception as error:  # as above
        raise ValueError(f"--optimizer {cls.__name__} refuses its arguments: {error}") from error


def parameter_groups(
    options: OptimizerOptions, text_encoder_lr: float, adapter: Adapter, models: Mapping[str, nn.Module]
) -> list[dict[str, Any]]:
    """Trainable parameters by component, by the method's factor on the rate, and by whether they decay.

    ``name`` is the component. Where weight decay would pull away from the base there is none.
    """
    groups = []
    for component, model in models.items():
        text = component != "unet"
        # Prodigy scales all groups by one estimate: it wants one learning rate, as diffusers gives it.
        rate = text_encoder_lr if text and not options.is_prodigy else options.learning_rate
        decay = options.adam_weight_decay_text_encoder if text else options.adam_weight_decay
        alike: dict[tuple[bool, float, bool], list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                key = is_output_side(name), adapter.rate(name), adapter.decays(name)
                alike.setdefault(key, []).append(parameter)
        for (_, factor, decays), parameters in sorted(alike.items(), key=lambda item: item[0][0]):
            options_of_group = {"lr": rate * factor, "weight_decay": decay if decays else 0.0, "name": component}
            groups.append({"params": parameters, **options_of_group})
    return groups


def is_output_side(name: str) -> bool:
    """Whether a parameter is the B factor of an update; checkpoints have these in a group of their own."""
    return "lora_B" in name or "nora_inner_B" in name


def scaled_learning_rate(options: OptimizerOptions, samples_per_step: int) -> float:
    """``--scale_lr``: the rate times the samples of an optimiser step, as in diffusers."""
    return options.learning_rate * (samples_per_step if options.scale_lr else 1)


def check_rates(options: OptimizerOptions, total_steps: int) -> Iterator[str]:
    """Warnings of learning rates at which nothing is learned, or all is lost.

    Args:
        options: the rate as it is in force.
        total_steps: of the run.

    Raises:
        ValueError: for a schedule that diffusers can't compute.
    """
    rate, warmup = options.learning_rate, options.lr_warmup_steps
    if options.is_prodigy and rate <= PRODIGY_LEAST:
        yield f"--learning_rate {rate:g} is too low for --optimizer prodigy, which finds the rate itself: use 1.0"
    if re.match("[rn]?adam", options.optimizer.lower()) and rate > ADAM_MOST:
        yield (
            f"--learning_rate {rate:g} is too high for --optimizer {options.optimizer}, which moves every weight by "
            "about that much a step: 1e-4 is usual, and 1.0 is Prodigy's"
        )
    if options.lr_scheduler == "polynomial" and warmup == total_steps:
        raise ValueError(
            f"--lr_warmup_steps {warmup} are all steps of the run, which --lr_scheduler polynomial can't end: lower it"
        )
    last = last_rate(options, total_steps)
    if options.lr_scheduler != "constant" and warmup >= total_steps:
        yield (
            f"--lr_warmup_steps {warmup} of a run of {total_steps} steps: the learning rate ends at {last:.2g} and "
            f"never reaches {rate:g}; lower it"
        )
    if options.lr_scheduler == "cosine_with_restarts" and options.lr_num_cycles * 2 > total_steps - warmup > 0:
        yield (
            f"--lr_num_cycles {options.lr_num_cycles} of the {total_steps - warmup} steps after the warm-up: a cycle "
            f"of less than two steps is none, and the learning rate ends at {last:.2g}; lower it"
        )


def last_rate(options: OptimizerOptions, total_steps: int) -> float:
    """The learning rate of a run's last step."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=options.learning_rate)
    schedule = build_schedule(options, optimizer, total_steps)
    return options.learning_rate * schedule.lr_lambdas[0](total_steps - 1)


def build_schedule(
    options: OptimizerOptions, optimizer: torch.optim.Optimizer, total_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Advanced once an optimiser step."""
    return get_scheduler(
        options.lr_scheduler,
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=total_steps,
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
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
