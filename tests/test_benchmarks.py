"""What the benchmarks measure on."""

import torch
from accelerate import init_empty_weights

from benchmarks import basis, block
from benchmarks.sdxl_shape import base_folder, build_sdxl_shape
from inference.base import base_geometry, load_pipeline
from methods.components import TARGETS


def test_the_full_shape_is_sdxls():
    with init_empty_weights():
        pipeline = build_sdxl_shape("full")
    # as published: the UNet's 2.6 billion parameters, CLIP ViT-L's and OpenCLIP ViT-bigG's text towers, the autoencoder
    counts = {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "vae": 83_653_863}
    assert {name: getattr(pipeline, name).num_parameters() for name in counts} == counts
    targets = [name for name, _ in pipeline.unet.named_modules() if name.endswith(TARGETS["unet"])]
    assert len(targets) == 560


def test_a_shape_is_a_base_like_any_other(monkeypatch):
    monkeypatch.setitem(build_sdxl_shape.__globals__["SHAPES"], "sixteenth", 16)
    with base_folder("sixteenth") as folder:
        assert base_geometry(folder) == (512, 32)
        pipeline = load_pipeline(folder, torch.float32, "cpu")
        latents = torch.randn(1, 4, 8, 8)
        added = {"text_embeds": torch.randn(1, 80), "time_ids": torch.zeros(1, 6)}
        with torch.no_grad():
            prediction = pipeline.unet(latents, 1, torch.randn(1, 77, 128), added_cond_kwargs=added).sample
        assert prediction.shape == latents.shape


def test_what_an_adapter_adds_to_a_block(capsys, monkeypatch):
    """NoRA keeps fewer activations than LoRA, at any speed of this machine."""
    monkeypatch.setattr(block, "WIDTH", 320)
    monkeypatch.setattr(block, "CONTEXT", 128)
    block.main(["--repeats", "1", "--tokens", "256"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    kept = {row[0]: float(row[3]) for row in rows}
    assert kept["frozen"] == 1 < kept["NoRA (64, 8)"] < kept["LoRA 16"]


def test_the_bases_of_a_whole_model(capsys, monkeypatch):
    monkeypatch.setitem(build_sdxl_shape.__globals__["SHAPES"], "sixteenth", 16)
    basis.main(["--base", "sixteenth", "--outer_rank", "16"])
    assert "736 layers" in capsys.readouterr().out
