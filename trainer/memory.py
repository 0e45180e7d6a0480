"""How much memory a run takes: said before it takes it, and lowered where asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from diffusers.training_utils import free_memory
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn

from dreambooth.prepare import Encoded
from methods.memory import GRADIENT_BYTES, OPTIMIZER_BYTES, saved_activation_bytes
from settings.learning import HardwareOptions
from settings.training import TrainConfig

ADAPTER_PARTS = tuple(f"{prefix}" for prefix in PEFT_TYPE_TO_PREFIX_MAPPING.values())


def memory_line(
    trained: Mapping[str, nn.Module],
    batch_size: int,
    shape: tuple[int, int],
    tokens: int,
    device: torch.device,
    quantize_base: str = "none",
) -> str:
    """One sentence: what the run will hold, and what the device has free.

    Args:
        trained: before its frozen part is quantised.
        batch_size: samples of one forward pass.
        shape: (h, w) of the largest latents.
        tokens: length of a prompt.
    """
    weights = sum(tensor.nbytes for model in trained.values() for tensor in (*model.parameters(), *model.buffers()))
    if quantize_base == "int8":
        weights -= sum(
            module.weight.nbytes - module.weight.numel()
            for model in trained.values()
            for name, module in model.named_modules()
            if is_quantized(module, name)
        )
    parameters = sum(p.numel() for model in trained.values() for p in model.parameters() if p.requires_grad)
    learning = parameters * (OPTIMIZER_BYTES + GRADIENT_BYTES)
    activations = saved_activation_bytes(trained["unet"], batch_size, shape, tokens)
    total = weights + learning + activations
    line = (
        f"memory: about {size(total)} ({size(weights)} weights, {size(learning)} gradients and optimizer, "
        f"{size(activations)} activations of {batch_size} samples)"
    )
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_allocated(device)  # the weights are there already
        line += f"; {size(free)} are free" + ("" if total < free else ", which will not do: see --vram")
    return line


def settle_memory(
    models: Mapping[str, nn.Module], encoded: Encoded, config: TrainConfig, accelerator: Accelerator
) -> None:
    """Say what the run will hold, then keep the frozen base in 8 bits if asked to."""
    quantized = config.hardware.quantize_base or "none"
    if accelerator.is_main_process:
        samples = config.loop.train_batch_size * (2 if config.prior.with_prior_preservation else 1)
        largest = encoded.largest_shape, encoded.prompt_length
        print(memory_line(models, samples, *largest, accelerator.device, quantized))
    if quantized == "int8":
        for model in models.values():
            quantize_frozen(model)


@contextmanager
def out_of_the_way(model: nn.Module, hardware: HardwareOptions) -> Iterator[None]:
    """A model waits in main memory where memory is short: a card of 8 GB doesn't hold the UNet beside what encodes."""
    device = next(model.parameters()).device
    waits = device.type == "cuda" and hardware.vram is not None
    if waits:
        model.to("cpu")
        free_memory()
    yield
    if waits:
        model.to(device)


def size(count: int) -> str:
    """Bytes for people: 12 MB, 3.4 GB (powers of ten)."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def import_torchao() -> tuple[Callable, type]:
    """Raises ValueError if it is not installed."""
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ValueError("--quantize_base int8 needs torchao: pip install torchao, or leave it out") from error
    return quantize_, Int8WeightOnlyConfig


def quantize_frozen(model: nn.Module) -> None:
    """Keep the frozen linear layers' weights in 8 bits; they are read back to their dtype when they are used.

    After the adapter is in: NoRA's outer factors come from the whole weights.

    Raises:
        ValueError: if torchao is not installed.
    """
    quantize_, Int8WeightOnlyConfig = import_torchao()
    quantize_(
        model,
        Int8WeightOnlyConfig(),
        filter_fn=is_quantized,
    )


def is_quantized(module: nn.Module, name: str) -> bool:
    """Whether it is one of the base's own layers, and no method's frozen factor."""
    own = name.endswith("base_layer") or not any(part in name for part in ADAPTER_PARTS)
    return isinstance(module, nn.Linear) and not module.weight.requires_grad and own
