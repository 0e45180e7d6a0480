"""LoRA's two factors made of something else: PiSSA and OLoRA, MoSLoRA, DyLoRA.

Each is PEFT's LoRA layer whose factors are computed from what is trained (torch's parametrizations), so that scaling,
taking off, merging and files are those of a LoRA.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from methods.adapter import NAME, Adapter, Passes, adapted_layers
from methods.peft_folder import write_lora_folder
from methods.update import Update


class Factored(Adapter):
    """A method whose layers are LoRA's with other factors; its PEFT folder is a plain LoRA's."""

    def inject(self, component: str, model: nn.Module, passes: Passes) -> None:
        super().inject(component, model, passes)
        for layer in adapted_layers(model).values():
            self.parametrize(layer)

    def parametrize(self, layer: LoraLayer) -> None:
        raise NotImplementedError

    def save_peft(self, component: str, folder: Path) -> None:
        write_lora_folder(folder, dict(self.updates(component)))


# --- PiSSA, OLoRA -----------------------------------------------------------------------------------------------------


class Beside(nn.Module):
    """What is trained (r, ·), with a frozen part of the same size behind it: (2r, ·), or the same by columns."""

    def __init__(self, frozen: torch.Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("frozen", frozen)

    def forward(self, trained: torch.Tensor) -> torch.Tensor:
        return torch.cat([trained, self.frozen.to(trained.dtype)], self.dim)

    def right_inverse(self, whole: torch.Tensor) -> torch.Tensor:
        return whole.narrow(self.dim, 0, self.frozen.shape[self.dim]).clone()


class Started(Factored):
    """LoRA from a decomposition of W: ``W + s (B A − B₀ A₀)`` (PiSSA arXiv 2404.02948, OLoRA arXiv 2406.01775).

    Deviation: both write ``W − s B₀ A₀`` into the base. The map and its gradients are the same with that part beside
    A and B, and the base keeps its bits: at scale 0, for a teacher, and for the next adapter.
    """

    @property
    def alpha(self) -> float:
        return self.args["alpha"] or self.args["rank"]

    def config(self, component: str) -> LoraConfig:
        """Of LoRA layers with room for the frozen part: twice the rank, at the same scale alpha / rank."""
        return LoraConfig(
            r=2 * self.args["rank"],
            lora_alpha=2 * self.alpha,
            lora_dropout=self.args["dropout"],
            target_modules=self.places.targets(component),
        )

    def parametrize(self, layer: LoraLayer) -> None:
        A, B = self.start(layer)
        for side, factor, frozen, dim in ((layer.lora_A, A, A, 0), (layer.lora_B, B, -B, 1)):
            linear = side[NAME]
            linear.weight.data = torch.cat([factor, frozen], dim).to(linear.weight)
            register_parametrization(linear, "weight", Beside(frozen.to(linear.weight), dim), unsafe=True)

    def start(self, layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """A₀ (r, n) and B₀ (m, r), as PEFT computes them, from a copy of the base layer that it may write to."""
        alone = nn.ModuleDict({"layer": copy.deepcopy(layer.get_base_layer())})
        config = LoraConfig(
            r=self.args["rank"],
            lora_alpha=self.alpha,
            init_lora_weights=self.method.fixed["init_lora_weights"],
            target_modules=["layer"],
        )
        inject_adapter_in_model(config, alone, NAME)
        found = alone["layer"]
        return found.lora_A[NAME].weight.detach(), found.lora_B[NAME].weight.detach()


# --- MoSLoRA ----------------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """``A ↦ M A`` with a trained mixer M (r, r)."""

    def __init__(self, rank: int, like: torch.Tensor, init: str) -> None:
        super().__init__()
        self.mixer = nn.Parameter(torch.empty(rank, rank, dtype=like.dtype))
        if init == "orthogonal":
            nn.init.orthogonal_(self.mixer)
        else:
            nn.init.kaiming_uniform_(self.mixer, a=math.sqrt(5))
        self.mixer.data = self.mixer.data.to(like.device)

    def forward(self, A: torch.Tensor) -> torch.Tensor:
        return self.mixer @ A


class MoSLora(Factored):
    """``W + s B M A`` (arXiv 2406.11909). Its kaiming M makes the first A smaller by √(1/3); orthogonal is neutral."""

    def parametrize(self, layer: LoraLayer) -> None:
        linear = layer.lora_A[NAME]
        mixed = Mixed(self.args["rank"], linear.weight, self.args["mixer_init"])
        register_parametrization(linear, "weight", mixed)


# --- DyLoRA -----------------------------------------------------------------------------------------------------------


class First(nn.Module):
    """The first ``count`` rows (dim 0) or columns (dim 1) of a factor, zeros in place of the others; None: all.

    Args:
        frozen: gradients reach the last of them alone.
        scaled: the factor also brings the scale from alpha / r to alpha / count.
    """

    def __init__(self, dim: int, frozen: bool, scaled: bool) -> None:
        super().__init__()
        self.dim, self.frozen, self.scaled = dim, frozen, scaled
        self.count: int | None = None

    def forward(self, factor: torch.Tensor) -> torch.Tensor:
        if self.count is None:
            return factor
        rank = factor.shape[self.dim]
        before, last, after = factor.split([self.count - 1, 1, rank - self.count], self.dim)
        if self.frozen:
            before = before.detach()
        scale = rank / self.count if self.scaled else 1.0
        return torch.cat([scale * before, scale * last, torch.zeros_like(after)], self.dim)


class DyLora(Factored):
    """``W + alpha / q B_q A_q`` with q ~ U{1..r} drawn each step, the same in all layers (arXiv 2210.07558).

    As in its authors' code the effective scale is alpha / q in training and at test, and (``frozen``) a step trains
    component q alone.
    """

    def parametrize(self, layer: LoraLayer) -> None:
        for side, dim, scaled in ((layer.lora_A, 0, True), (layer.lora_B, 1, False)):
            register_parametrization(side[NAME], "weight", First(dim, self.args["frozen"], scaled))

    def before_step(self, step: int) -> None:
        self.use(random.Random(f"{self.seed} {step}").randint(1, self.args["rank"]))

    def after_update(self, step: int) -> None:
        self.use(None)  # whoever looks at the model sees all of it

    def use(self, count: int | None) -> None:
        for model in self.models.values():
            for module in model.modules():
                if isinstance(module, First):
                    module.count = count

    def updates(self, component: str) -> Iterator[tuple[str, Update]]:
        rank = self.args["save_rank"] or self.args["rank"]
        for name, update in super().updates(component):
            scale = self.args["rank"] / rank
            yield name, Update(scale * update.up[:, :rank], update.down[:rank])
