"""A method at work in a run: its layers go into the models, learn, and become updates that files hold.

`Adapter` serves every method of PEFT by its own configuration; a method that needs more is a subclass that overrides
what differs. The trainer calls, in this order: `check_fits`, `inject` (or `restore`), then at each optimiser step
`before_step`, `penalty`, `before_update` and `after_update`.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import nn

from methods.components import TARGET_SETS
from methods.options import Method
from methods.registry import METHODS, find_method
from methods.update import Update, measured_update
from nora.files import BaseStatistics
from storage.tensors import write_safetensors

NAME = "default"  # of the adapter inside a model that is trained


def make_adapter(
    name: str, args: Mapping[str, Any], *, seed: int = 0, total_steps: int = 1, places: Places | None = None
) -> Adapter:
    """The method of that name with its options, as `registry.resolve` returns them.

    Args:
        places: None: the attention layers, all of one rank.
        seed: of what a step draws; the first weights come from torch's global generator.
        total_steps: optimiser steps of the run.
    """
    method = find_method(name)
    return find_class(method.adapter)(method, args, seed, total_steps, places or Places())


def find_class(path: str) -> Any:
    """``module:Class``, or the name of a class of PEFT's."""
    module, _, name = path.rpartition(":")
    return getattr(importlib.import_module(module) if module else peft, name)


@dataclass(frozen=True)
class Places:
    """Which layers are adapted, and which of them have a rank of their own.

    Args:
        where: a name of TARGET_SETS, or a regular expression for whole module paths.
        ranks: regular expression that a layer's path has somewhere -> its rank; the first that fits counts.

    Raises:
        ValueError: for an expression that can't be read.
    """

    where: str = "attention"
    ranks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for flag, pattern in [("--targets", self.where), *(("--rank_pattern", one) for one in self.ranks)]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{flag} {pattern} is no regular expression ({error})") from None

    @property
    def is_pattern(self) -> bool:
        return self.where not in TARGET_SETS

    def targets(self, component: str) -> list[str] | str:
        """For PEFT: ends of paths, or the expression."""
        return self.where if self.is_pattern else list(TARGET_SETS[self.where][component])

    def includes(self, component: str, path: str) -> bool:
        if self.is_pattern:
            return re.fullmatch(self.where, path) is not None
        ends = TARGET_SETS[self.where][component]
        return path in ends or path.endswith(tuple(f".{end}" for end in ends))

    def rank(self, path: str, default: int) -> int:
        return next((rank for pattern, rank in self.ranks.items() if re.search(pattern, path)), default)


class Passes(NamedTuple):
    """Forward passes of one component, in which a method may measure what its layers see.

    `of_run` makes so many over the run's own pictures or prompts, in all processes together; `of_base`, in each, those
    of the base alone, which have the name `label` and depend on `identity` beside the component.
    """

    of_run: Callable[[int], None]
    of_base: Callable[[], None]
    label: str
    identity: str


NO_PASSES = Passes(lambda passes: None, lambda: None, "", "")


class Adapter:
    """One method's layers in the components that are trained.

    Args:
        args: every option of the method with its value.
    """

    def __init__(
        self, method: Method, args: Mapping[str, Any], seed: int, total_steps: int, places: Places = Places()
    ) -> None:
        self.method, self.args, self.seed, self.total_steps = method, dict(args), seed, total_steps
        self.places = places
        self.models: dict[str, nn.Module] = {}  # component -> the model that the layers are in
        self.wrappers: dict[str, PeftModel] = {}  # PEFT's own view of the same models
        self.base_names: dict[str, set[str]] = {}  # parameters and buffers of the base, before there were layers

    # --- in ---------------------------------------------------------------------------------------------------------

    def config(self, component: str) -> PeftConfig:
        """PEFT's configuration for one component: unet, text_encoder or text_encoder_2."""
        options = {one.field: self.args[one.name] for one in self.method.options if one.field is not None}
        given = {name: value for name, value in options.items() if value is not None}
        fields = given | self.extra_fields() | self._patterns(component)
        return find_class(self.method.config)(target_modules=self.places.targets(component), **fields)

    def _patterns(self, component: str) -> dict[str, Any]:
        """Fields that give some layers another rank; their scale stays 1 where no alpha was asked for."""
        ranks = {f".*(?:{pattern}).*": rank for pattern, rank in self.places.ranks.items()}
        if not ranks:
            return {}
        alpha = self.method.option("alpha")
        if alpha is None or self.args["alpha"] is not None or self.method.name == "nora":
            return {"rank_pattern": ranks}  # NoRA's alpha is each layer's rank by itself
        return {"rank_pattern": ranks, "alpha_pattern": ranks}

    def extra_fields(self) -> dict[str, Any]:
        """Fields of the configuration that no option says alone."""
        alpha = self.method.option("alpha")
        if alpha is None or self.args["alpha"] is not None:
            return dict(self.method.fixed)
        return {str(alpha.field): self.args["rank"], **self.method.fixed}  # the scale alpha / rank is 1

    def check_fits(self, component: str, model: nn.Module) -> None:
        """Refuse what a layer can't hold, before anything is drawn, measured or written.

        Raises:
            ValueError: with the component, the layer and its limit.
        """
        if self.places.ranks and not self.method.ranks_by_layer:
            having = ", ".join(one.name for one in METHODS.values() if one.ranks_by_layer)
            raise ValueError(f"--rank_pattern: --method {self.method.name} has one rank for all layers; {having} don't")
        for name, layer in target_layers(component, model, self.places).items():
            try:
                self.check_layer(name, layer)
            except ValueError as error:
                raise ValueError(f"{component}: {str(error).format(layer=name)}") from error

    def check_layer(self, name: str, layer: nn.Linear) -> None:
        """Raise ValueError, with "{layer}" for its name, for a layer that can't be adapted."""
        side = min(layer.weight.shape)
        if self.method.low_rank and (rank := self.places.rank(name, self.args["rank"])) > side:
            raise ValueError(
                f"--rank {rank} exceeds min(out, in)={side} at {{layer}}, the most that an update of it "
                "can have: lower it"
            )

    def inject(self, component: str, model: nn.Module, passes: Passes) -> None:
        """Put the layers into the model, which computes what it did before: the update starts at 0.

        Args:
            passes: in which a method that measures something may do so.
        """
        self.wrap(component, model, self.config(component))

    def wrap(self, component: str, model: nn.Module, config: PeftConfig) -> None:
        self.models[component] = model
        self.base_names[component] = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}
        with warnings.catch_warnings():  # a rank may be for layers of another component: see `check_rank_patterns`
            warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match")
            self.wrappers[component] = get_peft_model(model, config, NAME)
        model._hf_peft_config_loaded = True  # diffusers and transformers ask for it before they touch an adapter

    def restore(
        self, models: Mapping[str, nn.Module], checkpoint: Path, passes: Callable[[str, nn.Module], Passes]
    ) -> None:
        """Put the layers of a checkpoint's run into the components; their numbers follow, see `state_tensors`.

        Args:
            passes: of each component, as for `inject`.
        """
        for component, model in models.items():
            self.inject(component, model, NO_PASSES)

    # --- training ---------------------------------------------------------------------------------------------------

    def rate(self, name: str) -> float:
        """Factor on the learning rate of a parameter, by its name (LoRA+, arXiv 2402.12354)."""
        return (self.args.get("lr_ratio") or 1.0) if "lora_B" in name else 1.0

    def decays(self, name: str) -> bool:
        """Whether weight decay pulls a parameter towards the base; where it doesn't, there is none."""
        return not any(part in name for part in self.method.not_decayed)

    def before_step(self, step: int) -> None:
        """What an optimiser step draws, before its forward passes; a function of (seed, step)."""

    def penalty(self) -> torch.Tensor | None:
        """What is added to the loss of each forward pass; None for most methods."""
        return None

    def before_update(self) -> None:
        """What is made of the gradients, once they are whole and clipped."""

    def after_update(self, step: int) -> None:
        """After ``step`` optimiser steps, while the gradients are there."""

    def state_tensors(self, component: str) -> dict[str, torch.Tensor]:
        """Parameters and buffers that came with the layers, frozen ones too: what a checkpoint holds of them."""
        model, base = self.models[component], self.base_names[component]
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        return {name: tensor for name, tensor in tensors.items() if name.replace(".base_layer.", ".") not in base}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs besides `state_tensors`."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    @property
    def measures_base(self) -> bool:
        """Whether it measures something of the base alone: `Passes.of_base`."""
        return False

    @property
    def base_statistics(self) -> BaseStatistics | None:
        """For `nora.read_inner`, where this adapter's own file leaves the base's statistics out."""
        return None

    # --- out --------------------------------------------------------------------------------------------------------

    def updates(self, component: str) -> Iterator[tuple[str, Update]]:
        """(module path, what its layer adds) in float32 on the CPU, one layer at a time."""
        for name, layer in adapted_layers(self.models[component]).items():
            yield name, self.layer_update(layer)

    @torch.no_grad()
    def layer_update(self, layer: Any) -> Update:
        """``s B A`` of a LoRA layer; of any other what can be read off its outputs."""
        if self.method.low_rank and isinstance(layer, LoraLayer):
            up, down = (side[NAME].weight.detach().float().cpu() for side in (layer.lora_B, layer.lora_A))
            return Update(layer.scaling[NAME] * up, down)
        alone = copy.deepcopy(layer).eval().float().cpu()
        return measured_update(alone, alone.get_base_layer())

    def save_peft(self, component: str, folder: Path) -> None:
        """Write PEFT's adapter_config.json and adapter_model.safetensors."""
        self.wrappers[component].save_pretrained(str(folder))
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card

    def save_more(self, folder: Path) -> list[str]:
        """Write files of a kind that only this method has; returns their names."""
        return []


class RandLora(Adapter):
    """PEFT's RandLoRA, whose scale grows with the rank of the random pairs."""

    def extra_fields(self) -> dict[str, Any]:
        return {} if self.args["alpha"] is not None else {"randlora_alpha": 20 * self.args["rank"]}

    def save_peft(self, component: str, folder: Path) -> None:
        """With the shared random pair once; PEFT writes it for every layer, 4 GB for SDXL."""
        super().save_peft(component, folder)
        path = folder / SAFETENSORS_WEIGHTS_NAME
        shared = re.compile(r".*(?<!^base_model)\.randlora_[AB]$")
        write_safetensors(path, {key: one for key, one in load_file(path).items() if not shared.match(key)})


class Oft(Adapter):
    """PEFT's OFT; its default block side is given as an argument, because PEFT refuses files that don't say it."""

    def check_layer(self, name: str, layer: nn.Linear) -> None:
        size, n = self.args["block_size"], layer.weight.shape[1]
        if n % size:
            raise ValueError(f"--method_args block_size={size} does not divide the {n} inputs of {{layer}}: lower it")


class Hra(Adapter):
    """PEFT's HRA."""

    def check_layer(self, name: str, layer: nn.Linear) -> None:
        rank, n = self.args["rank"], layer.weight.shape[1]
        if rank > n:
            raise ValueError(f"--rank {rank} exceeds the {n} inputs of {{layer}}, which is all there is to reflect")


class FourierFt(Adapter):
    """PEFT's FourierFT."""

    def check_layer(self, name: str, layer: nn.Linear) -> None:
        count, size = self.args["n_frequency"], math.prod(layer.weight.shape)
        if count > size:
            raise ValueError(f"--method_args n_frequency={count} exceeds the {size} entries of {{layer}}: lower it")


# --- layers -----------------------------------------------------------------------------------------------


def target_layers(component: str, model: nn.Module, places: Places) -> dict[str, nn.Linear]:
    """The layers that a component's adapter goes into, before it does.

    Raises:
        ValueError: if the targets are a pattern that fits none of them, or something that is no linear layer.
    """
    modules = {name: module for name, module in model.named_modules() if places.includes(component, name)}
    if places.is_pattern:
        linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        others = [name for name, module in modules.items() if not isinstance(module, nn.Linear)]
        if others:
            raise ValueError(
                f"--targets {places.where} fits {others[0]}, which is no linear layer: let it end as the layers do, "
                f"such as {linear[-1]}"
            )
        if not modules:
            near = difflib.get_close_matches(places.where, linear, 3, 0) or linear[:3]
            raise ValueError(
                f"--targets {places.where} fits no layer of {component}: it is {', '.join(TARGET_SETS)} or a regular "
                f"expression for whole paths, such as {', '.join(near)}"
            )
    return modules


def check_rank_patterns(models: Mapping[str, nn.Module], places: Places) -> None:
    """Refuse a rank for layers that no component has.

    Raises:
        ValueError: with what the adapted layers are called.
    """
    paths = [path for component, model in models.items() for path in target_layers(component, model, places)]
    for pattern in places.ranks:
        if not any(re.search(pattern, path) for path in paths):
            near = ", ".join(difflib.get_close_matches(pattern, paths, 3, 0))
            raise ValueError(f"--rank_pattern {pattern} fits no adapted layer: their paths are such as {near}")


def adapted_layers(model: nn.Module) -> dict[str, BaseTunerLayer]:
    """The outermost layers of adapters, by module path."""
    found: dict[str, BaseTunerLayer] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = layer
    return found


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The base model, as it was before the adapter; what learns and what is frozen is the same afterwards."""
    layers = list(adapted_layers(model).values())
    learning = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, learns in learning.items():  # PEFT lets everything of an adapter learn again, frozen factors too
            parameter.requires_grad_(learns)
