"""The objective against the formulas written out in NumPy, and against what diffusers' samplers make of predictions."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler

from dreambooth.draws import Batch
from dreambooth.encode import EncodedPrompts
from dreambooth.loss import Objective

SDXL = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
STEPS = [0, 500, 999]


def batch(size=3, seed=0, weight=None, mask=None):
    latents, noise = torch.randn(2, size, 4, 2, 2, generator=torch.Generator().manual_seed(seed))
    return Batch(
        latents,
        noise,
        torch.tensor((STEPS * size)[:size]),
        torch.zeros(size, 6),
        torch.arange(size),
        torch.ones(size, 1, 2, 2) if mask is None else mask,
        torch.ones(size) if weight is None else torch.tensor(weight),
        torch.zeros(size, dtype=torch.bool),
    )


def objective(kind="epsilon", scheduler=EulerDiscreteScheduler, **options):
    return Objective(scheduler(**({} if scheduler is EDMEulerScheduler else SDXL), prediction_type=kind), **options)


def alpha_bar():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return np.cumprod(1 - betas)[STEPS].reshape(3, 1, 1, 1)


# --- noise, target ----------------------------------------------------------------------------------------------------


def test_noise_is_the_target():
    one = batch()
    assert objective().target(one) is one.noise
    noisy, timesteps = objective().model_input(one)
    expected = np.sqrt(alpha_bar()) * one.latents.numpy() + np.sqrt(1 - alpha_bar()) * one.noise.numpy()
    assert np.allclose(noisy.numpy(), expected, atol=1e-5) and timesteps.tolist() == STEPS


def test_velocity_is_the_target_where_the_base_predicts_it():
    one = batch()
    expected = np.sqrt(alpha_bar()) * one.noise.numpy() - np.sqrt(1 - alpha_bar()) * one.latents.numpy()
    assert np.allclose(objective("v_prediction").target(one).numpy(), expected, atol=1e-5)


def test_other_predictions_are_refused():
    with pytest.raises(ValueError, match="'sample': epsilon and v_prediction"):
        objective("sample")


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, EDMEulerScheduler])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_edm_target_makes_the_sampler_find_the_picture(scheduler, kind):
    """A UNet that predicts the target exactly takes diffusers' own sampler to the clean latents in one step."""
    one, edm = batch(1), objective(kind, scheduler, edm_style=True)
    one = one._replace(timesteps=torch.tensor([300]))
    sampler = scheduler.from_config(edm.scheduler.config)
    sampler.set_timesteps(1000)
    sigma = sampler.sigmas[300]
    noisy = one.latents + sigma * one.noise
    model_input, timestep = edm.model_input(one)
    # EDM's sampler rounds its schedule differently when it is told the number of steps.
    assert torch.allclose(model_input, sampler.scale_model_input(noisy.clone(), sampler.timesteps[300]), atol=2e-3)
    assert torch.allclose(timestep, sampler.timesteps[300], atol=1e-3)
    sampler = scheduler.from_config(edm.scheduler.config)
    sampler.set_timesteps(1000)
    step = sampler.step(edm.target(one), sampler.timesteps[300], noisy)
    assert torch.allclose(step.pred_original_sample, one.latents, atol=2e-2)


def test_edm_bases_want_edm_training_and_no_other_weights():
    with pytest.raises(ValueError, match="add --do_edm_style_training"):
        objective(scheduler=EDMEulerScheduler)
    with pytest.raises(ValueError, match="weights of its own"):
        objective(edm_style=True, snr_gamma=5.0)


# --- weights ----------------------------------------------------------------------------------------------------------


def test_min_snr_weights():
    snr = (alpha_bar() / (1 - alpha_bar())).flatten()
    for kind, factor in (("epsilon", snr), ("v_prediction", snr + 1)):
        expected = np.minimum(snr, 5.0) / factor
        assert np.allclose(objective(kind, snr_gamma=5.0).sample_weights(batch()).numpy(), expected, rtol=1e-4)


def test_debiased_weights():
    snr = (alpha_bar() / (1 - alpha_bar())).flatten()
    for kind, factor in (("epsilon", snr), ("v_prediction", snr + 1)):
        weights = objective(kind, debiased_estimation=True).sample_weights(batch()).numpy()
        assert np.allclose(weights, np.sqrt(snr) / factor, rtol=1e-4)


def test_noise_and_velocity_losses_are_the_same_for_the_same_error_of_the_picture():
    """With weights on x0, what the network predicts does not matter: the factors carry the error over."""
    one = batch()
    x0_error = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(5))
    root, rest = (torch.tensor(np.sqrt(a), dtype=torch.float32) for a in (alpha_bar(), 1 - alpha_bar()))
    losses = []
    for kind, per_x0 in (("epsilon", -root / rest), ("v_prediction", -1 / rest)):
        some = objective(kind, snr_gamma=5.0)
        losses.append(some.loss(some.target(one) + per_x0 * x0_error, one, 3).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_edm_weights_are_those_of_the_paper():
    """lambda(sigma) on x0: (sigma^2 + s^2) / (sigma s)^2 with EDM's preconditioning, 1 / sigma^2 without."""
    one = batch()
    x0_error = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(5))
    for scheduler, kind in ((EDMEulerScheduler, "epsilon"), (EulerDiscreteScheduler, "v_prediction")):
        edm = objective(kind, scheduler, edm_style=True)
        sigma = edm.scheduler.sigmas[STEPS].reshape(3, 1, 1, 1).double()
        if scheduler is EDMEulerScheduler:
            c_out, weight = sigma * 0.5 / (sigma**2 + 0.25) ** 0.5, (sigma**2 + 0.25) / (sigma * 0.5) ** 2
        else:
            c_out, weight = -sigma / (sigma**2 + 1) ** 0.5, 1 / sigma**2
        expected = (weight * x0_error.double() ** 2).mean().item()
        assert edm.loss(edm.target(one) + x0_error / c_out.float(), one, 3).item() == pytest.approx(expected, rel=1e-4)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_class_images_and_weights_stay_with_their_samples(size, gamma):
    """diffusers multiplies 2B weights onto B losses here."""
    one = batch(2 * size, weight=[1.0] * size + [0.3] * size)
    prediction = torch.randn(one.noise.shape, generator=torch.Generator().manual_seed(1))
    some = objective(snr_gamma=gamma)
    squares = ((prediction - one.noise).double().numpy() ** 2).mean(axis=(1, 2, 3))
    if gamma is not None:
        snr = np.tile((alpha_bar() / (1 - alpha_bar())).flatten(), 2 * size)[: 2 * size]
        squares = squares * np.minimum(snr, gamma) / snr
    expected = squares[:size].mean() + 0.3 * squares[size:].mean()
    assert np.isclose(some.loss(prediction, one, size).item(), expected, rtol=1e-4)


def test_pseudo_huber():
    one = batch()
    prediction = one.noise + 2.0
    expected = 2 * 0.1 * (np.sqrt(4 + 0.01) - 0.1)
    assert objective(huber_c=0.1).loss(prediction, one, 3).item() == pytest.approx(expected, rel=1e-5)
    small = objective(huber_c=3.0).loss(one.noise + 0.1, one, 3).item()
    assert small == pytest.approx(0.01, rel=1e-2)  # square where errors are small against c


def test_mask_counts_where_it_is_white():
    mask = torch.zeros(3, 1, 2, 2)
    mask[:, :, 0] = 1.0
    one = batch(mask=mask)
    prediction = one.noise.clone()
    prediction[:, :, 1] += 7.0  # where the mask is black
    assert objective().loss(prediction, one, 3).item() == 0
    prediction[:, :, 0] += 2.0
    assert objective().loss(prediction, one, 3).item() == pytest.approx(4.0)


def test_given_target_goes_before_the_picture_s():
    one = batch()
    assert objective().loss(one.noise, one, 3, target=one.noise + 3.0).item() == pytest.approx(9.0, rel=1e-5)


def test_loss_is_taken_in_fp32():
    one = batch(1)._replace(mask=torch.ones(1, 1, 128, 128), noise=torch.zeros(1, 4, 128, 128))
    prediction = torch.full((1, 4, 128, 128), 300.0, dtype=torch.float16)
    assert objective().loss(prediction, one, 1).item() == 90000.0


def test_ddpm_and_euler_bases_train_alike():
    one = batch()
    first, second = objective(scheduler=DDPMScheduler), objective(scheduler=EulerDiscreteScheduler)
    assert torch.equal(first.model_input(one)[0], second.model_input(one)[0])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_prompts_are_paired_with_their_pictures(size):
    prompts = EncodedPrompts(torch.arange(4.0).reshape(4, 1, 1), torch.arange(4.0).reshape(4, 1))
    rows = torch.tensor([3, 1, 1][:size])
    for embeds in prompts.rows(rows):
        assert embeds.flatten().tolist() == rows.tolist()
