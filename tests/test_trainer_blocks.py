"""What transformer blocks keep for the backward pass, and blocks that are compiled."""

import copy
import hashlib

import pytest
import torch
import torch._inductor.config
from accelerate import Accelerator
from diffusers.models.attention import BasicTransformerBlock
from peft import LoraConfig, inject_adapter_in_model
from test_trainer import run
from tiny_sdxl import build_pipeline
from torch import nn
from torch._dynamo.utils import counters

from methods.components import FOLDED_WEIGHTS
from settings.learning import HardwareOptions, LoopOptions
from settings.training import TrainConfig
from trainer.blocks import GatedGelu, HalfLayerNorm, compile_blocks, keep_less, repeated_blocks, wants_compiled

FEED_FORWARD = ["ff.net.0.proj", "ff.net.2"]


def make_block(dtype=torch.float32, targets=("to_q", "to_k", "to_v", "to_out.0")):
    torch.manual_seed(0)
    block = BasicTransformerBlock(32, 2, 16, cross_attention_dim=24).requires_grad_(False).to(dtype)
    inject_adapter_in_model(LoraConfig(r=4, init_lora_weights=False, target_modules=list(targets)), block)
    for parameter in block.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return block


def file_digest(folder):
    return hashlib.sha256((folder / FOLDED_WEIGHTS).read_bytes()).hexdigest()


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


def test_layer_norm_without_autocasts_copies():
    """Its output is the float32 one rounded once, and its input is kept as it is."""
    torch.manual_seed(0)
    norm = HalfLayerNorm(64, dtype=torch.bfloat16).requires_grad_(False)
    norm.weight.copy_(torch.randn(64))
    hidden = torch.randn(20, 64, dtype=torch.bfloat16).requires_grad_()
    exact = nn.functional.layer_norm(hidden.float(), (64,), norm.weight.float(), norm.bias.float(), norm.eps)
    kept = []
    with (
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor),
    ):
        found = norm(hidden)
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.bfloat16())
    assert {tensor.dtype for tensor in kept if tensor.shape == hidden.shape} == {torch.bfloat16}
    weights = torch.randn(20, 64)
    (wanted,) = torch.autograd.grad(exact, hidden, weights)
    (got,) = torch.autograd.grad(found, hidden, weights.bfloat16())
    assert (got - wanted).norm() < 0.01 * wanted.norm()
    assert norm.float()(torch.randn(2, 64, dtype=torch.float32)).dtype == torch.float32


class Blocks(nn.Module):
    _repeated_blocks = ("BasicTransformerBlock",)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([make_block(), make_block()])

    def forward(self, hidden, encoder_hidden_states):
        for layer in self.layers:
            hidden = layer(hidden, encoder_hidden_states=encoder_hidden_states)
        return hidden


def test_compiled_blocks_compute_the_same_under_the_same_names():
    torch._dynamo.reset()
    counters.clear()
    model = Blocks()
    names, (expected, _) = list(model.state_dict()), gradients(model)
    keep_less(model, "activation")
    compile_blocks({"unet": model}, backend="aot_eager")
    found, _ = gradients(model)
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(found, expected))
    assert list(model.state_dict()) == names
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    with torch.no_grad():
        copy.deepcopy(model)(torch.randn(1, 6, 32), torch.randn(1, 3, 24))
        model(torch.randn(1, 6, 32), torch.randn(1, 3, 24))
    assert counters["stats"]["unique_graphs"] == 1  # samples are not compiled


def test_what_is_repeated():
    pipeline = build_pipeline()
    kinds = {
        type(block).__name__ for model in (pipeline.unet, pipeline.text_encoder) for block in repeated_blocks(model)
    }
    assert kinds == {"BasicTransformerBlock", "CLIPEncoderLayer"}


def test_feed_forward_layers_are_computed_again_once():
    flags = {"pretrained_model_name_or_path": "x", "instance_data_dir": "y", "instance_prompt": "z"}
    with pytest.raises(ValueError, match="--selective_checkpointing feed_forward out"):
        TrainConfig.of(**flags, gradient_checkpointing=True, selective_checkpointing="feed_forward")


def test_a_compiler_that_fails_is_one_warning(capsys, tmp_path, monkeypatch):
    """The run goes on as if it had not been asked to compile, and blocks that keep less train the same file."""
    torch._dynamo.reset()
    plain = run(tmp_path / "plain", method="lora", max_train_steps=1, selective_checkpointing="feed_forward")
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(torch._inductor.config, "force_disable_caches", True)
    capsys.readouterr()
    tried = run(tmp_path / "tried", method="lora", max_train_steps=1, compile="on")
    warnings = [line for line in capsys.readouterr().err.splitlines() if "--compile" in line]
    assert len(warnings) == 1 and "goes on without compiling" in warnings[0]
    assert file_digest(tried) == file_digest(plain)


def test_when_compiling_pays():
    class OnGpu:
        device = torch.device("cuda")

    def wanted(accelerator=OnGpu, steps=500, batch=4, shape=(128, 128), **hardware):
        loop = LoopOptions(max_train_steps=steps, train_batch_size=batch)
        return wants_compiled(HardwareOptions(**hardware), loop, accelerator, shape)

    assert wanted(compile="auto") and not wanted(compile="auto", steps=499)
    assert not wanted(compile="auto", shape=(64, 64)) and not wanted(compile="auto", quantize_base="int8")
    assert not wanted(Accelerator(cpu=True), compile="auto") and wanted(Accelerator(cpu=True), compile="on")
    assert not wanted() and not wanted(compile="off", steps=10**6)
