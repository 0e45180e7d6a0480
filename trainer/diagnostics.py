"""Guards against runs that go on and learn nothing."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch import nn

from dreambooth.batches import PromptEmbedder
from dreambooth.draws import Batch


class TrainingFailure(ValueError):
    """The run can't go on; says at which step and why."""


@contextmanager
def explained(train_batch_size: int, output_dir: str) -> Iterator[None]:
    """Memory or a disk that runs out inside, as one sentence with the way out.

    Raises:
        ValueError: with it.
    """
    try:
        yield
    except RuntimeError as error:  # PyTorch has a class for a GPU's memory, and none for the machine's
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise ValueError(
            f"out of memory with --train_batch_size {train_batch_size}: lower it, add --selective_checkpointing "
            "feed_forward, --gradient_checkpointing or --vram auto, or use --mixed_precision fp16"
        ) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ValueError(f"the disk is full ({error}): make room for --output_dir {output_dir}") from error


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


class GradientWatch:
    """Looks at each component's gradient once, at the first step that must have one.

    The text encoders get none at a step whose prompts were all dropped, or without the word that they learn.
    """

    def __init__(self, models: Mapping[str, nn.Module], mixed_precision: str) -> None:
        self.unseen, self.mixed_precision = dict(models), mixed_precision

    def look(
        self, accelerator: Accelerator, step: int, embedder: PromptEmbedder, batch: Batch, num_instances: int
    ) -> None:
        """Log the norms that are new at a step, counted from 0, while its gradients are there."""
        if not self.unseen:
            return
        teaches_text = embedder.learns(step) and embedder.encoded.teaches_text(batch, num_instances)
        scale = accelerator.scaler.get_scale() if accelerator.scaler else 1
        norms = self.norms(teaches_text).items()
        accelerator.log({f"gradient_norm/{name}": norm / scale for name, norm in norms}, step=step + 1)

    def norms(self, teaches_text: bool) -> dict[str, float]:
        """Of the components whose turn it is: `gradient_norms`, with its error."""
        due = {name: model for name, model in self.unseen.items() if name == "unet" or teaches_text}
        self.unseen = {name: model for name, model in self.unseen.items() if name not in due}
        return gradient_norms(due, self.mixed_precision)


def gradient_norms(models: Mapping[str, nn.Module], mixed_precision: str) -> dict[str, float]:
    """Norm of the gradient of each component's adapter.

    Raises:
        TrainingFailure: if a component that should learn gets no gradient; it would stay as it is, silently.
    """
    norms = {}
    for name, model in models.items():
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        norms[name] = math.sqrt(sum(float(gradient.float().square().sum()) for gradient in gradients))
        if norms[name] == 0:
            raise TrainingFailure(
                f"{name} gets no gradient at its first step (mixed precision {mixed_precision}): nothing of it would "
                "be trained; leave it out, or report this as a bug"
            )
    return norms
