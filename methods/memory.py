"""Memory of training, from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from methods.adapter import Places, adapted_layers

HALF = (torch.float16, torch.bfloat16)
OPTIMIZER_BYTES = 8  # two fp32 moments a parameter, as Adam keeps them
GRADIENT_BYTES = 4


class CudaAutocast(TorchFunctionMode):
    """Norms as CUDA's autocast computes them, in float32, where the CPU's leaves them alone.

    Only where autocast is on, so that `HalfLayerNorm` is as it is on a GPU.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (F.layer_norm, F.group_norm) and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
        return func(*args, **(kwargs or {}))


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


def recomputed_bytes(unet: UNet2DConditionModel, batch_size: int, shape: tuple[int, int]) -> int:
    """What is there for a moment under gradient checkpointing: the block that is computed again, with all it keeps.

    Of the transformer block with the most tokens: 48 bytes a channel and token in half precision
    (docs/performance.md), twice that in float32.
    """
    first = next(module for module in unet.modules() if isinstance(module, BasicTransformerBlock))
    levels = next(
        number for number, block in enumerate(unet.down_blocks) if getattr(block, "has_cross_attention", False)
    )
    tokens = (shape[0] >> levels) * (shape[1] >> levels)
    return 24 * unet.conv_in.weight.element_size() * first.norm1.normalized_shape[0] * tokens * batch_size


def training_bytes(
    models: Mapping[str, nn.Module],
    places: Places,
    *,
    resolution: int | None,
    batch_size: int,
    dtype: torch.dtype,
    tokens: int = 77,
    scale_factor: int = 8,
) -> int:
    """Bytes of the base's weights and of what autograd keeps on a GPU, without what an adapter trains or adds.

    What is kept is that of LoRA of rank 1 at these places: any method that keeps its layers' inputs keeps that much.

    Args:
        models: component -> module on the meta device, with the UNet; they are changed.
        resolution: pixels of a side; None: what the base was trained on.
        tokens: of a prompt.
        scale_factor: pixels of a latent's side.
    """
    unet = models["unet"].requires_grad_(False).to(dtype)
    side = resolution // scale_factor if resolution else unet.config.sample_size
    unet.add_adapter(LoraConfig(r=1, target_modules=places.targets("unet")))
    unet.to_empty(device="cpu")  # never touched, so never taken
    with CudaAutocast():
        kept = saved_activation_bytes(unet.train(), batch_size, (side, side), tokens)
    return kept + sum(p.numel() * dtype.itemsize for model in models.values() for p in model.parameters())
