"""What an adapter adds to one of SDXL's transformer blocks: time, and what autograd keeps, over the frozen block.

    OMP_NUM_THREADS=1 python -m benchmarks.block
    OMP_NUM_THREADS=1 python -m benchmarks.block --checkpointing

The block is 1280 wide, with 1024 tokens and a context of 77 x 2048; forward and backward, fp32. All take turns in
random order; medians of the process's CPU time against the frozen block's of the same turn are compared. Measure on
idle cores: beside other work the differences drown.
"""

from __future__ import annotations

import inference  # noqa: F401 -- before the libraries, because it quietens what they print on import

# isort: split
import argparse
import copy
import random
import statistics
import time
from collections.abc import Mapping, Sequence

import torch
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig, PeftConfig, inject_adapter_in_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from methods.components import TARGETS
from nora import NoraConfig
from trainer.blocks import keep_less

WIDTH, CONTEXT, HEADS = 1280, 2048, 20
Inputs = tuple[torch.Tensor, torch.Tensor]  # hidden states (1, tokens, WIDTH), context (1, 77, CONTEXT)


def build_block() -> nn.Module:
    torch.manual_seed(0)
    block = BasicTransformerBlock(WIDTH, HEADS, WIDTH // HEADS, cross_attention_dim=CONTEXT)
    return block.requires_grad_(False)


def make_inputs(tokens: int = 1024) -> Inputs:
    return torch.randn(1, tokens, WIDTH), torch.randn(1, 77, CONTEXT)


def adapted(block: nn.Module, config: PeftConfig) -> nn.Module:
    block = copy.deepcopy(block)
    inject_adapter_in_model(config, block)
    return block


def variants(block: nn.Module) -> dict[str, nn.Module]:
    targets = list(TARGETS["unet"])
    found = {"frozen": block}
    for rank in (4, 16):
        found[f"LoRA {rank}"] = adapted(block, LoraConfig(r=rank, lora_alpha=rank, target_modules=targets))
    for outer_r, r in ((128, 16), (64, 32), (64, 8)):
        config = NoraConfig(r=r, outer_r=outer_r, target_modules=targets, outer_init="svd")
        found[f"NoRA ({outer_r}, {r})"] = adapted(block, config)
    return found


class Checkpointed(nn.Module):
    """A block that is computed again as a whole, as diffusers' gradient checkpointing does."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: torch.Tensor, encoder_hidden_states: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.block, hidden, encoder_hidden_states=encoder_hidden_states, use_reentrant=False)


def checkpointing_variants(block: nn.Module) -> dict[str, nn.Module]:
    """The frozen block, and NoRA in one that keeps less."""
    nora = variants(block)["NoRA (128, 16)"]
    found = {"frozen": block, "NoRA (128, 16)": nora}
    for name in ("activation", "feed_forward"):
        found[f"selective_checkpointing {name}"] = smaller = copy.deepcopy(nora)
        keep_less(smaller, name)
    return found | {"gradient_checkpointing": Checkpointed(copy.deepcopy(nora))}


def step(block: nn.Module, inputs: Inputs) -> torch.Tensor:
    return block(inputs[0].detach().requires_grad_(), encoder_hidden_states=inputs[1])


def step_seconds(block: nn.Module, inputs: Inputs) -> float:
    """CPU seconds of a forward and a backward pass; the block's input gets a gradient, as inside a UNet."""
    start = time.process_time()
    step(block, inputs).sum().backward()
    return time.process_time() - start


def kept_bytes(block: nn.Module, inputs: Inputs) -> int:
    """Bytes that autograd keeps for the backward pass beside the block's weights and buffers."""
    frozen = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), *block.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in frozen:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = step(block, inputs)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    return total


def compare(blocks: Mapping[str, nn.Module], inputs: Inputs, repeats: int) -> dict[str, tuple[float, float]]:
    """Name -> (seconds, kept bytes) as multiples of the first one's, the frozen block's.

    The median of each repeat's own ratio, in which all took their turns in random order: a machine's speed drifts by
    more than an adapter costs.
    """
    first, *_ = names = list(blocks)
    ratios: dict[str, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for repeat in range(repeats + 1):
        turns = order.sample(names, len(names))
        seconds = {name: step_seconds(blocks[name], inputs) for name in turns}
        if repeat:  # the first is for warming up
            for name in names:
                ratios[name].append(seconds[name] / seconds[first])
    kept = {name: kept_bytes(block, inputs) for name, block in blocks.items()}
    return {name: (statistics.median(ratios[name]), kept[name] / kept[first]) for name in names}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--checkpointing", action="store_true", help="What the ways to keep less cost, instead.")
    args = parser.parse_args(argv)
    inputs = make_inputs(args.tokens)
    if args.checkpointing:
        found = compare(checkpointing_variants(build_block()), inputs, args.repeats)
        print("| | time | kept |\n|---|---|---|")
        for name, (seconds, kept) in found.items():
            print(f"| {name} | {seconds:.3f} | {kept:.3f} |")
        return
    found = compare(variants(build_block()), inputs, args.repeats)
    lora = found["LoRA 16"][0] - 1
    print("| | time | overhead, of LoRA 16's | kept |\n|---|---|---|---|")
    for name, (seconds, kept) in found.items():
        print(f"| {name} | {seconds:.3f} | {(seconds - 1) / lora:.2f} | {kept:.3f} |")


if __name__ == "__main__":
    main()
