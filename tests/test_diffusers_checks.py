"""What diffusers checks of its own SDXL DreamBooth script (examples/dreambooth/test_dreambooth_lora_sdxl.py), of ours.

The same tiny pipeline, flags and assertions; commands as a user of that script has them.
"""

import os

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from PIL import Image
from safetensors.torch import load_file
from tiny_sdxl import build_tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import train_dreambooth_nora_sdxl as trainer

WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """UNet blocks (2, 4), cross-attention 64, addition embeddings 8 and 80; VAE (32, 64); CLIPs of 32, 5 layers."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    text = CLIPTextConfig(
        vocab_size=1000,
        hidden_size=32,
        intermediate_size=37,
        projection_dim=32,
        num_attention_heads=4,
        num_hidden_layers=5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    pipeline = StableDiffusionXLPipeline(
        unet=UNet2DConditionModel(
            block_out_channels=(2, 4),
            layers_per_block=2,
            sample_size=32,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            transformer_layers_per_block=(1, 2),
            projection_class_embeddings_input_dim=80,
            cross_attention_dim=64,
            norm_num_groups=1,
        ),
        vae=AutoencoderKL(
            block_out_channels=[32, 64],
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            latent_channels=4,
            sample_size=128,
        ),
        text_encoder=CLIPTextModel(text),
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
        ),
        add_watermarker=False,
    )
    folder = tmp_path_factory.mktemp("base")
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(3):
        Image.effect_noise((80, 64), 60).convert("RGB").save(folder / f"{number}.png")
    return folder


def train(base, pictures, output, *flags):
    command = f"""
        --pretrained_model_name_or_path {base} --instance_data_dir {pictures} --instance_prompt photo
        --resolution 64 --train_batch_size 1 --gradient_accumulation_steps 1 --max_train_steps 2
        --learning_rate 5.0e-04 --scale_lr --lr_scheduler constant --lr_warmup_steps 0
        --output_dir {output} --num_validation_images 0 --report_to none""".split()
    trainer.main([*command, *flags])


METHODS = {"nora": ["--rank", "2", "--calibration_passes", "2"], "lora": ["--method", "lora"]}


@pytest.mark.parametrize("method", METHODS)
def test_lora_sdxl(base, pictures, tmp_path, method):
    train(base, pictures, tmp_path, *METHODS[method])
    weights = load_file(tmp_path / WEIGHTS)
    assert all("lora" in key for key in weights)
    assert all(key.startswith("unet") for key in weights)


@pytest.mark.parametrize("method", METHODS)
def test_lora_sdxl_with_text_encoder(base, pictures, tmp_path, method):
    train(base, pictures, tmp_path, "--train_text_encoder", *METHODS[method])
    weights = load_file(tmp_path / WEIGHTS)
    assert all("lora" in key for key in weights)
    assert {key.split(".")[0] for key in weights} == {"unet", "text_encoder", "text_encoder_2"}


def test_lora_sdxl_custom_captions(base, pictures, tmp_path):
    (pictures / "metadata.jsonl").write_text(
        "".join(f'{{"file_name": "{number}.png", "text": "photo {number}"}}\n' for number in range(3))
    )
    train(base, pictures, tmp_path, "--caption_column", "text", *METHODS["nora"])
    train(base, pictures, tmp_path / "text", "--caption_column", "text", "--train_text_encoder", *METHODS["nora"])
    assert (tmp_path / WEIGHTS).is_file() and (tmp_path / "text" / WEIGHTS).is_file()


@pytest.mark.parametrize(("steps", "text"), [(6, []), (7, ["--train_text_encoder"])])
def test_lora_sdxl_checkpointing_checkpoints_total_limit(base, pictures, tmp_path, steps, text):
    flags = ["--max_train_steps", str(steps), "--checkpointing_steps", "2", "--checkpoints_total_limit", "2"]
    train(base, pictures, tmp_path, *flags, *text, *METHODS["nora"])
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.load_lora_weights(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    pipeline("a prompt", num_inference_steps=1, output_type="latent")
    assert {name for name in os.listdir(tmp_path) if name.startswith("checkpoint")} == {"checkpoint-4", "checkpoint-6"}


def test_lora_sdxl_with_edm(base, pictures, tmp_path):
    train(base, pictures, tmp_path, "--do_edm_style_training", *METHODS["nora"])
    weights = load_file(tmp_path / WEIGHTS)
    assert all("lora" in key and key.startswith("unet") for key in weights)


def test_lora_sdxl_playground(base, pictures, tmp_path):
    """Playground v2.5: EDM's scheduler, and latents that are shifted and scaled channel by channel."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(base)
    pipeline.scheduler = EDMEulerScheduler()
    pipeline.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.0, 2.0, 0.5, 1.5])
    pipeline.save_pretrained(tmp_path / "playground")
    train(tmp_path / "playground", pictures, tmp_path / "run", "--do_edm_style_training", *METHODS["nora"])
    weights = load_file(tmp_path / "run" / WEIGHTS)
    assert all("lora" in key and key.startswith("unet") for key in weights)
