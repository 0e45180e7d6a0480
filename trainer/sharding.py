"""The frozen UNet split over the processes with torch's FSDP2; what is trained stays whole in each of them.

accelerate's own FSDP does not fit an adapter: it takes one model only, splits the adapter too, writes the whole base
into every checkpoint, and passes itself over on a CPU. Here only what gets no gradient is split, and to accelerate the
run is DDP, so gradients, precision, optimizer, average, checkpoints and files are those of a run that splits nothing.

Text encoders that are trained stay whole: transformers looks up by class which hidden states it returns, and torch
gives what it splits another class.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers import UNet2DConditionModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from methods.adapter import NAME
from nora.model import nora_layers
from trainer.memory import size

# What accelerate's launcher may say of FSDP: each has one meaning here, and another one must not be passed over.
SETTINGS = {
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": None,  # what a model's _no_split_modules name, as in accelerate
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_OFFLOAD_PARAMS": "false",
    "FSDP_ACTIVATION_CHECKPOINTING": "false",  # --gradient_checkpointing does it
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


class SplittingAccelerator(Accelerator):
    """Prepares the models for DDP, then splits the UNet's frozen parameters; one process has nothing to split."""

    def __init__(self, **options: Any) -> None:
        os.environ.pop("ACCELERATE_USE_FSDP")  # what comes from here on would wrap, load or save in accelerate's way
        super().__init__(**options)

    def prepare_model(self, model: nn.Module, *args: Any, **options: Any) -> nn.Module:
        if self.num_processes == 1 or not isinstance(model, UNet2DConditionModel):
            return super().prepare_model(model, *args, **options)
        # Before it is split, because accelerate refuses to wrap a model that is.
        prepared = super().prepare_model(model, *args, **options)
        for layer in nora_layers(model, NAME).values():
            layer.hold_both_factors(NAME)  # a process that has a part of the weight can't compute its product alone
        frozen = split_frozen(model, self.device, self.num_processes)
        if self.is_main_process:
            whole, part = (sum(sizes) for sizes in zip(*((p.nbytes, p.to_local().nbytes) for p in frozen)))
            print(f"split over {self.num_processes} processes: this one holds {size(part)} of the UNet's {size(whole)}")
        return prepared


def accelerator_class(quantize_base: str = "none") -> type[Accelerator]:
    """The one that does what ``accelerate launch`` is configured for.

    Raises:
        ValueError: for DeepSpeed, for a setting of FSDP that has no meaning here, and for a base that can't be split.
    """
    if asked_for("DEEPSPEED"):
        raise ValueError(
            "accelerate is configured for DeepSpeed, which is not supported here: to split the frozen base, use "
            "configs/accelerate/fsdp.yaml"
        )
    if not asked_for("FSDP"):
        return Accelerator
    if quantize_base != "none":
        raise ValueError(
            f"--quantize_base {quantize_base} can't be split by FSDP: leave it out, or use configs/accelerate/gpus.yaml"
        )
    for name, wanted in SETTINGS.items():
        given = os.environ.get(name, wanted)
        if given != wanted:
            raise ValueError(
                f"accelerate is configured for {name.lower()} {given}, and only {wanted or 'its default'} is "
                "supported here: use configs/accelerate/fsdp.yaml"
            )
    return SplittingAccelerator


def share_frozen(model: nn.Module) -> None:
    """Make what is frozen the same in every process, so that DDP has only what is trained to share.

    The base is the same already, and a quantised one can't be sent. NoRA's outer factors, which are buffers, are sent
    here: unlike GPUs may turn those of near-equal singular values differently.
    """
    for buffer in model.buffers():
        broadcast(buffer)
    model._ddp_params_and_buffers_to_ignore = [
        name for name, parameter in model.named_parameters() if not parameter.requires_grad
    ]


def asked_for(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def split_frozen(model: UNet2DConditionModel, device: torch.device, num_processes: int) -> list[DTensor]:
    """Leave each process its part of the frozen parameters, which are returned; a block is whole while it computes."""
    options = {
        "mesh": init_device_mesh(device.type, (num_processes,)),
        "ignored_params": {parameter for parameter in model.parameters() if parameter.requires_grad},
    }
    for module in reversed(list(model.modules())):  # the inner ones first
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, **options)
    fully_shard(model, **options)
    return [parameter for parameter in model.parameters() if not parameter.requires_grad]
