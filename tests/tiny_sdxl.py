"""A tiny SDXL with random weights, 32 × 32 pixels, and adapters for it: no network, no assets."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

import nora
from inference.base import load_pipeline
from methods.components import FOLDED_WEIGHTS, INNER_WEIGHTS, adapter_components

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]


def build_tokenizer() -> CLIPTokenizer:
    """CLIP's, without merges: a token a byte, 32 tokens a prompt."""
    bytes_ = sorted(ByteLevel.alphabet())
    words = [*bytes_, *(f"{byte}</w>" for byte in bytes_), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[], model_max_length=32)


def build_pipeline(hidden: int = 32, seed: int = 0) -> StableDiffusionXLPipeline:
    """SDXL at 32 × 32 pixels: two text encoders, text_time conditioning, a first block without attention."""
    tokenizer = build_tokenizer()
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        projection_dim=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, hidden),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 1),
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + hidden,
            cross_attention_dim=2 * hidden,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16),
            down_block_types=["DownEncoderBlock2D"] * 3,
            up_block_types=["UpDecoderBlock2D"] * 3,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=32,
        )
        text_encoder, text_encoder_2 = CLIPTextModel(text_config), CLIPTextModelWithProjection(text_config)
    pipeline = StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=text_encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        add_watermarker=False,
    )
    for model in (unet, vae, text_encoder, text_encoder_2):
        model.eval().requires_grad_(False)
    return pipeline


@functools.cache
def work_folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="inference-tests-")
    work_folder.keep = folder  # removed at exit
    return Path(folder.name)


@functools.cache
def saved_base(hidden: int = 32) -> Path:
    folder = work_folder() / f"base-{hidden}"
    build_pipeline(hidden).save_pretrained(folder)
    return folder


def randomise_adapter(module: torch.nn.Module, seed: int, std: float = 0.2) -> None:
    """Give every trainable parameter a normal value, so that the update is neither zero nor small."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * std


@functools.cache
def saved_refiner() -> Path:
    """SDXL's refiner in small: the second text encoder alone, an aesthetic score among the size conditions."""
    base = build_pipeline(seed=7)
    config = dict(base.unet.config)
    width = base.text_encoder_2.config.hidden_size
    config |= {"cross_attention_dim": width, "projection_class_embeddings_input_dim": 5 * 8 + width}
    with torch.random.fork_rng():
        torch.manual_seed(7)
        unet = UNet2DConditionModel.from_config(config)
    parts = {name: base.components[name] for name in ("vae", "text_encoder_2", "tokenizer_2", "scheduler")}
    refiner = StableDiffusionXLImg2ImgPipeline(
        **parts,
        unet=unet,
        text_encoder=None,
        tokenizer=None,
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    folder = work_folder() / "refiner"
    refiner.save_pretrained(folder)
    return folder


@functools.cache
def saved_lora(seed: int = 1, text: bool = True, hidden: int = 32) -> Path:
    """A run folder with a random LoRA as diffusers' own trainer would save it, and a run.json."""
    folder = work_folder() / f"lora-{seed}-{text}-{hidden}"
    pipeline = build_pipeline(hidden)
    parts = {"unet": (pipeline.unet, UNET_TARGETS)}
    if text:
        parts["text_encoder"] = (pipeline.text_encoder, TEXT_TARGETS)
        parts["text_encoder_2"] = (pipeline.text_encoder_2, TEXT_TARGETS)
    for module, targets in parts.values():
        module.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=targets))
        randomise_adapter(module, seed)
    StableDiffusionXLPipeline.save_lora_weights(
        folder, **{f"{name}_lora_layers": get_peft_model_state_dict(module) for name, (module, _) in parts.items()}
    )
    record = {
        "method": "lora",
        "config": {"rank": 4, "max_train_steps": 500, "pretrained_model_name_or_path": str(saved_base(hidden))},
        "trainable_parameters": 1234567,
        "timings": {"train_seconds": 83.4, "total_seconds": 100.0, "seconds_per_step": 0.1668},
        "peak_memory_mb": 1536.0,
        "files": {},
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


def inject_nora(pipeline: StableDiffusionXLPipeline) -> None:
    """Random NoRA adapters in the UNet and both text encoders, as the trainer would inject them."""
    for prefix, module in adapter_components(pipeline).items():
        targets = UNET_TARGETS if prefix == "unet" else TEXT_TARGETS
        config = nora.NoraConfig(r=4, outer_r=8, target_modules=targets)
        nora.preprocess_nora(module, config, lambda *_: outputs(pipeline))
        module.add_adapter(config)
        randomise_adapter(module, seed=3, std=0.5)


@functools.cache
def saved_nora(hidden: int = 32, base_seed: int = 0) -> Path:
    """A run folder with a random NoRA on the UNet and both text encoders: folded file, inner-only file, run.json."""
    folder = work_folder() / f"nora-{hidden}-{base_seed}"
    folder.mkdir()
    pipeline = build_pipeline(hidden, base_seed)
    inject_nora(pipeline)
    components = adapter_components(pipeline)
    nora.save_inner(folder / INNER_WEIGHTS, components)
    folded = {
        f"{prefix}.{key}": weight
        for prefix, module in components.items()
        for key, weight in nora.fold_nora(module).items()
    }
    save_file({key: weight.contiguous() for key, weight in folded.items()}, folder / FOLDED_WEIGHTS)
    record = {
        "method": "nora",
        "config": {"rank": 4, "outer_rank": 8, "pretrained_model_name_or_path": str(saved_base(hidden))},
        "trainable_parameters": 7654321,
    }
    (folder / "run.json").write_text(json.dumps(record))
    return folder


@torch.no_grad()
def outputs(pipeline: StableDiffusionXLPipeline) -> dict[str, torch.Tensor]:
    """Hidden and pooled states of both text encoders, and the UNet's noise prediction made from them."""
    embeds, _, pooled, _ = pipeline.encode_prompt("a cat in the jungle", do_classifier_free_guidance=False)
    tokens = torch.arange(min(32, pipeline.text_encoder.config.max_position_embeddings))
    first = pipeline.text_encoder(tokens[None], output_hidden_states=True).hidden_states[-2]
    generator = torch.Generator().manual_seed(0)
    noise = pipeline.unet(
        torch.randn(1, pipeline.unet.config.in_channels, 8, 8, generator=generator),
        torch.tensor(500),
        encoder_hidden_states=embeds,
        added_cond_kwargs={"text_embeds": pooled, "time_ids": torch.tensor([[32.0, 32, 0, 0, 32, 32]])},
    ).sample
    return {"text_encoder": first, "prompt_embeds": embeds, "pooled": pooled, "unet": noise}


def max_error(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max((a[name] - b[name]).abs().max().item() for name in a)


def live_outputs(trained: dict[str, torch.nn.Module]) -> dict[str, torch.Tensor]:
    """`outputs` of a run's own modules, adapters inside, with the rest of the base loaded beside them."""
    pipeline = load_pipeline(saved_base(), torch.float32, "cpu", **dict.fromkeys(trained))
    pipeline.register_modules(**trained)
    for model in trained.values():
        model.eval()
    return {name: value.float() for name, value in outputs(pipeline).items()}
