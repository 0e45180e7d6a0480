"""Bases as people have them: single files of every precision, what their keys say, and what none of them may be."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from safetensors.torch import load_file, save_file
from test_dreambooth_loss import SDXL, batch
from test_trainer import CAT, losses, run

from dreambooth.draws import INSTANCE
from dreambooth.encode import encode_prompts, encode_prompts_cached, tokenize
from dreambooth.encoded_cache import EncodedCache
from dreambooth.loss import Objective
from inference import sampling
from inference.base import check_base, load_outline, load_pipeline, make_scheduler
from inference.generate import main as generate
from inference.manifest import read_manifest
from inference.prediction import Prediction, guidance_rescale_for, prediction_of, settle_scheduler
from inference.single_file import UNET, read_markers
from tools.single_file import write_single_file

TINY = Path(__file__).parent.parent / "assets" / "tiny-sdxl"
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2")
VELOCITY = Prediction("v_prediction", True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The embedded base as single files: velocity by its keys, the same without them, and in 8 bits with scales."""
    folder = tmp_path_factory.mktemp("bases")
    write_single_file(TINY, folder / "velocity.safetensors", v_pred=True, ztsnr=True, dtype="fp16")
    write_single_file(TINY, folder / "plain.safetensors", dtype="fp16")
    write_single_file(TINY, folder / "fp8.safetensors", dtype="fp8")
    write_single_file(TINY, folder / "scaled.safetensors", dtype="scaled_fp8")
    return folder


@pytest.fixture(scope="module")
def tiny():
    return load_pipeline(TINY, torch.float32, "cpu")


def load(file, **options):
    return load_pipeline(file, torch.float32, "cpu", base_config=str(TINY), **options)


# --- what is in a file ------------------------------------------------------------------------------------------------


def test_a_single_file_is_the_folder_it_was_made_of(files, tiny):
    check_base(files / "velocity.safetensors")
    loaded = load(files / "velocity.safetensors")
    for part in PARTS:
        own, found = (getattr(one, part).state_dict() for one in (tiny, loaded))
        assert own.keys() == found.keys() and all(torch.equal(own[name].half().float(), found[name]) for name in own)


EIGHT_BIT = {
    "time_embed.0": "time_embedding.linear_1",
    "input_blocks.3.1.transformer_blocks.0.attn1.to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
}


@pytest.mark.parametrize("name", ["fp8", "scaled"])
def test_weights_in_8_bits_are_plain_numbers_afterwards(files, name):
    """W, or W · scale in float64, of every tensor; ComfyUI's mark and scales are no weights."""
    file = files / f"{name}.safetensors"
    state, unet = load_file(file), load(file).unet.state_dict()
    for key, inside in EIGHT_BIT.items():
        weight = state[f"{UNET}{key}.weight"]
        assert weight.dtype == torch.float8_e4m3fn
        scale = state.get(f"{UNET}{key}.scale_weight", torch.ones(1)).double().numpy()
        assert (scale != 1).all() == (name == "scaled")
        expected = (weight.float().double().numpy() * scale).astype(np.float32)
        assert np.array_equal(unet[f"{inside}.weight"].numpy(), expected), key


def test_scales_of_rows_and_scales_that_fit_nothing(files, tmp_path):
    state, key = load_file(files / "scaled.safetensors"), f"{UNET}time_embed.0.scale_weight"
    state[key] = torch.arange(1.0, 1 + len(state[key.replace("scale_weight", "weight")])).reshape(-1, 1)
    save_file(state, tmp_path / "rows.safetensors")
    found = load(tmp_path / "rows.safetensors").unet.time_embedding.linear_1.weight
    assert torch.equal(found, state[f"{UNET}time_embed.0.weight"].float() * state[key])
    state[key] = torch.ones(3)
    save_file(state, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"a scale of shape \(3,\) that fits no weight .*time_embed.0.weight"):
        load(tmp_path / "wrong.safetensors")


def one(shape=(4,)):
    return torch.zeros(*shape)


WHOLE = {
    f"{UNET}input_blocks.0.0.weight": one((2, 4, 1, 1)),
    f"{UNET}label_emb.0.0.weight": one(),
    "conditioner.embedders.0.transformer.x": one(),
    "conditioner.embedders.1.model.x": one(),
    "first_stage_model.x": one(),
}
CONV_IN = f"{UNET}input_blocks.0.0.weight"
# What is in the place of some of them, and the words of the refusal.
OTHERS = {
    "inpainting": ({CONV_IN: one((2, 9, 1, 1))}, "is an inpainting model, whose UNet has 9 input channels"),
    "edit": ({CONV_IN: one((2, 8, 1, 1))}, "edits pictures, whose UNet has 8 input channels"),
    "refiner": (
        dict.fromkeys(("conditioner.embedders.1.model.x", "conditioner.embedders.0.transformer.x"))
        | {"conditioner.embedders.0.model.x": one()},
        "is SDXL's refiner.*--refiner",
    ),
    "sd1": ({"cond_stage_model.transformer.x": one()}, "is of Stable Diffusion 1"),
    "sd2": ({"cond_stage_model.model.x": one()}, "is of Stable Diffusion 2"),
    "lora": ({"lora_unet_x.lora_down.weight": one()}, "holds an adapter"),
    "other unet": ({f"{UNET}label_emb.0.0.weight": None}, "another family"),
    "unet alone": (
        dict.fromkeys(("conditioner.embedders.1.model.x", "first_stage_model.x")),
        "lacks its second text encoder and its autoencoder",
    ),
    "edm": ({"edm_vpred.sigma_max": one()}, "velocity at EDM's noise levels"),
    "int8": ({f"{UNET}x.weight": torch.zeros(4, dtype=torch.int8)}, "quantised in a way that is not read here"),
    "comfy": ({f"{UNET}x.comfy_quant": torch.zeros(4, dtype=torch.uint8)}, "quantised in a way"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_refused_by_their_header(tmp_path, name):
    changed, words = OTHERS[name]
    save_file(WHOLE, tmp_path / "base.safetensors")
    check_base(tmp_path / "base.safetensors")
    save_file({key: part for key, part in (WHOLE | changed).items() if part is not None}, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match=words):
        check_base(tmp_path / "base.safetensors")


# --- what the base predicts -------------------------------------------------------------------------------------------


def test_keys_and_flags_say_what_is_predicted(files):
    velocity, plain = files / "velocity.safetensors", files / "plain.safetensors"
    assert read_markers(plain) is None and read_markers(velocity) == (True, True)

    def found(file, *asked):
        return prediction_of(settle_scheduler(EulerDiscreteScheduler(**SDXL), file, *asked))

    assert found(velocity) == VELOCITY == found(plain, "v_prediction", "on")
    assert found(plain) == Prediction("epsilon", False) == found(velocity, "epsilon")
    assert found(plain, "v_prediction") == Prediction("v_prediction", False) == found(velocity, "auto", "off")
    with pytest.raises(ValueError, match="--zero_terminal_snr on with a base that predicts epsilon"):
        found(plain, "auto", "on")
    plain_scheduler = EulerDiscreteScheduler(**SDXL)
    assert settle_scheduler(plain_scheduler, TINY) is plain_scheduler
    spaced = EulerDiscreteScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, **SDXL)
    assert settle_scheduler(spaced, TINY).config.timestep_spacing == "trailing"  # leading never visits the last one


def test_outline_and_pipeline_predict_alike(files):
    outline = load_outline(files / "velocity.safetensors", base_config=str(TINY))
    assert prediction_of(outline.scheduler) == VELOCITY
    assert outline.unet.device.type == "meta" and guidance_rescale_for(outline.scheduler) == 0.7
    assert prediction_of(make_scheduler("DDIM", outline.scheduler)) == VELOCITY
    with pytest.raises(ValueError, match="--scheduler Heun.* can't begin at noise alone.*Euler"):
        make_scheduler("HeunDiscrete", outline.scheduler)


def test_zero_terminal_snr_in_numpy():
    """arXiv 2305.08891, algorithm 1, and diffusers' own."""
    objective = Objective(settle_scheduler(EulerDiscreteScheduler(**SDXL), TINY, "v_prediction", "on"))
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - betas))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    assert np.allclose(objective.scheduler.alphas_cumprod.numpy(), root**2, atol=1e-6)
    theirs = torch.cumprod(1 - rescale_zero_terminal_snr(torch.from_numpy(betas)), dim=0)
    assert np.allclose(theirs.numpy(), root**2, atol=1e-12) and objective.scheduler.alphas_cumprod[-1] == 0
    some = batch()  # at 0, 500 and 999
    alpha = root[[0, 500, 999]].reshape(3, 1, 1, 1)
    sigma, latents, noise = np.sqrt(1 - alpha**2), some.latents.numpy(), some.noise.numpy()
    assert np.allclose(objective.target(some).numpy(), alpha * noise - sigma * latents, atol=1e-5)
    assert np.allclose(objective.model_input(some)[0].numpy(), alpha * latents + sigma * noise, atol=1e-5)
    assert torch.equal(objective.target(some)[2], -some.latents[2])  # noise alone: the whole picture is to be said


@pytest.mark.parametrize("options", [{"snr_gamma": 5.0}, {"debiased_estimation": True}, {}])
def test_weights_are_finite_where_the_snr_is_zero(options):
    base = settle_scheduler(EulerDiscreteScheduler(**SDXL), TINY, "v_prediction", "on")
    objective = Objective(base, **options)
    alpha = objective.scheduler.alphas_cumprod.double().numpy()[[0, 500, 999]]
    snr = alpha / (1 - alpha)
    of_x0 = {"snr_gamma": np.minimum(snr, 5), "debiased_estimation": np.sqrt(snr)}.get(next(iter(options), ""), snr + 1)
    found = objective.sample_weights(batch()).numpy()
    assert np.allclose(found, of_x0 / (snr + 1), rtol=1e-4) and found[2] == (0 if options else 1)


def test_velocity_that_is_exact_draws_the_picture():
    """Of diffusers' own sampler, from noise alone, by trailing steps: the target is what it takes for velocity."""
    base = settle_scheduler(DDIMScheduler(**SDXL, clip_sample=False), TINY, "v_prediction", "on")
    base.set_timesteps(5)
    assert base.timesteps[0] == 999
    latents, noise = batch(1).latents, batch(1).noise
    state = noise
    for step in base.timesteps:
        state = base.step(base.get_velocity(latents, noise, step.reshape(1)), step, state).prev_sample
    assert torch.allclose(state, latents, atol=1e-4)


# --- clip skip --------------------------------------------------------------------------------------------------------


def test_skipped_layers_are_diffusers_and_have_encodings_of_their_own(tiny, tmp_path):
    encoders, prompt = [tiny.text_encoder, tiny.text_encoder_2], "a photo of a cat"
    tokens = tokenize([tiny.tokenizer, tiny.tokenizer_2], [prompt])
    cache = EncodedCache(tmp_path)
    for skip in (0, 1):
        theirs, _, pooled, _ = tiny.encode_prompt(prompt, clip_skip=skip, do_classifier_free_guidance=False)
        drawn = sampling.encode_prompts(tiny, [prompt], clip_skip=skip)[prompt]
        for found in (
            encode_prompts_cached(encoders, "text", tokens, cache, clip_skip=skip),
            encode_prompts_cached(encoders, "text", tokens, cache, clip_skip=skip),
            encode_prompts(encoders, tokens, torch.zeros(1, dtype=torch.long), skip),
        ):
            assert torch.allclose(found.prompt_embeds, theirs, atol=1e-5)
            assert torch.allclose(found.pooled_prompt_embeds, pooled, atol=1e-5)
        assert torch.equal(drawn["prompt_embeds"], theirs)
    assert len(list(tmp_path.iterdir())) == 2
    with pytest.raises(ValueError, match="--clip_skip 3 leaves nothing of a text encoder of 3 layers.*the most is 2"):
        sampling.encode_prompts(tiny, [prompt], clip_skip=3)


# --- from a file to pictures ------------------------------------------------------------------------------------------


def test_a_velocity_file_trains_resumes_and_draws(files, tmp_path, capsys):
    base = {"base_config": str(TINY), "method": "lora", "clip_skip": 1, "validation_loss_steps": 2}
    keyed = base | {"pretrained_model_name_or_path": str(files / "velocity.safetensors")}
    flags = {"prediction_type": "v_prediction", "zero_terminal_snr": "on"}
    said = base | flags | {"pretrained_model_name_or_path": str(files / "plain.safetensors")}
    options = {"checkpointing_steps": 2, "output_kohya_format": True}
    folder = run(tmp_path / "keyed", **keyed, **options)
    assert "base: predicts velocity (v_prediction), with zero terminal SNR, as keys of the file say" in (
        capsys.readouterr().out
    )
    # the same weights, said by flags instead of keys: one run goes on as the other
    resumed = run(tmp_path / "keyed", **said, **options, max_train_steps=3, resume_from_checkpoint="latest")
    assert losses(resumed)[:2] == losses(folder)[:2]
    record = json.loads((folder / "run.json").read_text())
    assert (record["prediction_type"], record["zero_terminal_snr"]) == ("v_prediction", True)
    card = (folder / "README.md").read_text()
    assert 'prediction_type="v_prediction", rescale_betas_zero_snr=True' in card
    assert "guidance_rescale=0.7, clip_skip=1" in card
    with pytest.raises(ValueError, match="--prediction_type was v_prediction and is epsilon"):
        other = said | {"prediction_type": "epsilon", "zero_terminal_snr": "auto"}
        run(tmp_path / "keyed", **other, **options, max_train_steps=4, resume_from_checkpoint="latest")
    capsys.readouterr()
    draw = ["--adapter", str(folder), "--prompt", "a photo of [V] cat", "--num_inference_steps", "2"]
    generate([*draw, "--output", str(tmp_path / "own")])
    (own,) = read_manifest(tmp_path / "own")
    assert own["prediction_type"] == "v_prediction" and own["zero_terminal_snr"] == "on" and own["clip_skip"] == 1
    assert "warning" not in capsys.readouterr().err
    noise = [
        "--base",
        str(files / "plain.safetensors"),
        "--base_config",
        str(TINY),
        "--output",
        str(tmp_path / "other"),
    ]
    generate([*draw, *noise])
    assert "was trained on a base that predicts velocity (v_prediction), and this one predicts noise" in (
        capsys.readouterr().err
    )
    assert CAT.is_dir() and INSTANCE == 0
