"""What transformer blocks keep for the backward pass, and blocks that are compiled."""

import copy

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from trainer.blocks import GatedGelu, HalfLayerNorm, keep_less

FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]


def make_block(dtype=torch.float32, targets=("to_q", "to_k", "to_v", "to_out.0")):
    torch.manual_seed(0)
    block = BasicTransformerBlock(32, 2, 16, cross_attention_dim=24).requires_grad_(False).to(dtype)
    inject_adapter_in_model(LoraConfig(r=4, init_lora_weights=False, target_modules=list(targets)), block)
    for parameter in block.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return block


def gradients(block, dtype=torch.float32):
    """Output, input's gradient and the adapter's; and the bytes that were kept beside weights."""
    torch.manual_seed(1)
    hidden = torch.randn(2, 10, 32, dtype=dtype).requires_grad_()
    context = torch.randn(2, 5, 24, dtype=dtype)
    own = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(hidden, encoder_hidden_states=context)
    size = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    output.float().square().sum().backward()
    found = [output.detach(), hidden.grad, *(p.grad for p in block.parameters() if p.requires_grad)]
    block.zero_grad()
    return found, size


def test_gated_gelu_is_autograds_to_the_bit():
    torch.manual_seed(0)
    projected = torch.randn(3, 5, 12).requires_grad_()
    hidden, gate = projected.chunk(2, dim=-1)
    plain = hidden * nn.functional.gelu(gate)
    weights = torch.randn_like(plain)
    (expected,) = torch.autograd.grad(plain, projected, weights)
    (found,) = torch.autograd.grad(GatedGelu.apply(projected), projected, weights)
    assert torch.equal(GatedGelu.apply(projected), plain) and torch.equal(found, expected)
    assert torch.autograd.gradcheck(GatedGelu.apply, projected.detach().double().requires_grad_())


@pytest.mark.parametrize("targets", [("to_q", "to_k", "to_v", "to_out.0"), FEED_FORWARD], ids=["attention", "mlp"])
@pytest.mark.parametrize(("checkpointing", "less"), [("activation", 0.9), ("feed_forward", 0.6)])
def test_a_block_that_keeps_less_is_the_same_to_the_bit(checkpointing, less, targets):
    block = make_block(targets=targets)
    smaller = copy.deepcopy(block)
    keep_less(smaller, checkpointing)
    assert [name for name, _ in smaller.named_parameters()] == [name for name, _ in block.named_parameters()]
    (expected, whole), (found, part) = gradients(block), gradients(copy.deepcopy(smaller))
    assert all(map(torch.equal, found, expected))
    assert part < less * whole
