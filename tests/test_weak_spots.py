"""Faults that diffusers' SDXL DreamBooth scripts have, one by one, and the tests that show they are not here.

A test that reads more naturally beside its module stands there, and the list says where; the others are below.
"""

import ast
import errno
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from PIL import Image
from safetensors import SafetensorError
from test_dreambooth_loss import STEPS, batch, objective
from test_trainer import BASE_FLAGS, CAT, losses, run
from tiny_sdxl import saved_base

import train_dreambooth_nora_sdxl as trainer
from storage import tensors
from storage.pictures import find_images
from trainer import samples

HERE = "test_weak_spots"
FAULTS = {
    # mathematics
    "embeddings repeated as [i, c, i, c] for images [i, i, c, c]": [
        "test_dreambooth_loss::test_prompts_are_paired_with_their_pictures",
        "test_dreambooth_draws::test_class_pictures_follow_instance_pictures",
        f"{HERE}::test_every_sample_of_a_batch_gets_its_own_prompt",
    ],
    "2B min-SNR weights multiplied onto B losses": [
        "test_dreambooth_loss::test_class_images_and_weights_stay_with_their_samples"
    ],
    "2B EDM weights multiplied onto B losses": [f"{HERE}::test_edm_weights_stay_with_their_samples"],
    "min-SNR of a v-prediction base as weight + 1": [
        "test_dreambooth_loss::test_min_snr_weights",
        "test_dreambooth_loss::test_noise_and_velocity_losses_are_the_same_for_the_same_error_of_the_picture",
    ],
    "class images with the instance's size and crop": [
        "test_dreambooth_encode::test_every_picture_keeps_its_own_size_and_crop",
        "test_dreambooth_draws::test_conditioning_prompt_and_mask_go_with_their_picture",
    ],
    "the same noise and timesteps in every process": [
        "test_dreambooth_draws::test_split_of_a_step_does_not_matter",
        "test_distributed::test_two_processes_are_one_with_twice_the_batch",
    ],
    # precision
    "Adam on bf16 weights": ["test_trainer::test_bf16_trains_in_fp32"],
    # waste
    "an encoding by the autoencoder at every step": ["test_dreambooth_encode::test_pictures_are_encoded_once"],
    "captions encoded again at every step": ["test_trainer::test_latents_and_prompts_are_encoded_once"],
    "all pixels in memory, times the repeats": [f"{HERE}::test_repeats_cost_no_memory"],
    "crops and mirror images that never vary": [
        "test_dreambooth_draws::test_all_variants_are_shown",
        "test_trainer::test_random_crops_are_trained_on",
    ],
    "text encoders that are deleted from a list only": ["test_trainer::test_what_was_frozen_is_freed"],
    "validation that loads encoders in fp32": [f"{HERE}::test_looking_keeps_modes_and_precision"],
    "a UNet left as validation set it": [
        f"{HERE}::test_looking_keeps_modes_and_precision",
        "test_trainer::test_validation_while_training",
    ],
    "the whole UNet in fp32 and a second one loaded at the end": [f"{HERE}::test_looking_keeps_modes_and_precision"],
    # resume
    "the data's position, other processes' random state and the rank not saved": [
        "test_resume::test_resumed_run_ends_like_the_whole_one",
        "test_resume::test_another_run_is_refused_with_the_difference",
        "test_distributed::test_two_processes_are_one_with_twice_the_batch",
    ],
    "a crash on checkpoint-x": ["test_resume::test_torn_and_foreign_folders_are_passed_over"],
    "the old checkpoint deleted before the new one is written": [
        "test_resume::test_limit_keeps_the_newest_and_deletes_only_after_writing",
        "test_resume::test_old_checkpoints_survive_a_failed_write",
    ],
    "latest picks a torn checkpoint": ["test_resume::test_torn_and_foreign_folders_are_passed_over"],
    # robustness
    "a stray file or folder crashes the loader": [f"{HERE}::test_stray_files_and_folders"],
    "an empty folder gives a sampler's error": ["test_trainer::test_bad_input_is_one_sentence_and_writes_nothing"],
    "no guard for NaN": ["test_trainer::test_a_loss_that_is_no_number_stops_the_run"],
    "no guard for memory that runs out": [f"{HERE}::test_what_runs_out_is_one_sentence"],
    "no guard for SIGINT": ["test_resume::test_asked_to_stop_it_saves_and_leaves"],
    "--prodigy_decouple False is True": ["test_flags::test_false_is_false"],
    "the base's revision and variant applied to another autoencoder": [
        "test_trainer::test_another_autoencoder_is_used_everywhere_and_gets_no_variant"
    ],
    "checkpoints uploaded to the hub": ["test_runs_exports::test_only_the_adapter_is_uploaded"],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_has_its_test(fault):
    for name in FAULTS[fault]:
        module, test = name.split("::")
        tree = ast.parse((Path(__file__).parent / f"{module}.py").read_text())
        assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, name


@pytest.mark.parametrize("size", [1, 2, 3])
def test_every_sample_of_a_batch_gets_its_own_prompt(tmp_path, monkeypatch, size):
    """Of a whole run: what the UNet is given beside each picture is that picture's prompt."""
    seen = []
    forward = UNet2DConditionModel.forward

    def look(self, sample, timestep, encoder_hidden_states, **options):
        seen.append(encoder_hidden_states)
        return forward(self, sample, timestep, encoder_hidden_states, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", look)
    classes = tmp_path / "classes"
    classes.mkdir()
    Image.effect_noise((40, 40), 50).convert("RGB").save(classes / "one.png")
    options = {"class_data_dir": str(classes), "class_prompt": "a cat", "num_class_images": 1, "method": "lora"}
    run(tmp_path / "run", with_prior_preservation=True, train_batch_size=size, max_train_steps=1, **options)
    embeds = seen[-1]  # before the loop, memory was estimated with a pass of shapes alone
    assert len(embeds) == 2 * size
    instance, of_class = embeds[:size], embeds[size:]
    assert (instance == instance[0]).all() and (of_class == of_class[0]).all()
    assert not torch.equal(instance[0], of_class[0])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("scheduler", [EDMEulerScheduler, EulerDiscreteScheduler])
def test_edm_weights_stay_with_their_samples(size, scheduler):
    """The loss of a batch with class images is that of its samples, taken one by one and weighted."""
    edm = objective(scheduler=scheduler, edm_style=True)
    one = batch(2 * size, weight=[1.0] * size + [0.3] * size)
    error = torch.randn(one.noise.shape, generator=torch.Generator().manual_seed(1))
    total = 0.0
    for index in range(2 * size):
        row = one._replace(**{name: value[index : index + 1] for name, value in one._asdict().items()})
        total += edm.loss(edm.target(row) + error[index : index + 1], row, 1).item() / size
    assert len({int(step) for step in one.timesteps}) == min(2 * size, len(STEPS))
    assert edm.loss(edm.target(one) + error, one, size).item() == pytest.approx(total, rel=1e-5)


def test_repeats_cost_no_memory(tmp_path, monkeypatch):
    kept = []
    encode = trainer.encode_run

    def look(*args, **options):
        encoded = encode(*args, **options)
        kept.append([tuple(picture.mean.shape) for stream in encoded.streams.values() for picture in stream])
        return encoded

    monkeypatch.setattr(trainer, "encode_run", look)
    run(tmp_path / "once", max_train_steps=1)
    run(tmp_path / "often", max_train_steps=1, repeats=1000)
    assert kept[0] == kept[1] and kept[0] == [(1, 4, 8, 8)] * len(find_images(CAT, "instance_data_dir"))


def test_looking_keeps_modes_and_precision(tmp_path, monkeypatch):
    """While it looks and at the end, the run draws with the modules that it trains, as they are."""
    before_look, after_look, loaded = [], [], []
    draw, load = samples.Sampler.draw, samples.load_pipeline

    def state(parts):
        models = [model for model in parts.values() if isinstance(model, torch.nn.Module)]
        return [(id(model), model.training, {p.dtype for p in model.parameters()}) for model in models]

    def look(sampler, prompts, seeds):
        before_look.append(state(sampler.parts))
        drawn = draw(sampler, prompts, seeds)
        after_look.append(state(sampler.parts))
        return drawn

    def remember(*args, **absent):
        pipeline = load(*args, **absent)
        loaded.append((pipeline.unet, pipeline.text_encoder.dtype, pipeline.text_encoder_2.dtype))
        return pipeline

    monkeypatch.setattr(samples.Sampler, "draw", look)
    monkeypatch.setattr(samples, "load_pipeline", remember)
    run(tmp_path, mixed_precision="bf16", num_validation_images=1, validation_steps=1)
    ((unet, training, dtypes),) = before_look[0]
    assert training and dtypes == {torch.bfloat16, torch.float32}
    assert len(before_look) == 2 and before_look == after_look and before_look[0] == before_look[1]
    assert loaded[1:] == [(None, torch.bfloat16, torch.bfloat16)] * 2  # the first is the run's own base


def test_stray_files_and_folders(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "old").mkdir(parents=True)
    for index in range(2):
        Image.fromarray(np.full((40, 40, 3), 90 * index, np.uint8)).save(folder / f"{index}.png")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"\0junk")
    assert len(losses(run(tmp_path / "run", instance_data_dir=str(folder), max_train_steps=1))) == 1


@pytest.mark.parametrize(
    ("failure", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), "out of memory with --train_batch"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory with --train_batch_size 4: lower"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full .* make room for --output_dir"),
    ],
)
def test_what_runs_out_is_one_sentence(tmp_path, monkeypatch, capsys, failure, words):
    def fail(*args, **options):
        raise failure

    monkeypatch.setattr(UNet2DConditionModel, "forward", fail)
    places = {"BASE": str(saved_base()), "OUT": str(tmp_path / "out")}
    with pytest.raises(SystemExit) as exit_:
        trainer.main([*(places.get(flag, flag) for flag in BASE_FLAGS), "--method", "lora", "--report_to", "none"])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert exit_.value.code != 0
    assert len(errors) == 1 and re.search(words, errors[0])


def test_a_file_that_could_not_be_written_is_named(tmp_path, monkeypatch):
    def fail(*args, **options):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(tensors, "save_file", fail)
    with pytest.raises(OSError, match="one.safetensors could not be written: .*No space left"):
        tensors.write_safetensors(tmp_path / "one.safetensors", {"a": torch.zeros(1)})
    assert list(tmp_path.iterdir()) == []


def test_torchao_is_looked_for_before_the_base_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)  # as if it were not installed
    monkeypatch.setattr(trainer.Base, "load", None)
    with pytest.raises(ValueError, match="--quantize_base int8 needs torchao"):
        run(tmp_path / "run", quantize_base="int8")
    assert not (tmp_path / "run").exists()
