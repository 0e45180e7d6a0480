"""The models' transformer blocks at work: what they keep for the backward pass, and compiled."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock, FeedForward
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from methods.memory import HALF
from settings.learning import COMPILE_PAYS, HardwareOptions, LoopOptions
from storage.text import first_line
from trainer.sharding import SplittingAccelerator

# --- what is kept for the backward pass -------------------------------------------------------------------------------


class GatedGelu(torch.autograd.Function):
    """``h · gelu(gate)`` (..., d) of the projection ``[h, gate]`` (..., 2 d), which alone is kept.

    Autograd would keep gelu(gate) too, a third of what a feed-forward layer keeps. Gradients are equal to the bit.
    """

    @staticmethod
    def forward(ctx, projected):
        ctx.save_for_backward(projected)
        hidden, gate = projected.chunk(2, dim=-1)
        return hidden * F.gelu(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (projected,) = ctx.saved_tensors
        hidden, gate = projected.chunk(2, dim=-1)
        grad_gate = torch.ops.aten.gelu_backward(grad * hidden, gate)
        return torch.cat([grad * F.gelu(gate), grad_gate], dim=-1)


class RecomputedGEGLU(GEGLU):
    """GEGLU (arXiv 2002.05202) whose activation is computed again in the backward pass; `proj` may be adapted."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return GatedGelu.apply(self.proj(hidden_states))  # type: ignore[no-any-return]


class CheckpointedFeedForward(FeedForward):
    """A feed-forward layer that keeps its input alone, and is computed again in the backward pass.

    The recomputation stops at the last kept tensor: of a frozen layer it costs the first projection, not the second.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return super().forward(hidden_states)
        return checkpoint(super().forward, hidden_states, use_reentrant=False)  # type: ignore[no-any-return]


class HalfLayerNorm(nn.LayerNorm):
    """A layer norm that autocast leaves alone where input and weights are in half precision.

    Autocast makes a float32 copy of the input, which is kept, and a float32 output, which every projection rounds
    again. Without it the statistics are in float32 all the same, the output is rounded once to the same half-precision
    number, and the input is kept as it is. Only the sum of the projections' gradients is rounded more often.
    """

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if hidden_states.dtype not in HALF or self.weight is None or self.weight.dtype != hidden_states.dtype:
            return super().forward(hidden_states)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return super().forward(hidden_states)


def keep_less(model: nn.Module, checkpointing: str) -> None:
    """Let a UNet's transformer blocks keep less for the backward pass; names of modules and weights stay.

    Args:
        checkpointing: "activation" or "feed_forward", as of ``--selective_checkpointing``; "none" changes nothing.
    """
    if checkpointing == "none":
        return
    smaller: dict[type[nn.Module], type[nn.Module]] = {nn.LayerNorm: HalfLayerNorm}
    if checkpointing == "activation":
        smaller[GEGLU] = RecomputedGEGLU
    else:
        smaller[FeedForward] = CheckpointedFeedForward
    for block in model.modules():
        if isinstance(block, BasicTransformerBlock):
            for module in block.modules():
                if type(module) in smaller:
                    module.__class__ = smaller[type(module)]  # the module itself stays, with adapters and hooks


# --- compiled ---------------------------------------------------------------------------------------------------------


def wants_compiled(
    hardware: HardwareOptions, loop: LoopOptions, accelerator: Accelerator, shape: tuple[int, int]
) -> bool:
    """Whether the blocks are compiled: as ``--compile`` says, or for auto where a run is long enough to gain by it.

    Auto counts the steps that the whole run has, so that a resumed run does as before.

    Args:
        shape: (h, w) of the largest latents.
    """
    if hardware.compile != "auto":
        return hardware.compile == "on"
    plain = hardware.quantize_base in (None, "none") and not isinstance(accelerator, SplittingAccelerator)
    pictures = (loop.max_train_steps or 0) * loop.samples_per_step(1)
    megapixels = shape[0] * shape[1] / 128**2  # an eighth of a side in latents
    return accelerator.device.type == "cuda" and plain and pictures * megapixels >= COMPILE_PAYS


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """The layers that a model repeats, by the names that diffusers (for regional compilation) and transformers give."""
    names = getattr(model, "_repeated_blocks", None) or model._no_split_modules
    found = [module for module in model.modules() if type(module).__name__ in names]
    times = Counter(map(type, found))
    return [module for module in found if times[type(module)] > 1]  # embeddings have such a name too


def compile_blocks(models: Mapping[str, nn.Module], backend: str = "inductor") -> None:
    """Compile the repeated blocks where they are trained, as diffusers' ``compile_repeated_blocks`` does.

    SDXL's 70 blocks share a graph for each width. Compilation happens in the first step. Where it fails, the block is
    computed as before, one warning says so, and the run goes on. Passes without gradients, such as samples and the
    validation loss, are never compiled: each of their shapes would cost a compilation. Names of weights don't change.
    """
    torch._functorch.config.force_non_lazy_backward_lowering = True  # a backward pass that can't be compiled fails here
    state = _Compilation()
    for model in models.values():
        for block in repeated_blocks(model):
            block.compile(backend=backend)
            block._compiled_call_impl = partial(state.call, block, block._compiled_call_impl)


class _Compilation:
    """What is compiled, and whether that failed once."""

    def __init__(self) -> None:
        self.failed = False
        self.works: set[nn.Module] = set()

    def call(self, block: nn.Module, compiled: Any, *args: Any, **kwargs: Any) -> Any:
        # a block that was compiled stays so: gradient checkpointing must compute it again as it did
        if not torch.is_grad_enabled() or (self.failed and block not in self.works):
            return block._call_impl(*args, **kwargs)
        try:
            output = compiled(*args, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except (TorchDynamoException, RuntimeError) as error:
            output = block._call_impl(*args, **kwargs)  # what is no matter of compiling is raised again by this
            if not self.failed:
                print(
                    f"warning: --compile: {first_line(error)}; the run goes on without compiling it",
                    file=sys.stderr,
                )
            self.failed = True
            block._compiled_call_impl = None
            return output
        self.works.add(block)
        return output
