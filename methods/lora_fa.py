"""LoRA-FA (arXiv 2308.03303): A stays as it was drawn, and B's gradient is the best that A allows."""

from __future__ import annotations

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from methods.adapter import NAME, Adapter, Passes, adapted_layers


class LoraFa(Adapter):
    """``W + s B A``, A frozen; ``g_B (A Aᵀ)⁻¹ / s²`` in place of g_B: the update nearest to full fine-tuning's step.

    PEFT has this as an optimizer, which wants a `PeftModel` and replaces the one that was asked for; made of the
    gradients here, it goes with any optimizer.
    """

    def inject(self, component: str, model: nn.Module, passes: Passes) -> None:
        super().inject(component, model, passes)
        for layer in adapted_layers(model).values():
            layer.lora_A[NAME].requires_grad_(False)

    @torch.no_grad()
    def before_update(self) -> None:
        for model in self.models.values():
            for layer in adapted_layers(model).values():
                project_gradient(layer)


def project_gradient(layer: LoraLayer) -> None:
    """B's gradient (m, r) times ``(A Aᵀ)⁺ / s²`` (r, r), in float32."""
    A, B = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
    if B.grad is not None:
        inverse = torch.linalg.pinv(A.float() @ A.float().T, hermitian=True)
        B.grad.copy_(B.grad.float() @ inverse / layer.scaling[NAME] ** 2)
