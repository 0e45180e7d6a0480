"""AdaLoRA (arXiv 2303.10512) on models that return no loss: PEFT's allocator and penalty, called by hand."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.adalora import AdaLoraConfig, SVDLinear
from torch import nn

from methods.adapter import NAME, Adapter, adapted_layers
from methods.update import Update

MEMORY = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # what the allocator remembers of earlier steps


class AdaLora(Adapter):
    """``W + alpha / r₀ B diag(E) A``; rank is taken where it matters least.

    PEFT adds the penalty in its model's forward, to a loss that a UNet doesn't return, and loses the allocator where
    diffusers injects; both are kept here.
    """

    def config(self, component: str) -> PeftConfig:
        options = {str(one.field): self.args[one.name] for one in self.method.options}
        options["lora_alpha"] = options["lora_alpha"] or self.args["init_rank"]
        return AdaLoraConfig(**options, total_step=self.total_steps, target_modules=self.places.targets(component))

    def check_fits(self, component: str, model: nn.Module) -> None:
        tinit, tfinal = self.args["tinit"], self.args["tfinal"]
        if tinit + tfinal >= self.total_steps:
            raise ValueError(
                f"tinit={tinit} and tfinal={tfinal} leave none of the {self.total_steps} steps to take rank away in: "
                "lower --method_args tinit or tfinal, or raise --max_train_steps"
            )
        super().check_fits(component, model)

    def check_layer(self, name: str, layer: nn.Linear) -> None:
        rank, side = self.args["init_rank"], min(layer.weight.shape)
        if rank > side:
            raise ValueError(f"--method_args init_rank={rank} exceeds min(out, in)={side} at {{layer}}: lower it")

    def penalty(self) -> torch.Tensor | None:
        """Mean of ‖A Aᵀ − I‖_F and ‖Bᵀ B − I‖_F over the layers, times its weight (Eq. 4)."""
        layers = [layer for model in self.models.values() for layer in adapted_layers(model).values()]
        products = [p for layer in layers for p in (_rows(layer.lora_A[NAME]), _rows(layer.lora_B[NAME].T))]
        eye = torch.eye(self.args["init_rank"], device=products[0].device)
        return self.args["orth_weight"] * torch.stack([torch.linalg.norm(p - eye) for p in products]).mean()

    def after_update(self, step: int) -> None:
        for wrapper in self.wrappers.values():
            learning = [parameter for parameter in wrapper.parameters() if parameter.requires_grad]
            if all(parameter.grad is None for parameter in learning):
                continue  # text encoders that learn no more
            for parameter in learning:  # CLIP's last layer is not used by SDXL, and PEFT wants a gradient of all
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            wrapper.base_model.update_and_allocate(step)

    def state_dict(self) -> dict[str, Any]:
        return {
            component: {name: getattr(wrapper.base_model.rankallocator, name) for name in MEMORY}
            | {"rank_pattern": wrapper.peft_config[NAME].rank_pattern}
            for component, wrapper in self.wrappers.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for component, remembered in state.items():
            wrapper = self.wrappers[component]
            wrapper.peft_config[NAME].rank_pattern = remembered["rank_pattern"]
            for name in MEMORY:
                setattr(wrapper.base_model.rankallocator, name, remembered[name])

    def layer_update(self, layer: SVDLinear) -> Update:
        return allocated_update(layer)


@torch.no_grad()
def allocated_update(layer: SVDLinear) -> Update:
    """The components that are left, E and the scale in ``up``; one that was taken away has E = 0."""
    A, B, E = (side[NAME].detach().float().cpu() for side in (layer.lora_A, layer.lora_B, layer.lora_E))
    left = E[:, 0] != 0
    if not bool(left.any()):  # a file needs a rank of at least 1
        return Update(B.new_zeros(len(B), 1), A.new_zeros(1, A.shape[1]))
    scale = layer.scaling[NAME] / (layer.ranknum[NAME].item() + 1e-5)  # as PEFT divides
    return Update(scale * B[:, left] * E[left, 0], A[left])


def _rows(factor: torch.Tensor) -> torch.Tensor:
    return factor @ factor.T
