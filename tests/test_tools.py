"""How the base is pretrained, and what came of it."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from transformers import CLIPTokenizer

pytest.importorskip("resvg_py", reason="the tools need resvg_py, from requirements-dev.txt")
sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import pretrain_tiny_sdxl

BASE = Path(__file__).parent.parent / "assets" / "tiny-sdxl"


def test_learning_rate_of_a_longer_run_is_the_same_before_it_falls():
    short, long = ([pretrain_tiny_sdxl.learning_rate(i, n, 1e-3, 50) for i in range(n)] for n in (1000, 2000))
    assert short[:800] == long[:800] and short[0] < short[49] == short[799] == 1e-3
    assert short[-1] < 1e-5 and long[-1] < 1e-5


def test_checkpoint_is_restored(tmp_path):
    layer = torch.nn.Linear(2, 2)
    pretrain_tiny_sdxl.Checkpoint(tmp_path / "stage", model=layer).save(7)
    other = torch.nn.Linear(2, 2)
    assert pretrain_tiny_sdxl.Checkpoint(tmp_path / "stage", model=other).load() == 7
    assert torch.equal(layer.weight, other.weight)
    assert pretrain_tiny_sdxl.Checkpoint(tmp_path / "none", model=other).load() == 0


def test_embedded_base_has_the_structure_of_sdxl():
    pipeline = StableDiffusionXLPipeline.from_pretrained(BASE)
    config = pipeline.unet.config
    assert config.addition_embed_type == "text_time" and config.use_linear_projection
    assert config.down_block_types[0] == "DownBlock2D" and config.transformer_layers_per_block[-1] > 1
    hidden = pipeline.text_encoder.config.hidden_size + pipeline.text_encoder_2.config.hidden_size
    assert config.cross_attention_dim == hidden
    assert pipeline.vae_scale_factor == 8 and pipeline.vae.config.latent_channels == config.in_channels
    assert {model.dtype for model in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)} == {
        torch.float32
    }


def test_embedded_base_reads_identifiers():
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer")
    ids = tokenizer("a photo of [V] cat in the jungle").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "aphotoof[v]catinthejungle"
    assert len(ids) <= tokenizer.model_max_length
