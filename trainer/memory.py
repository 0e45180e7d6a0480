"""How much memory a run takes: said before it takes it, and lowered where asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from dreambooth.prepare import Encoded
from methods.adapter import adapted_layers
from settings.training import TrainConfig

HALF = (torch.float16, torch.bfloat16)
OPTIMIZER_BYTES = 8  # two fp32 moments a parameter, as Adam keeps them
GRADIENT_BYTES = 4
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
        line += f"; {size(free)} are free" + ("" if total < free else ", which will not do: see --low_vram")
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


def size(count: int) -> str:
    """Bytes for people: 12 MB, 3.4 GB (powers of ten)."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def saved_activation_bytes(unet: UNet2DConditionModel, batch_size: int, shape: tuple[int, int], tokens: int) -> int:
    """What autograd keeps for the backward pass of one batch, on tensors without storage: nothing is computed.

    A base in half precision computes under autocast, as in the loop.
    """
    kept: dict[int, torch.Tensor] = {}  # by storage: several operations keep the same tensor

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    # LoHa and LoKr draw in training mode whether to drop a layer, which a tensor without storage can't decide
    deciding = [layer for layer in adapted_layers(unet).values() if layer.training]
    for layer in deciding:
        layer.training = False
    config = unet.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    # what a method keeps outside of buffers, such as FourierFT's places, is small and stays as it is
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        state = {name: mode.from_tensor(t) for name, t in (*unet.named_parameters(), *unet.named_buffers())}
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}
        dtype = unet.conv_in.weight.dtype
        options = {"device": unet.device, "dtype": dtype}
        conditioning = {
            "text_embeds": torch.empty(batch_size, pooled, **options),
            "time_ids": torch.empty(batch_size, 6, device=unet.device),
        }
        inputs = (
            torch.empty(batch_size, config.in_channels, *shape, **options),
            torch.zeros(batch_size, device=unet.device, dtype=torch.long),
            torch.empty(batch_size, tokens, config.cross_attention_dim, **options),
        )
        with (
            torch.autocast(unet.device.type, dtype, enabled=dtype in HALF, cache_enabled=False),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            # no ties: a module that several layers share would keep what has no storage
            functional_call(unet, state, inputs, {"added_cond_kwargs": conditioning}, tie_weights=False)
    for layer in deciding:
        layer.training = True
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)


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
