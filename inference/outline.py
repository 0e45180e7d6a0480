"""SDXL's own layers, without weights: what files of unknown origin are read against."""

from __future__ import annotations

from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection


def sdxl_outline() -> dict[str, nn.Module]:
    """unet, text_encoder and text_encoder_2 of SDXL 1.0 on the device "meta" (arXiv 2307.01952)."""
    with init_empty_weights(include_buffers=True):
        unet = UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        return {
            "unet": unet,
            "text_encoder": CLIPTextModel(_text_config(768, 12, 12)),
            "text_encoder_2": CLIPTextModelWithProjection(_text_config(1280, 32, 20)),
        }


def _text_config(width: int, layers: int, heads: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        projection_dim=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    )
