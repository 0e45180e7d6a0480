"""Targets and the loss, against the formulas written out in NumPy."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler

from dreambooth.draws import Batch
from dreambooth.encode import EncodedPrompts
from dreambooth.loss import denoising_loss, training_scheduler, training_target

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def batch():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 3, 4, 2, 2, generator=generator)
    return Batch(latents, noise, torch.tensor([0, 500, 999]), torch.zeros(3, 6))


def test_noise_is_the_target():
    scheduler = training_scheduler(EulerDiscreteScheduler(**SDXL))
    assert isinstance(scheduler, DDPMScheduler)
    one = batch()
    assert training_target(scheduler, one) is one.noise


def test_velocity_is_the_target_where_the_base_predicts_it():
    one = batch()
    target = training_target(training_scheduler(EulerDiscreteScheduler(**SDXL, prediction_type="v_prediction")), one)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = np.cumprod(1 - betas)[[0, 500, 999]].reshape(3, 1, 1, 1)
    expected = np.sqrt(alpha_bar) * one.noise.numpy() - np.sqrt(1 - alpha_bar) * one.latents.numpy()
    assert np.allclose(target.numpy(), expected, atol=1e-5)


def test_other_predictions_are_refused():
    with pytest.raises(ValueError, match="'sample': epsilon and v_prediction"):
        training_scheduler(EulerDiscreteScheduler(**SDXL, prediction_type="sample"))


@pytest.mark.parametrize("size", [1, 2, 3])
def test_class_images_are_weighted(size):
    generator = torch.Generator().manual_seed(1)
    prediction, target = torch.randn(2, 2 * size, 4, 2, 2, generator=generator)
    squares = (prediction - target).double().numpy() ** 2
    expected = squares[:size].mean() + 0.3 * squares[size:].mean()
    assert np.isclose(denoising_loss(prediction, target, 0.3).item(), expected, rtol=1e-5)
    assert np.isclose(denoising_loss(prediction, target, None).item(), squares.mean(), rtol=1e-5)


def test_loss_is_taken_in_fp32():
    prediction = torch.full((1, 4, 128, 128), 300.0, dtype=torch.float16)
    assert denoising_loss(prediction, torch.zeros_like(prediction), None).item() == 90000.0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_prompts_are_paired_with_their_pictures(size):
    prompts = EncodedPrompts(torch.tensor([0.0, 1.0]).reshape(2, 1, 1), torch.tensor([0.0, 1.0]).reshape(2, 1))
    for embeds in prompts.each(size):
        assert embeds.flatten().tolist() == [0.0] * size + [1.0] * size
