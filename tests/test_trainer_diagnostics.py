"""Guards and figures around the loop: memory before it is taken, losses that are no numbers, parts that don't learn."""

import errno
import math
import re

import pytest
import torch
from tiny_sdxl import UNET_TARGETS, build_pipeline
from torch import nn

import nora
from dreambooth.draws import VALIDATION, fixed_batches
from dreambooth.encode import EncodedPicture, EncodedPrompts
from dreambooth.loss import Objective
from dreambooth.validation import SEED, validation_loss
from methods.memory import saved_activation_bytes
from runs.record import MetricsLog
from trainer.diagnostics import TrainingFailure, check_loss, explained, gradient_norms
from trainer.memory import memory_line, quantize_frozen


@pytest.fixture
def unet():
    unet = build_pipeline().unet
    unet.add_adapter(nora.NoraConfig(r=4, outer_r=8, target_modules=UNET_TARGETS, outer_init="svd"))
    return unet.train()


def call(unet, batch_size=3, shape=(8, 12), tokens=7):
    return unet(
        torch.randn(batch_size, 4, *shape),
        torch.full((batch_size,), 5),
        torch.randn(batch_size, tokens, 64),
        added_cond_kwargs={"text_embeds": torch.randn(batch_size, 32), "time_ids": torch.zeros(batch_size, 6)},
    ).sample


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(unet, checkpointing):
    if checkpointing:
        unet.enable_gradient_checkpointing()
    own = {tensor.untyped_storage().data_ptr() for tensor in (*unet.parameters(), *unet.buffers())}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call(unet)
    real = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    assert saved_activation_bytes(unet, 3, (8, 12), 7) == pytest.approx(real, rel=0.05)


def test_memory_line_adds_up(unet):
    trained = sum(p.numel() for p in unet.parameters() if p.requires_grad)
    line = memory_line({"unet": unet}, 3, (8, 12), 7, torch.device("cpu"))
    assert f"{trained * 12 / 1e6:.1f} MB gradients and optimizer" in line and "activations of 3 samples" in line


def test_memory_line_counts_the_quantized_base(unet):
    def weights(quantize_base):
        line = memory_line({"unet": unet}, 3, (8, 12), 7, torch.device("cpu"), quantize_base)
        return float(re.search(r"([\d.]+) MB weights", line)[1])

    linear = sum(
        module.weight.numel()
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad
    )
    assert weights("none") - weights("int8") == pytest.approx(linear * 3 / 1e6, abs=0.11)  # 1 of fp32's 4 bytes is left


def test_int8_base_still_learns(unet):
    pytest.importorskip("torchao", reason="torchao is not installed: the base can't be quantised")
    expected = call(unet).detach()
    quantize_frozen(unet)
    torch.manual_seed(0)
    prediction = call(unet)
    prediction.square().mean().backward()
    assert prediction.shape == expected.shape and gradient_norms({"unet": unet}, "no")["unet"] > 0


# --- guards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_no_number_stops_the_run_with_a_cause(loss):
    with pytest.raises(TrainingFailure, match=f"the loss is {loss} at step 7: fp16 overflows"):
        check_loss(loss, 7, "fp16", 1e-4)
    with pytest.raises(TrainingFailure, match="the learning rate 3 is likely too high"):
        check_loss(loss, 7, "no", 3.0)
    check_loss(1.0, 7, "no", 3.0)


def test_a_part_without_gradient_stops_the_run():
    learning, still = nn.Linear(2, 2), nn.Linear(2, 2)
    learning(torch.ones(1, 2)).sum().backward()
    assert gradient_norms({"unet": learning}, "no") == {"unet": pytest.approx(6**0.5)}
    with pytest.raises(TrainingFailure, match="text_encoder gets no gradient"):
        gradient_norms({"unet": learning, "text_encoder": still}, "no")


def test_a_full_disk_is_one_sentence(tmp_path):
    """A line of metrics.jsonl is written as it is; what is written whole or not at all says so itself."""

    class Full:
        def write(self, line):
            raise OSError(errno.ENOSPC, "No space left on device")

    metrics = MetricsLog(tmp_path / "metrics.jsonl", enabled=True)
    metrics.file = Full()
    with pytest.raises(ValueError, match="the disk is full .* make room for --output_dir out"), explained(4, "out"):
        metrics.write(1, loss=1.0)
    with pytest.raises(OSError, match="other"), explained(4, "out"):
        raise OSError("other")


# --- validation loss --------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_validation_loss_is_the_mean_over_fixed_draws(unet):
    generator = torch.Generator().manual_seed(0)
    pictures = [
        EncodedPicture(
            torch.randn(1, 4, *shape, generator=generator), torch.zeros(1, 4, *shape), torch.zeros(1, 6), prompt=row
        )
        for row, shape in enumerate([(8, 8), (8, 12), (8, 8)])
    ]
    prompts = EncodedPrompts(torch.randn(3, 7, 64), torch.randn(3, 32))
    objective = Objective(build_pipeline().scheduler)
    whole, split = (validation_loss(unet, pictures, prompts, objective, size, samples=10) for size in (10, 3))
    assert whole == pytest.approx(split, rel=1e-5) and unet.training
    unet.eval()
    errors = []
    for slot in range(10):
        (batch,) = fixed_batches(
            pictures, seed=SEED, stream=VALIDATION, slots=range(slot, slot + 1), total=10, num_train_timesteps=1000
        )
        noisy = objective.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps)
        text = prompts.rows(batch.prompts)
        added = {"text_embeds": text.pooled_prompt_embeds, "time_ids": batch.time_ids}
        prediction = unet(noisy, batch.timesteps, text.prompt_embeds, added_cond_kwargs=added).sample
        errors.append((prediction - batch.noise).square().mean().item())
    assert whole == pytest.approx(sum(errors) / 10, rel=1e-5)
