"""NoRA in a run: AwSVD measures what its layers see before they go in; the inner factors have a file of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from peft import get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from methods.adapter import NAME, Adapter, Passes, target_layers
from methods.base_statistic import base_statistic, from_first_process
from methods.basis_cache import basis_cache
from methods.components import INNER_WEIGHTS, adapter_components
from methods.update import Update
from nora import (
    NoraConfig,
    NoraLinear,
    check_targets,
    load_inner,
    preprocess_nora,
    save_inner,
    split_over_processes,
)
from nora.files import BaseStatistics
from nora.model import nora_layers
from storage.tensors import write_safetensors


class Nora(Adapter):
    """``W + s B B' A' A`` (arXiv 2408.10280)."""

    label: str | None = None  # of the passes that measured the base's statistic

    def check_fits(self, component: str, model: nn.Module) -> None:
        target_layers(component, model, self.places)  # says more than the library of a pattern that fits nothing
        try:
            check_targets(model, self.config(component))
        except ValueError as error:
            raise ValueError(f"{component}: {error} (r is --rank, outer_r is --outer_rank)") from error
        super().check_fits(component, model)

    def extra_fields(self) -> dict:
        return dict(self.method.fixed)  # its alpha is the rank by itself

    @basis_cache()
    def inject(self, component: str, model: nn.Module, passes: Passes) -> None:
        config = self.config(component)
        if config.needs_statistics and self.measures_base:
            self.label = passes.label
            preprocess_nora(model, config, stats=self._base_statistic(model, config, passes))
        elif config.needs_statistics:
            preprocess_nora(model, config, lambda: passes.of_run(self.args["calibration_passes"]))
        with split_over_processes():
            self.wrap(component, model, config)

    @property
    def measures_base(self) -> bool:
        """Whether AwSVD's statistic is the base's, the same for every run on it, or the run's own."""
        return (
            self.args.get("statistic") == "base" and self.args["outer_init"] == "awsvd"
        )  # methods that measure nothing have no such option

    @basis_cache()
    def restore(
        self, models: Mapping[str, nn.Module], checkpoint: Path, passes: Callable[[str, nn.Module], Passes]
    ) -> None:
        """The outer factors come from the statistics in the file, or from the base's own."""

        def base(label: str, prefix: str, model: nn.Module, config: NoraConfig) -> dict[str, torch.Tensor]:
            own = passes(prefix.removesuffix(".text_model"), model)
            self.label = label
            return self._base_statistic(model, config, own)

        with split_over_processes():
            load_inner(checkpoint / INNER_WEIGHTS, adapter_components(models), base_statistics=base)
        self.models.update(models)

    def _base_statistic(self, model: nn.Module, config: NoraConfig, passes: Passes) -> dict[str, torch.Tensor]:
        return from_first_process(partial(base_statistic, model, config, passes.label, passes.identity, passes.of_base))

    @property
    def base_statistics(self) -> BaseStatistics:
        """Those that the layers were made of."""

        def held(label: str, prefix: str, model: nn.Module, config: NoraConfig) -> dict[str, torch.Tensor]:
            return {name: layer.basis(NAME).statistic for name, layer in nora_layers(model, NAME).items()}

        return held

    def state_tensors(self, component: str) -> dict[str, torch.Tensor]:
        """The inner factors; the outer ones come with the inner-only file."""
        return {name: p for name, p in self.models[component].named_parameters() if p.requires_grad}

    def outer_ranks(self) -> list[int]:
        """The distinct outer ranks that the layers got."""
        layers = [layer for model in self.models.values() for layer in nora_layers(model, NAME).values()]
        return sorted({layer.outer_rank(NAME) for layer in layers})

    def rate(self, name: str) -> float:
        return (self.args.get("lr_ratio") or 1.0) if "nora_inner_B" in name else 1.0

    def decays(self, name: str) -> bool:
        """Not where 0 is no start: the update is the deviation from one."""
        return not any(model.peft_config[NAME].has_residual for model in self.models.values()) and super().decays(name)

    @torch.no_grad()
    def layer_update(self, layer: NoraLinear) -> Update:
        down, up = layer.fold(NAME)
        return Update(up, down)

    def save_more(self, folder: Path) -> list[str]:
        label = self.label if self.measures_base else None
        save_inner(folder / INNER_WEIGHTS, adapter_components(self.models), base_statistic=label)
        return [INNER_WEIGHTS]

    def save_peft(self, component: str, folder: Path) -> None:
        model = self.models[component]
        state = {f"base_model.model.{key}": value for key, value in get_peft_model_state_dict(model).items()}
        write_safetensors(folder / SAFETENSORS_WEIGHTS_NAME, state, {"format": "pt"})
        model.peft_config[NAME].save_pretrained(folder)
