"""The training script, end to end on small real models."""

import gc
import json
import os
import re
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from tiny_sdxl import build_pipeline, live_outputs, outputs, saved_base
from transformers import CLIPTextModel

import train_dreambooth_nora_sdxl as trainer
from dreambooth import batches
from dreambooth.prior import class_image_name
from inference.base import load_pipeline
from inference.load import load_adapter
from methods.components import FOLDED_WEIGHTS, INNER_WEIGHTS, adapter_components
from methods.registry import METHODS
from nora.files import parse_inner
from runs.checkpoints import FolderLock
from settings.base import BaseOptions
from settings.learning import LR_SCHEDULES
from settings.training import FLAGS, TrainConfig
from trainer import run as run_module
from trainer import samples

ROOT = Path(__file__).parent.parent
CAT = ROOT / "assets" / "subjects" / "cat"
QUICK = {
    "instance_data_dir": str(CAT),
    "instance_prompt": "a photo of [V] cat",
    "rank": 4,
    "max_train_steps": 2,
    "train_batch_size": 2,
    "learning_rate": 1e-2,
    "text_encoder_lr": 1e-2,
    "center_crop": True,
    "num_validation_images": 0,
    "num_inference_steps": 2,
    "report_to": "none",
}


def run(folder, **options) -> Path:
    base = {"pretrained_model_name_or_path": str(saved_base()), "output_dir": str(folder)}
    AcceleratorState._reset_state(True)
    return trainer.train(TrainConfig.of(**(QUICK | base | options)))


def losses(folder) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def nora_run(tmp_path_factory):
    options = {"train_text_encoder": True, "num_validation_images": 2, "report_to": "tensorboard"}
    return run(tmp_path_factory.mktemp("nora"), **options)


# --- what a run writes ------------------------------------------------------------------------------------------------


def test_files_of_a_run(nora_run):
    lines = [json.loads(line) for line in (nora_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["loss"] > 0 and line["learning_rate"] == 1e-2 and line["seconds"] > 0 for line in lines)
    record = json.loads((nora_run / "run.json").read_text())
    assert record["config"]["rank"] == 4 and record["method"] == "nora"
    assert set(record["base_fingerprints"]) == {"unet", "text_encoder", "text_encoder_2"}
    assert record["peak_memory_mb"] > 10 and record["timings"]["train_seconds"] > 0
    parts = ("unet", "text_encoder", "text_encoder_2")
    peft = [f"peft/{part}/{file}" for part in parts for file in ("adapter_config.json", "adapter_model.safetensors")]
    files = [FOLDED_WEIGHTS, INNER_WEIGHTS, f"{nora_run.name}.safetensors", *peft]
    assert record["files"] == {name: (nora_run / name).stat().st_size for name in files}
    images = sorted((nora_run / "samples").glob("*.png"))
    assert len(images) == 2 and Image.open(images[0]).size == (32, 32)
    card = (nora_run / "README.md").read_text()
    assert "instance_prompt: a photo of [V] cat" in card and "![loss](loss.png)" in card
    assert Image.open(nora_run / "loss.png").size == (960, 480)
    assert all(f"samples/{image.name}" in card for image in images)
    assert list((nora_run / "logs").rglob("events.out.tfevents.*"))
    assert not [path for path in nora_run.iterdir() if path.name.startswith(".")]


def test_folded_file_has_diffusers_keys_alone(nora_run):
    weights = load_file(nora_run / FOLDED_WEIGHTS)
    parts = {"unet.", "text_encoder.text_model.encoder.layers.", "text_encoder_2.text_model.encoder.layers."}
    assert {part for part in parts if any(key.startswith(part) for key in weights)} == parts
    assert all(re.search(r"\.lora_[AB]\.weight$", key) for key in weights)


def test_inner_file_layout(nora_run):
    """Stacked by shape; by module it has what the folded file has, and no statistics."""
    folded, inner = load_file(nora_run / FOLDED_WEIGHTS), parse_inner(nora_run / INNER_WEIGHTS)
    assert {f"{key}.{entry}" for key, entries in inner.trained.items() for entry in entries} == set(folded)
    for entries in inner.trained.values():  # 8 x rank, which is also the layers' smaller side
        assert {entry: tuple(one.shape) for entry, one in entries.items()} == {
            "lora_A.weight": (4, 32),
            "lora_B.weight": (32, 4),
        }
    assert not inner.statistics and set(inner.fingerprints) == set(inner.trained)
    assert len(load_file(nora_run / INNER_WEIGHTS)) == 3


def test_an_inner_file_with_statistics_has_one_of_each_input(tmp_path):
    inner = load_file(run(tmp_path, method_args=["statistic=subject"], max_train_steps=1) / INNER_WEIGHTS)
    # to_q, to_k and to_v of self-attention share their input; to_k and to_v of cross-attention see the prompt's.
    statistics = [key for key in inner if "awsvd_stats" in key]
    attention = "unet.down_blocks.1.attentions.0.transformer_blocks.0."
    assert sum(key.startswith(attention + "attn1.to_") for key in statistics) == 2
    assert len([key for key in statistics if key.startswith("unet.") and "attn2.to_k" in key]) <= 1


def test_trained_parameters_are_counted(nora_run):
    trained = parse_inner(nora_run / INNER_WEIGHTS).trained
    count = sum(tensor.numel() for entries in trained.values() for tensor in entries.values())
    assert json.loads((nora_run / "run.json").read_text())["trainable_parameters"] == count


# --- point 2: four ways to the same image -----------------------------------------------------------------------------


def test_live_folded_inner_and_merged_agree(tmp_path, monkeypatch):
    live = {}
    save = run_module.save_adapter

    def save_and_look(adapter, models, folder, **formats):
        names = save(adapter, models, folder, **formats)
        live.update(live_outputs(models))
        return names

    monkeypatch.setattr(run_module, "save_adapter", save_and_look)
    folder = run(tmp_path / "run", train_text_encoder=True, max_train_steps=5, learning_rate=5e-2, text_encoder_lr=5e-2)

    def fresh():
        return StableDiffusionXLPipeline.from_pretrained(saved_base(), torch_dtype=torch.float32)

    base = outputs(fresh())
    stock, inner, merged = fresh(), fresh(), fresh()
    stock.load_lora_weights(str(folder))
    load_adapter(inner, folder / INNER_WEIGHTS)
    load_adapter(merged, folder / INNER_WEIGHTS)
    merged.fuse_lora(components=["unet", "text_encoder", "text_encoder_2"])
    for name, expected in live.items():
        assert (expected - base[name]).abs().max() > 1e-2, f"the adapter leaves {name} as it was"
        for pipeline in (stock, inner, merged):
            assert (outputs(pipeline)[name] - expected).abs().max() < 1e-4, name


# --- methods differ in the method alone -------------------------------------------------------------------------------


def test_lora_and_nora_start_at_the_same_loss(tmp_path):
    nora, lora = (losses(run(tmp_path / method, method=method)) for method in ("nora", "lora"))
    assert nora[0] == pytest.approx(lora[0], rel=1e-5) and nora[1] != lora[1]


def test_lora_run_has_the_folded_file_alone(tmp_path):
    folder = run(tmp_path, method="lora", rank=None, train_text_encoder=True)
    assert not (folder / INNER_WEIGHTS).exists()
    weights = load_file(folder / FOLDED_WEIGHTS)
    assert {tensor.shape[0] for key, tensor in weights.items() if "lora_A" in key} == {4}
    StableDiffusionXLPipeline.from_pretrained(saved_base()).load_lora_weights(str(folder))


SMALL = {"oft": ["block_size=8"], "fourierft": ["n_frequency=100"], "adalora": ["init_rank=4", "target_rank=2"]}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_by_its_name(tmp_path, method):
    """The script's own way: memory estimated, trained, written, read back and compared with what is in memory."""
    arguments = SMALL.get(method, ["rank=4"])
    options = {"train_text_encoder": not METHODS[method].no_text_encoders, "rank": None, "method_args": arguments}
    options |= {"convert_to_lora": None if METHODS[method].low_rank else 2}
    folder = run(tmp_path, method=method, **options)
    record = json.loads((folder / "run.json").read_text())
    assert record["method"] == method and set(arguments) <= set(record["config"]["method_args"])
    assert (folder / FOLDED_WEIGHTS).exists() == (METHODS[method].low_rank or method == "dora")
    assert (folder / "peft" / "unet" / "adapter_model.safetensors").is_file()
    assert ("approximate_lora_rank2.safetensors" in record["files"]) == (not METHODS[method].low_rank)


@pytest.mark.parametrize("method", ["adalora", "pissa", "lora-fa", "vera", "dylora"])
def test_methods_with_more_than_they_train_are_resumed_to_the_bit(tmp_path, method):
    """An allocator, a frozen start, a frozen factor, shared projections, a rank drawn each step."""
    options = {"method": method, "rank": None, "method_args": SMALL.get(method, ["rank=4"]), "max_train_steps": 3}
    options |= {"checkpointing_steps": 1, "train_text_encoder": True}
    whole = run(tmp_path / "whole", **options)
    shutil.copytree(whole / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    again = run(tmp_path / "again", **options, resume_from_checkpoint="latest")
    one, other = (load_file(folder / "checkpoint-3" / "trained.safetensors") for folder in (whole, again))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_same_seed_same_run(tmp_path):
    one, other = (load_file(run(tmp_path / name) / INNER_WEIGHTS) for name in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert losses(tmp_path / "one") == losses(tmp_path / "other")
    assert losses(run(tmp_path / "third", seed=1)) != losses(tmp_path / "one")


@pytest.mark.parametrize("text_encoder", [False, True])
def test_accumulation_is_a_bigger_batch(tmp_path, text_encoder):
    options = {"train_text_encoder": text_encoder, "max_train_steps": 3, "learning_rate": 1e-3, "text_encoder_lr": 1e-3}
    whole = run(tmp_path / "whole", train_batch_size=4, **options)
    split = run(tmp_path / "split", train_batch_size=2, gradient_accumulation_steps=2, **options)
    assert losses(whole) == pytest.approx(losses(split), rel=1e-4)
    for key, value in load_file(whole / FOLDED_WEIGHTS).items():
        assert torch.allclose(value, load_file(split / FOLDED_WEIGHTS)[key], atol=1e-4), key


def test_gradient_checkpointing_changes_nothing(tmp_path):
    options = {"train_text_encoder": True, "max_train_steps": 3, "learning_rate": 1e-3, "text_encoder_lr": 1e-3}
    plain, saving = run(tmp_path / "plain", **options), run(tmp_path / "saving", gradient_checkpointing=True, **options)
    assert losses(plain) == pytest.approx(losses(saving), rel=1e-5)


# --- options ----------------------------------------------------------------------------------------------------------


def test_pictures_are_encoded_in_fp32_whatever_is_trained_in(tmp_path, monkeypatch):
    """Weights rounded to bf16 would move the latents: here a bf16 run finds those of an fp32 one."""
    calls = []
    encode = AutoencoderKL.encode
    monkeypatch.setattr(AutoencoderKL, "encode", lambda *a, **k: calls.append(1) or encode(*a, **k))
    shared = {"encoded_cache_dir": str(tmp_path / "encoded")}
    run(tmp_path / "fp32", **shared)
    assert len(calls) == 6
    run(tmp_path / "bf16", mixed_precision="bf16", num_validation_images=1, **shared)
    assert len(calls) == 6


def test_bf16_trains_in_fp32(tmp_path, monkeypatch):
    dtypes = set()
    save = run_module.save_adapter

    def look(adapter, models, folder, **formats):
        dtypes.update((p.requires_grad, p.dtype) for model in models.values() for p in model.parameters())
        return save(adapter, models, folder, **formats)

    monkeypatch.setattr(run_module, "save_adapter", look)
    folder = run(tmp_path, mixed_precision="bf16", train_text_encoder=True, num_validation_images=1)
    assert dtypes == {(False, torch.bfloat16), (True, torch.float32)}
    assert all(0 < loss < 5 for loss in losses(folder))
    assert len(list((folder / "samples").glob("*.png"))) == 1


@pytest.mark.parametrize("schedule", LR_SCHEDULES)
def test_every_schedule(tmp_path, schedule):
    warmup = 0 if schedule == "constant" else 2
    options = {"lr_scheduler": schedule, "lr_warmup_steps": warmup, "max_train_steps": 6, "calibration_passes": 1}
    run(tmp_path, **options)
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates[:3] == pytest.approx([1e-2] * 3 if schedule == "constant" else [0, 5e-3, 1e-2])
    assert (rates[-1] < 1e-2) == (schedule not in ("constant", "constant_with_warmup"))


def test_velocity_base(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(saved_base(), base)
    path = base / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    velocity = losses(run(tmp_path / "v", pretrained_model_name_or_path=str(base)))
    assert velocity[0] != losses(run(tmp_path / "epsilon"))[0]


def test_prior_preservation_draws_what_is_missing(tmp_path):
    classes = tmp_path / "classes"
    classes.mkdir()
    Image.new("RGB", (40, 30), "red").save(classes / "mine.png")
    options = {"class_data_dir": str(classes), "class_prompt": "a photo of a cat", "num_class_images": 3}
    folder = run(tmp_path / "run", with_prior_preservation=True, **options)
    drawn = [class_image_name("a photo of a cat", seed) for seed in (0, 1)]
    assert sorted(path.name for path in classes.iterdir()) == [*drawn, "mine.png"]
    assert losses(folder)[0] > 1.5 * losses(run(tmp_path / "plain"))[0]  # the sum of two losses near 1
    before = {path: path.stat().st_mtime_ns for path in classes.iterdir()}
    run(tmp_path / "again", with_prior_preservation=True, **options)
    assert before == {path: path.stat().st_mtime_ns for path in classes.iterdir()}


def test_validation_while_training(tmp_path):
    options = {"validation_steps": 1, "num_validation_images": 1, "validation_prompt": ["[V] cat", "a cat in the snow"]}
    folder = run(tmp_path / "watched", **options)
    assert len(list((folder / "samples" / "step-000001").glob("*.png"))) == 2
    assert len(list((folder / "samples").glob("*.png"))) == 2
    assert losses(folder) == losses(run(tmp_path / "unwatched"))  # looking does not change the run


def test_subjects_of_one_prompt_are_drawn_once(tmp_path):
    concepts = [{"instance_prompt": "[V] cat", "instance_data_dir": str(CAT)}] * 2
    (tmp_path / "concepts.json").write_text(json.dumps(concepts))
    options = {"instance_data_dir": None, "instance_prompt": None, "concepts_list": str(tmp_path / "concepts.json")}
    folder = run(tmp_path / "run", **options, num_validation_images=1)
    assert len(list((folder / "samples").glob("*.png"))) == 1


def test_buckets_captions_and_several_subjects_in_one_run(tmp_path):
    for name, size in (("wide.png", (80, 40)), ("tall.png", (40, 80)), ("square.png", (50, 50))):
        (tmp_path / "cat").mkdir(exist_ok=True)
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / "cat" / name)
    (tmp_path / "cat" / "wide.txt").write_text("[V] cat on a sofa")
    entries = [
        {"instance_data_dir": str(tmp_path / "cat"), "instance_prompt": "a [V] cat", "class_prompt": "a cat"},
        {"instance_data_dir": str(CAT), "instance_prompt": "a [W] dog", "class_prompt": "a dog", "repeats": 2},
    ]
    for entry in entries:
        entry["class_data_dir"] = str(tmp_path / "class" / entry["class_prompt"])
    (tmp_path / "list.json").write_text(json.dumps(entries))
    folder = run(
        tmp_path / "run",
        instance_data_dir=None,
        instance_prompt=None,
        concepts_list=str(tmp_path / "list.json"),
        aspect_ratio_buckets="32,32;48,24;24,48",
        with_prior_preservation=True,
        num_class_images=2,
        max_train_steps=8,
        num_validation_images=1,
    )
    assert len(losses(folder)) == 8
    assert len(list((folder / "samples").glob("*.png"))) == 2  # one of each subject
    assert len(list((tmp_path / "class").rglob("*.png"))) == 4


def test_the_base_as_teacher_starts_without_a_prior_loss(tmp_path):
    """At the first step the adapter does nothing, so it agrees with its teacher."""
    teacher = {"with_prior_preservation": True, "prior_teacher": True, "class_prompt": "a photo of a cat"}
    plain, taught = losses(run(tmp_path / "plain")), losses(run(tmp_path / "taught", **teacher))
    assert plain[0] == pytest.approx(taught[0], rel=1e-5) and plain[1] != taught[1]
    free, held = (
        losses(run(tmp_path / name, prior_loss_weight=weight, max_train_steps=6, learning_rate=5e-2, **teacher))
        for name, weight in (("free", 0.0), ("held", 100.0))
    )
    assert free[0] == pytest.approx(held[0], rel=1e-4) and max(held[1:]) > 0


def test_masked_loss_ignores_what_is_black(tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in CAT.glob("*.png"):
        Image.new("L", (64, 64), 255).save(masks / path.name)
    plain = losses(run(tmp_path / "plain"))
    assert losses(run(tmp_path / "white", mask_data_dir=str(masks))) == pytest.approx(plain, rel=1e-5)
    for path in masks.iterdir():
        half = Image.new("L", (64, 64), 255)
        half.paste(0, (0, 0, 32, 64))
        half.save(path)
    assert losses(run(tmp_path / "half", mask_data_dir=str(masks)))[0] != pytest.approx(plain[0], rel=1e-3)


def test_validation_loss_and_gradient_norms_are_logged(tmp_path):
    folder = run(tmp_path, validation_loss_steps=1, validation_data_dir=str(CAT), max_train_steps=3)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    watched = [line["validation_loss"] for line in lines if "validation_loss" in line]
    assert len(watched) == 3 and len(losses(folder)) == 3
    assert losses(folder) == losses(run(tmp_path / "unwatched", max_train_steps=3))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match="the loss is (nan|inf) at step 2: the learning rate"):
        run(tmp_path, learning_rate=1e30, train_batch_size=1)
    assert not (tmp_path / FOLDED_WEIGHTS).exists()
    page = (tmp_path / "run.html").read_text()
    assert "Stopped at step 1 of 2" in page and "at step 2: the learning rate" in page  # the alarm


def test_epochs_give_the_steps(tmp_path):
    folder = run(tmp_path, max_train_steps=None, num_train_epochs=2, repeats=2)
    assert len(losses(folder)) == 2 * len(list(CAT.glob("*.png"))) * 2 // 2


def test_sampling_by_epochs_as_in_diffusers(tmp_path):
    options = {"validation_prompt": ["[V] cat"], "validation_epochs": 1, "num_validation_images": 1}
    folder = run(tmp_path, max_train_steps=7, **options)
    assert sorted(path.name for path in (folder / "samples").iterdir()) == [
        "step-000003",
        "step-000006",
        "v-cat-seed0.png",
    ]


def test_another_autoencoder_is_used_everywhere_and_gets_no_variant(tmp_path, monkeypatch):
    base, seen = build_pipeline(seed=5), []
    base.vae.save_pretrained(tmp_path / "vae")
    decode = type(base.vae).decode
    monkeypatch.setattr(type(base.vae), "decode", lambda vae, *a, **k: seen.append(vae) or decode(vae, *a, **k))
    options = {"pretrained_vae_model_name_or_path": str(tmp_path / "vae"), "num_validation_images": 1}
    other = run(tmp_path / "run", **options)
    assert losses(other)[0] != losses(run(tmp_path / "plain"))[0]
    for vae in seen:
        assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), base.vae.parameters()))


@pytest.mark.parametrize(("precision", "dtype"), [(None, torch.float32), ("bf16", torch.bfloat16)])
def test_class_images_have_a_precision_of_their_own(tmp_path, monkeypatch, precision, dtype):
    """fp32 on a CPU unless the flag says otherwise, whatever the training's is; with another autoencoder too."""
    build_pipeline(seed=5).vae.save_pretrained(tmp_path / "vae")
    drawn, generate = [], samples.generate_images
    monkeypatch.setattr(samples, "generate_images", lambda pipe, *a, **k: drawn.append(pipe) or generate(pipe, *a, **k))
    options = {"with_prior_preservation": True, "class_data_dir": str(tmp_path / "class"), "class_prompt": "a cat"}
    options |= {"num_class_images": 1, "pretrained_vae_model_name_or_path": str(tmp_path / "vae")}
    options |= {"mixed_precision": "bf16", "prior_generation_precision": precision}
    run(tmp_path / "run", max_train_steps=1, **options)
    assert [pipeline.unet.dtype for pipeline in drawn] == [dtype]
    assert len(list((tmp_path / "class").glob("*.png"))) == 1


def test_dry_run_writes_nothing(tmp_path, capsys):
    run(tmp_path / "run", dry_run=True)
    assert "6 instance pictures" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_one_process_reports(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run(tmp_path / "run", dry_run=True)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("optimizer", ["SGD", "prodigy", "Adafactor", "Muon"])
def test_other_optimizers_train(tmp_path, optimizer):
    first, *_, last = losses(run(tmp_path, optimizer=optimizer, learning_rate=1.0, max_train_steps=4))
    assert first != last


def test_random_crops_are_trained_on(tmp_path):
    Image.effect_noise((90, 40), 60).convert("RGB").save(tmp_path / "wide.png")
    options = {"instance_data_dir": str(tmp_path), "max_train_steps": 3, "learning_rate": 1e-6}
    middle = losses(run(tmp_path / "middle", center_crop=True, **options))
    crops = losses(run(tmp_path / "crops", center_crop=False, **options))
    assert middle != crops


def test_what_was_frozen_is_freed(tmp_path, monkeypatch):
    seen = []
    load = trainer.Base.load

    def remember(*args):
        pipeline = load(*args)
        seen.extend(weakref.ref(model) for model in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2))
        return pipeline

    alive = []
    put_in = trainer.put_in

    def look(*args):
        gc.collect()
        alive.append([ref() is not None for ref in seen])
        put_in(*args)

    monkeypatch.setattr(trainer.Base, "load", remember)
    monkeypatch.setattr(trainer, "put_in", look)
    run(tmp_path / "frozen")
    assert alive == [[False, False, False]]


def test_latents_and_prompts_are_encoded_once(tmp_path, monkeypatch):
    calls = []
    forward = CLIPTextModel.forward
    monkeypatch.setattr(CLIPTextModel, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    shared = {"encoded_cache_dir": str(tmp_path / "encoded")}
    run(tmp_path / "short", method="lora", max_train_steps=1)
    once = len(calls)
    run(tmp_path / "long", method="lora", max_train_steps=4, **shared)
    assert len(calls) == 2 * once
    run(tmp_path / "next", method="lora", **shared)  # encoded by an earlier run
    assert len(calls) == 2 * once


def test_text_encoders_that_learn_no_more_are_not_run(tmp_path, monkeypatch):
    calls = []
    forward = CLIPTextModel.forward
    monkeypatch.setattr(CLIPTextModel, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    options = {"train_text_encoder": True, "encoded_cache_dir": str(tmp_path / "encoded")}
    counts = []
    for steps in (2, 4, 8):  # they learn during the first 2; the first run also encodes the base's prompts
        calls.clear()
        run(tmp_path / str(steps), max_train_steps=steps, train_text_encoder_frac=2 / steps, **options)
        counts.append(len(calls))
    assert counts[1] == counts[2]


def test_base_is_left_as_it_was(tmp_path):
    base = tmp_path / "base"
    shutil.copytree(saved_base(), base)
    before = {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}
    run(tmp_path / "run", pretrained_model_name_or_path=str(base), train_text_encoder=True)
    assert before == {path: path.read_bytes() for path in base.rglob("*") if path.is_file()}


def test_record_stands_before_the_samples(tmp_path, monkeypatch):
    def fail(*args):
        raise torch.OutOfMemoryError("no memory left for samples")

    monkeypatch.setattr(samples.Sampler, "samples", fail)
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path)
    assert {FOLDED_WEIGHTS, INNER_WEIGHTS, "run.json", "README.md", "metrics.jsonl"} <= set(os.listdir(tmp_path))


def test_a_second_run_leaves_nothing_of_the_first(tmp_path):
    run(tmp_path, num_validation_images=1)
    run(tmp_path, method="lora")
    files = {FOLDED_WEIGHTS, f"{tmp_path.name}.safetensors", "peft", "run.json", "README.md", "loss.png", "run.html"}
    assert set(os.listdir(tmp_path)) == {*files, "metrics.jsonl", "encoded"}


@pytest.mark.parametrize("name", ["best/mine.txt", "samples/mine.png", "README.md"])
def test_a_users_own_files_are_not_replaced(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="it looks like your own"):
        run(tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_a_run_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    run(tmp_path, method="lora", checkpointing_steps=1, max_train_steps=1)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def fail(*args):
        raise ValueError("at the first step")

    monkeypatch.setattr(trainer, "check_loss", fail)
    with pytest.raises(ValueError, match="at the first step"):
        run(tmp_path, method="lora", rank=2)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path in before}


def test_a_first_step_without_its_caption(tmp_path, monkeypatch):
    """Of the text encoders' gradient nothing can be said yet; at the next step it is looked at."""
    looked, batch = [], batches.training_batch

    def drop_the_first(*args, step, **options):
        return batch(*args, step=step, **(options | {"caption_dropout": 1.0 if step == 0 else 0.0}))

    class Watch(run_module.GradientWatch):
        def norms(self, teaches_text):
            looked.append(sorted(norms := super().norms(teaches_text)))
            return norms

    monkeypatch.setattr(batches, "training_batch", drop_the_first)
    monkeypatch.setattr(run_module, "GradientWatch", Watch)
    run(tmp_path, method="lora", train_text_encoder=True, caption_dropout=0.1)
    assert looked == [["unet"], ["text_encoder", "text_encoder_2"]]


def test_one_run_at_a_time_in_a_folder(tmp_path):
    with FolderLock() as first, FolderLock() as second:
        first.take(tmp_path)
        with pytest.raises(ValueError, match="is in use by another run"):
            second.take(tmp_path)
        with pytest.raises(ValueError, match="is in use by another run"):
            run(tmp_path, method="lora")
    assert os.listdir(tmp_path) == []
    with FolderLock() as third:
        third.take(tmp_path)


def test_record_says_what_was_decided(tmp_path):
    record = json.loads((run(tmp_path, rank=2) / "run.json").read_text())
    decided = [record["config"][name] for name in ("resolution", "mixed_precision", "validation_prompt")]
    assert decided == [32, "no", ["a photo of [V] cat"]]
    assert record["outer_ranks"] == [16]


def test_every_flag_is_read_outside_the_records():
    """A flag that nothing reads does nothing."""
    rooms = ("settings", "dreambooth", "runs", "trainer")
    sources = [ROOT / "train_dreambooth_nora_sdxl.py", *(path for room in rooms for path in (ROOT / room).glob("*.py"))]
    text = "\n".join(path.read_text() for path in sources)
    unread = [name for name in FLAGS if not re.search(rf"\.{name}\b", text)]
    # options of methods are read by the registry, by their flag's name; old launchers set local_rank, nothing reads it
    by_registry = {option.flag for method in METHODS.values() for option in method.options}
    given = dict.fromkeys(("pretrained_model_name_or_path", "revision", "variant", "base_config"), "x")
    passed_on = set(BaseOptions(**given).download_options())  # by name, to `load_pipeline`
    assert set(unread) - by_registry - passed_on == {"local_rank"}


# --- as a command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", [[sys.executable], [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]])
def test_both_ways_to_launch(tmp_path, launcher):
    command = [*launcher, str(ROOT / "train_dreambooth_nora_sdxl.py")]
    for name, value in (QUICK | {"output_dir": "run", "max_train_steps": 1}).items():
        command += [f"--{name}", str(value)]
    command += ["--pretrained_model_name_or_path", str(saved_base())]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / FOLDED_WEIGHTS).is_file() and "training" in done.stderr


BASE_FLAGS = [
    *("--pretrained_model_name_or_path", "BASE"),
    *("--instance_data_dir", str(CAT)),
    *("--instance_prompt", "a photo of [V] cat"),
    *("--output_dir", "OUT"),
]


def without(flag):
    place = BASE_FLAGS.index(flag)
    return BASE_FLAGS[:place] + BASE_FLAGS[place + 2 :]


def with_flags(*flags):
    """Later flags win, as on any command line."""
    return BASE_FLAGS + list(flags)


BAD = {
    "no such folder": (with_flags("--instance_data_dir", "nowhere"), "nowhere does not exist"),
    "empty folder": (with_flags("--instance_data_dir", "EMPTY"), "holds no picture"),
    "not an image": (with_flags("--instance_data_dir", "JUNK"), "notes.txt is not a picture"),
    "cut-off image": (with_flags("--instance_data_dir", "CUT"), "cut.png is broken"),
    "missing prompt": (without("--instance_prompt"), "--instance_prompt is empty"),
    "no pictures": (without("--instance_data_dir"), "name exactly one of --instance_data_dir"),
    "two sources": (with_flags("--dataset_name", "x"), "--instance_data_dir and --dataset_name: name exactly one"),
    "blank prompt": (with_flags("--instance_prompt", " "), "--instance_prompt is empty"),
    "long prompt": (with_flags("--instance_prompt", "cat " * 99), "tokens and the base reads 32"),
    "long sample prompt": (with_flags("--validation_prompt", "cat " * 99), "tokens and the base reads 32"),
    "no base": (without("--pretrained_model_name_or_path"), "--pretrained_model_name_or_path"),
    "base that is not there": (with_flags("--pretrained_model_name_or_path", "./none"), "none does not exist"),
    "base without UNet": (with_flags("--pretrained_model_name_or_path", "NO_UNET"), "lacks unet"),
    "outer rank too big": (with_flags("--outer_rank", "33"), r"unet: outer_r=33 exceeds min\(out, in\)=32 at down_bl"),
    "rank above outer rank": (with_flags("--rank", "9", "--outer_rank", "8"), "--rank 9 exceeds --outer_rank 8"),
    "rank above the layer": (with_flags("--rank", "33"), r"unet: r=33 exceeds min\(out, in\)=32 at down_blocks"),
    "rank zero": (with_flags("--rank", "0"), "--rank 0 must be at least 1"),
    "negative learning rate": (with_flags("--learning_rate", "-1e-4"), "--learning_rate -0.0001 must be above 0"),
    "infinite learning rate": (with_flags("--learning_rate", "inf"), "--learning_rate inf must be a finite number"),
    "zero steps": (with_flags("--max_train_steps", "0"), "--max_train_steps 0 must be from 1 to 1000000"),
    "unknown flag": (with_flags("--ranks", "4"), "unrecognized arguments: --ranks 4"),
    "unknown method": (with_flags("--method", "dorra"), "--method dorra is not known .did you mean dora"),
    "another method's option": (with_flags("--method", "lora", "--method_args", "factor=8"), "--method lora has rank"),
    "what no layer can hold": (with_flags("--method", "oft", "--method_args", "block_size=5"), "does not divide the"),
    "kohya's names for no factors": (with_flags("--method", "loha", "--output_kohya_format"), "no pair of factors"),
    "nothing left": (with_flags("--method", "hra", "--output_peft_format", "False"), "would leave nothing of"),
    "exact already": (with_flags("--method", "lora", "--convert_to_lora", "4"), "whose LoRA file is exact"),
    "DoRA's text encoders": (with_flags("--method", "dora", "--train_text_encoder"), "leave one out"),
    "unknown schedule": (with_flags("--lr_scheduler", "wave"), "--lr_scheduler wave is not known"),
    "schedule without rules": (with_flags("--lr_scheduler", "piecewise_constant"), "piecewise_constant is not known"),
    "no inference steps": (with_flags("--num_inference_steps", "0"), "--num_inference_steps 0 must be at least 1"),
    "sample prompt twice": (with_flags("--validation_prompt", "a", "a"), "--validation_prompt has 'a' twice"),
    "samples of none": (with_flags("--num_validation_images", "0", "--validation_steps", "5"), "draws nothing"),
    "idle gamma": (with_flags("--awsvd_gamma", "1", "--outer_init", "svd"), "--awsvd_gamma 1.0 has no effect with svd"),
    "idle std": (with_flags("--inner_std", "1"), "--inner_std 1.0 has no effect with matched"),
    "idle prior weight": (with_flags("--prior_loss_weight", "2"), "--prior_loss_weight has no effect"),
    "class folder is a file": (
        with_flags("--with_prior_preservation", "--class_data_dir", "FILE", "--class_prompt", "a cat"),
        "--class_data_dir file is a file",
    ),
    "junk in the class folder": (
        with_flags("--with_prior_preservation", "--class_data_dir", "JUNK", "--class_prompt", "a cat"),
        "notes.txt is not a picture",
    ),
    "not a number": (with_flags("--train_batch_size", "four"), "--train_batch_size"),
    "NoRA's flag for LoRA": (
        with_flags("--method", "lora", "--outer_rank", "8"),
        "--outer_rank 8 is an option of NoRA",
    ),
    "odd resolution": (with_flags("--resolution", "30"), "--resolution 30 must be a multiple of 8"),
    "prior without class": (with_flags("--with_prior_preservation"), "needs --class_data_dir"),
    "class without prior": (with_flags("--class_prompt", "a cat"), "--class_prompt has no effect without --with_prior"),
    "output is a file": (with_flags("--output_dir", "FILE"), "is a file"),
    "idle class folder": (
        with_flags("--class_data_dir", "EMPTY"),
        "--class_data_dir has no effect without",
    ),
    "unknown optimizer": (with_flags("--optimizer", "SGDM"), "--optimizer SGDM is not known"),
    "optimizer that needs a closure": (with_flags("--optimizer", "LBFGS"), "can't train an adapter"),
    "argument it does not take": (with_flags("--optimizer_args", "nesterov=1"), "--optimizer_args nesterov: AdamW"),
    "argument without a value": (with_flags("--optimizer_args", "momentum"), "must look like momentum=0.9"),
    "8-bit SGD": (with_flags("--use_8bit_adam", "--optimizer", "SGD"), "--use_8bit_adam is AdamW's"),
    "two loss weights": (with_flags("--snr_gamma", "5", "--debiased_estimation"), "choose one"),
    "EDM with min-SNR": (with_flags("--do_edm_style_training", "--snr_gamma", "5"), "weights of its own"),
    "DoRA with NoRA": (with_flags("--use_dora", "--method", "nora"), "--use_dora is an option of LoRA"),
    "two ways to teach text": (with_flags("--train_text_encoder", "--train_text_encoder_ti"), "choose one"),
    "fraction above one": (with_flags("--train_text_encoder", "--train_text_encoder_frac", "2"), "must be from 0 to 1"),
    "unknown tracker": (with_flags("--report_to", "paper"), "--report_to paper is not known"),
    "unknown bucket": (with_flags("--aspect_ratio_buckets", "30x30"), "--aspect_ratio_buckets"),
    "no such checkpoint": (
        with_flags("--resume_from_checkpoint", "checkpoint-7"),
        "checkpoint-7 is no whole checkpoint",
    ),
    "hub without push": (with_flags("--hub_model_id", "me/cat"), "--hub_model_id has no effect without --push"),
    "config that is not there": (with_flags("--config", "none.yaml"), "none.yaml"),
    "base of the wrong kind": (
        with_flags("--pretrained_vae_model_name_or_path", "EMPTY"),
        "autoencoder empty could not",
    ),
    "output folder with the user's own files": (with_flags("--output_dir", "MINE"), "mine has README.md, and no run"),
    "output folder with a file called samples": (with_flags("--output_dir", "SAMPLES"), "has samples, and no run"),
    "pictures go where the run goes": (with_flags("--output_dir", str(CAT)), "--instance_data_dir and --output_dir"),
    "class images among the pictures": (
        with_flags("--with_prior_preservation", "--class_data_dir", str(CAT), "--class_prompt", "a cat"),
        "--class_data_dir and --instance_data_dir are the same folder",
    ),
    "output that can't be made": (with_flags("--output_dir", "/proc/out"), "--output_dir /proc/out can't be made"),
    "output behind a broken link": (with_flags("--output_dir", "LINK"), "link is a broken link"),
    "cache that is a file": (with_flags("--encoded_cache_dir", "FILE"), "--encoded_cache_dir file is a file"),
    "config that is a folder": (with_flags("--config", "EMPTY"), "--config empty can't be read: Is a directory"),
    "no new word in the prompt": (
        with_flags("--train_text_encoder_ti", "--token_abstraction", "[W]"),
        r"--token_abstraction \[W\] is in no prompt",
    ),
    "resolution too fine": (with_flags("--resolution", "36"), "multiple of 8"),
    "resolution that the base can't": (with_flags("--resolution", "1000020"), "multiple of 8"),
    "LoRA's rank above the layer": (
        with_flags("--method", "lora", "--rank", "33"),
        r"--rank 33 exceeds min\(out, in\)=32",
    ),
    "long class prompt": (
        with_flags("--with_prior_preservation", "--class_data_dir", "CLASS", "--class_prompt", "cat " * 99),
        "tokens and the base reads 32",
    ),
    "autoencoder of another family": (
        with_flags("--pretrained_vae_model_name_or_path", "VAE"),
        "makes 8 latent channels of 1/4 of a picture's size, and the base's own 4",
    ),
    "flow-matching base": (with_flags("--pretrained_model_name_or_path", "FLOW"), "has a FlowMatchEulerDiscreteSch"),
    "base without a size": (with_flags("--pretrained_model_name_or_path", "NO_SIZE"), "sample_size"),
    "captions of no metadata": (with_flags("--caption_column", "mood"), "--caption_column mood needs a metadata.jsonl"),
    "transparency that is not there": (with_flags("--alpha_mask"), "no picture that is transparent anywhere"),
    "learning rate as an argument": (
        with_flags("--optimizer_args", "lr=5"),
        "--optimizer_args lr=5 would have no effect: use --learning_rate",
    ),
    "Muon with DoRA's vectors": (with_flags("--use_dora", "--optimizer", "Muon"), "--optimizer Muon refuses"),
    "best of no evaluation": (with_flags("--best_by", "clip_t"), "--best_by has no effect without --eval_steps"),
    "evaluation without encoder": (
        with_flags("--eval_steps", "1", "--clip", "EMPTY", "--dino", "EMPTY"),
        "--clip .* could not be loaded",
    ),
    "evaluation by no protocol": (with_flags("--eval_steps", "1", "--eval_protocol", "x"), "choose one of dreambooth"),
    "xformers on a CPU": (with_flags("--enable_xformers_memory_efficient_attention"), "xformers"),
    "fp16 on a CPU": (with_flags("--mixed_precision", "fp16"), "--mixed_precision fp16 needs a GPU"),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="two of the cases are mistakes on a CPU only")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_writes_nothing(case, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "junk", "cut"):
        Path(name).mkdir()
    Path("junk/notes.txt").write_text("no picture")
    Image.effect_noise((64, 64), 50).save("cut/cut.png")
    Path("cut/cut.png").write_bytes(Path("cut/cut.png").read_bytes()[:900])
    Path("file").write_text("")
    shutil.copytree(saved_base(), "no_unet", ignore=shutil.ignore_patterns("unet"))
    Path("mine").mkdir()
    Path("mine/README.md").write_text("my own")
    Path("samples").mkdir()
    Path("samples/samples").write_text("mine")
    Path("link").symlink_to("/nowhere/at/all")
    if "FLOW" in BAD[case][0] or "NO_SIZE" in BAD[case][0]:
        for name, file, change in (
            ("flow", "model_index.json", {"scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}),
            ("no_size", "unet/config.json", {"sample_size": None}),
        ):
            shutil.copytree(saved_base(), name)
            Path(name, file).write_text(json.dumps(json.loads(Path(name, file).read_text()) | change))
    if "VAE" in BAD[case][0]:
        vae = AutoencoderKL.load_config(saved_base() / "vae") | {"latent_channels": 8}
        AutoencoderKL.from_config(vae).save_pretrained("vae")
    names = (
        "EMPTY",
        "JUNK",
        "CUT",
        "FILE",
        "NO_UNET",
        "OUT",
        "MINE",
        "SAMPLES",
        "LINK",
        "CLASS",
        "VAE",
        "FLOW",
        "NO_SIZE",
    )
    places = {name: name.lower() for name in names}
    places["BASE"] = str(saved_base())
    flags, words = BAD[case]
    before = sorted(Path().rglob("*"))
    for dry in ([], ["--dry_run"]):  # which refuses all that the run would
        AcceleratorState._reset_state(True)
        with pytest.raises(SystemExit) as exit_:
            trainer.main([places.get(flag, flag) for flag in flags] + dry)
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert exit_.value.code == 2
        assert len(error) == 1 and re.search(words, error[0]), error
        assert sorted(Path().rglob("*")) == before


def test_adapter_of_another_base_is_refused(nora_run, tmp_path):
    for file in (FOLDED_WEIGHTS, INNER_WEIGHTS):
        other = load_pipeline(saved_base(48), torch.float32, "cpu")
        with pytest.raises(ValueError, match="base"):
            load_adapter(other, nora_run / file)
        assert not any(
            "lora" in key or "nora" in key for m in adapter_components(other).values() for key in m.state_dict()
        )


def test_the_measured_statistics_do_not_depend_on_the_batch(tmp_path):
    """A batch of 4, or two of 2: the same samples are measured, and the outer factors are the same."""
    ends = [
        run(
            tmp_path / str(batch),
            train_batch_size=batch,
            gradient_accumulation_steps=4 // batch,
            max_train_steps=1,
            method_args=["statistic=subject"],
        )
        for batch in (4, 2, 1)
    ]
    first, *others = (load_file(end / INNER_WEIGHTS) for end in ends)
    statistics = [key for key in first if key.endswith(".awsvd_stats")]
    for other in others:
        for key in statistics:
            assert torch.allclose(other[key].float(), first[key].float(), rtol=2e-3), key  # a digit of float16
    assert statistics
