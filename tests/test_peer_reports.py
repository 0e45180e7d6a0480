"""What users reported of other trainers and loaders, tried here; each test names the report."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_sdxl import build_pipeline, max_error, outputs, saved_base, saved_lora

import train_dreambooth_nora_sdxl as trainer
from inference.base import load_pipeline
from inference.generate import main as generate
from inference.load import load_adapter
from methods.components import EMBEDDINGS, FOLDED_WEIGHTS
from settings.training import TrainConfig

CAT = Path(__file__).parent.parent / "assets" / "subjects" / "cat"


def run(folder: Path, **options) -> Path:
    AcceleratorState._reset_state(True)
    quick = {
        "pretrained_model_name_or_path": str(saved_base()),
        "instance_data_dir": str(CAT),
        "instance_prompt": "a photo of [V] cat",
        "method": "lora",
        "max_train_steps": 2,
        "train_batch_size": 2,
        "num_validation_images": 0,
        "num_inference_steps": 2,
        "report_to": "none",
    }
    return trainer.train(TrainConfig.of(**(quick | {"output_dir": str(folder)} | options)))


def steps(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_prior_preservation_with_captions_new_tokens_and_class_images_of_any_shape(tmp_path):
    """diffusers #6967: shapes of prompts and of size conditions didn't match in the advanced SDXL script."""
    pictures, classes = tmp_path / "cat", tmp_path / "class"
    shutil.copytree(CAT, pictures)
    for picture in list(pictures.glob("*.png"))[:3]:
        picture.with_suffix(".txt").write_text("[V] cat, on a sofa in the evening")
    classes.mkdir()
    for place, size in enumerate(((80, 40), (33, 50), (64, 64))):
        Image.effect_noise(size, 60).convert("RGB").save(classes / f"{place}.png")
    folder = run(
        tmp_path / "run",
        instance_data_dir=str(pictures),
        train_text_encoder_ti=True,
        token_abstraction="[V]",
        with_prior_preservation=True,
        class_data_dir=str(classes),
        class_prompt="icon",
        num_class_images=3,
        train_batch_size=3,
    )
    assert len(steps(folder)) == 2


def test_min_snr_with_prior_preservation_batches_and_accumulation(tmp_path):
    """diffusers #6481: weights of one batch were multiplied with the loss of two."""
    options = {"with_prior_preservation": True, "class_prompt": "a cat", "num_class_images": 2, "snr_gamma": 5.0}
    options["class_data_dir"] = str(tmp_path / "class")
    folders = [
        run(
            tmp_path / f"{batch}x{accumulation}",
            train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            **options,
        )
        for batch, accumulation in ((4, 1), (2, 2))
    ]
    one, other = ([step["loss"] for step in steps(folder)] for folder in folders)
    assert one == pytest.approx(other, rel=1e-4)


def test_a_kohya_file_with_alphas_in_some_layers_only(tmp_path):
    """diffusers #4852: KeyError for a text encoder whose feed-forward layers have no alpha."""
    generator = torch.Generator().manual_seed(0)
    tensors, width = {}, 32
    for layer, alpha, (m, n) in (
        ("self_attn_q_proj", 2.0, (width, width)),
        ("mlp_fc1", None, (2 * width, width)),
        ("mlp_fc2", 8.0, (width, 2 * width)),
    ):
        key = f"lora_te1_text_model_encoder_layers_0_{layer}"
        tensors[f"{key}.lora_down.weight"] = torch.randn(4, n, generator=generator)
        tensors[f"{key}.lora_up.weight"] = torch.randn(m, 4, generator=generator)
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "cat.safetensors")
    pipeline, by_hand = build_pipeline(), build_pipeline()
    load_adapter(pipeline, tmp_path / "cat.safetensors")
    layer = by_hand.text_encoder.encoder.layers[0]
    for name, module, scale in (
        ("self_attn_q_proj", layer.self_attn.q_proj, 2 / 4),
        ("mlp_fc1", layer.mlp.fc1, 1),
        ("mlp_fc2", layer.mlp.fc2, 8 / 4),
    ):
        key = f"lora_te1_text_model_encoder_layers_0_{name}"
        module.weight.data += scale * tensors[f"{key}.lora_up.weight"] @ tensors[f"{key}.lora_down.weight"]
    tokens = torch.arange(32)[None]
    with torch.no_grad():
        found, expected = pipeline.text_encoder(tokens)[0], by_hand.text_encoder(tokens)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_our_file_is_the_same_whole_or_component_by_component(tmp_path):
    """diffusers #6639: load_lora_weights drew another picture than loading each component by itself."""
    folder = run(
        tmp_path / "run", train_text_encoder=True, learning_rate=1e-2, text_encoder_lr=1e-2, rank=4, lora_alpha=8
    )
    whole, parts = build_pipeline(), build_pipeline()
    whole.load_lora_weights(folder, weight_name=FOLDED_WEIGHTS)
    state, alphas, metadata = StableDiffusionXLPipeline.lora_state_dict(
        folder, weight_name=FOLDED_WEIGHTS, unet_config=parts.unet.config, return_lora_metadata=True
    )
    parts.load_lora_into_unet(state, alphas, parts.unet, metadata=metadata)
    for name in ("text_encoder", "text_encoder_2"):
        parts.load_lora_into_text_encoder(state, alphas, getattr(parts, name), prefix=name, metadata=metadata)
    ours = build_pipeline()
    load_adapter(ours, folder)
    expected = outputs(whole)
    torch.testing.assert_close(outputs(parts), expected)
    torch.testing.assert_close(outputs(ours), expected, rtol=1e-4, atol=1e-4)
    assert max_error(outputs(build_pipeline()), expected) > 1e-3


def test_a_picture_that_the_autoencoder_turns_into_nan_is_refused_by_name(tmp_path):
    """LoRA_Easy_Training_Scripts #170 (sd-scripts): a half-precision VAE that overflows; elsewhere the loss is NaN."""
    vae = AutoencoderKL.from_pretrained(saved_base(), subfolder="vae")
    vae.encoder.conv_in.weight.data.fill_(float("inf"))
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(ValueError, match=r"NaN or infinity of .*\.png"):
        run(tmp_path / "run", pretrained_vae_model_name_or_path=str(tmp_path / "vae"))
    assert not (tmp_path / "run" / FOLDED_WEIGHTS).exists()


def test_a_folder_of_films_is_refused_in_a_sentence(tmp_path):
    """ai-toolkit #439: a traceback, "no images found"."""
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "cat.mp4").write_bytes(b"\0\0\0\x18ftypmp42" + bytes(100))
    with pytest.raises(ValueError, match=r"films.*cat\.mp4|cat\.mp4"):
        run(tmp_path / "run", instance_data_dir=str(tmp_path / "films"))


def test_an_adapter_of_stable_diffusion_1_5_is_refused_on_sdxl(tmp_path):
    """ComfyUI #3518: every key "not loaded", and the picture is drawn without it."""
    key = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k"
    te = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {f"{te}.lora_down.weight": torch.ones(4, 768), f"{te}.lora_up.weight": torch.ones(768, 4)}
    tensors |= {f"{key}.lora_down.weight": torch.ones(4, 320), f"{key}.lora_up.weight": torch.ones(320, 4)}
    save_file(tensors, tmp_path / "old.safetensors")
    pipeline = build_pipeline()
    before = outputs(pipeline)
    with pytest.raises(ValueError, match=r"old\.safetensors is an adapter of Stable Diffusion 1 or 2"):
        load_adapter(pipeline, tmp_path / "old.safetensors")
    assert max_error(before, outputs(pipeline)) == 0


def test_epochs_are_epochs_whatever_is_accumulated_and_the_schedule_ends_with_them(tmp_path):
    """sd-scripts #251, kohya_ss #735: accumulation multiplied the epochs, and cosine never came to its end."""
    options = {"max_train_steps": None, "num_train_epochs": 4, "lr_scheduler": "cosine", "learning_rate": 1e-3}
    pictures = tmp_path / "cat"
    pictures.mkdir()
    for picture in sorted(CAT.glob("*.png"))[:6]:
        shutil.copy(picture, pictures)
    for batch, accumulation in ((1, 3), (3, 1)):
        folder = run(
            tmp_path / f"{batch}",
            instance_data_dir=str(pictures),
            train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            **options,
        )
        rates = [step["learning_rate"] for step in steps(folder)]
        assert len(rates) == 8  # 4 epochs of 6 pictures, 3 a step
        assert rates == sorted(rates, reverse=True) and rates[0] == 1e-3 and rates[-1] < 1e-4


def test_rotation_keeps_the_checkpoint_just_written(tmp_path):
    """unsloth-zoo #782: with a limit of 1 an older run's higher number stayed and the new checkpoint was deleted."""
    folder = run(tmp_path / "run", max_train_steps=4, checkpointing_steps=2)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    run(folder, max_train_steps=3, checkpointing_steps=1, checkpoints_total_limit=1, learning_rate=1e-3)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]


def test_new_tokens_are_saved_wherever_the_output_folder_lies(tmp_path):
    """diffusers #8909: the file of embeddings was named after the whole path of --output_dir."""
    folder = run(tmp_path / "out" / "deep" / "my cat", train_text_encoder_ti=True, token_abstraction="[V]")
    assert load_file(folder / EMBEDDINGS)
    load_adapter(load_pipeline(str(saved_base())), folder)


@pytest.mark.parametrize("method", ["lora", "loha", "nora"])
def test_the_adapter_in_a_checkpoint_draws_and_goes_on(tmp_path, method):
    """OneTrainer #840 and #1340: adapters in backups could not be loaded; a LoHa could not be restarted."""
    folder = run(tmp_path / "run", method=method, max_train_steps=2, checkpointing_steps=1, learning_rate=1e-2)
    for path in (folder / "checkpoint-1", folder):
        pipeline = build_pipeline()
        load_adapter(pipeline, path)
        assert max_error(outputs(pipeline), outputs(build_pipeline())) > 0
    shutil.rmtree(folder / "checkpoint-2")
    last = {path.name: load_file(path) for path in (folder / "peft").rglob("*.safetensors")}
    again = run(
        folder,
        method=method,
        max_train_steps=2,
        checkpointing_steps=1,
        learning_rate=1e-2,
        resume_from_checkpoint="latest",
    )
    for path in (again / "peft").rglob("*.safetensors"):
        assert all(torch.equal(tensor, last[path.name][key]) for key, tensor in load_file(path).items())


def test_prompts_of_any_number_and_length_are_drawn_while_training(tmp_path):
    """SimpleTuner #1330: several validation prompts ended the run."""
    prompts = ["[V] cat", "a [V] cat in the snow", "[V]", "a photo of a [V] cat"]
    folder = run(tmp_path / "run", validation_prompt=prompts, num_validation_images=1, validation_steps=1)
    assert len(list((folder / "samples").glob("*.png"))) == 4


def test_black_pictures_are_an_error(tmp_path):
    """ai-toolkit #514: samples were black, and training went on."""
    adapter = tmp_path / "lora"
    shutil.copytree(saved_lora(), adapter)
    tensors = load_file(adapter / FOLDED_WEIGHTS)
    save_file({key: tensor * 1e30 for key, tensor in tensors.items()}, adapter / FOLDED_WEIGHTS)
    with pytest.raises(SystemExit) as stopped:
        generate(
            [
                *f"--adapter {adapter} --output {tmp_path / 'out'} --device cpu --num_inference_steps 2".split(),
                "--prompt",
                "[V] cat",
            ]
        )
    assert stopped.value.code not in (0, None) and not list((tmp_path / "out").glob("*.png"))
