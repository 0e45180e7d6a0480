"""Guards against runs that go on and learn nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn


class TrainingFailure(ValueError):
    """The run can't go on; says at which step and why."""


def check_loss(loss: float, step: int, mixed_precision: str, learning_rate: float) -> None:
    """Stop at a loss of NaN or infinity, before it reaches the weights.

    Raises:
        TrainingFailure: with the step and the likely cause.
    """
    if math.isfinite(loss):
        return
    cause = (
        "fp16 overflows with this base: use --mixed_precision bf16, or no"
        if mixed_precision == "fp16"
        else f"the learning rate {learning_rate:g} is likely too high: lower it"
    )
    raise TrainingFailure(f"the loss is {loss} at step {step}: {cause}; nothing after the last checkpoint was saved")


def gradient_norms(models: Mapping[str, nn.Module], mixed_precision: str) -> dict[str, float]:
    """Norm of the gradient of each component's adapter, at the first step.

    Raises:
        TrainingFailure: if a component that should learn gets no gradient; it would stay as it is, silently.
    """
    norms = {}
    for name, model in models.items():
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norms[name] = math.sqrt(sum(float(gradient.float().square().sum()) for gradient in gradients))
        if norms[name] == 0:
            raise TrainingFailure(
                f"{name} gets no gradient at the first step (mixed precision {mixed_precision}): nothing of it would "
                "be trained; leave it out, or report this as a bug"
            )
    return norms
