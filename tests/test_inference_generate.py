"""inference.generate: images that depend on prompt and seed alone, files and manifest, and refusals."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionXLImg2ImgPipeline
from PIL import Image
from tiny_sdxl import build_pipeline, saved_base, saved_lora, saved_refiner

from inference.base import load_pipeline, make_scheduler
from inference.generate import image_names, main
from inference.load import load_adapter, unload_adapters
from inference.pipelines import pipeline_for, refiner_for
from inference.sampling import Refiner, encode_prompts, generate_images
from settings.command_line import parse_config
from settings.sampling import GenerateConfig

PROMPTS = ["[V] photo of a cat", "[V] photo of a cat in the jungle"]


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline(saved_base(), torch_dtype=torch.float32, device="cpu")


def draw(pipeline, prompts=PROMPTS, seeds=(0, 7), **options) -> dict[tuple[str, int], np.ndarray]:
    options = {"num_inference_steps": 3, "output_type": "np", "progress": False, **options}
    return {(drawn.prompt, drawn.seed): drawn.image for drawn in generate_images(pipeline, prompts, seeds, **options)}


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [None, EulerAncestralDiscreteScheduler])
def test_an_image_does_not_depend_on_its_batch(pipeline, scheduler, monkeypatch):
    if scheduler:  # one that adds noise at every step
        monkeypatch.setattr(pipeline, "scheduler", scheduler.from_config(pipeline.scheduler.config))
    one_by_one = draw(pipeline, batch_size=1)
    assert list(one_by_one) == [(prompt, seed) for prompt in PROMPTS for seed in (0, 7)]
    for batch_size in (2, 3):
        batched = draw(pipeline, batch_size=batch_size)
        assert max(np.abs(batched[key] - one_by_one[key]).max() for key in one_by_one) < 1e-5
    alone = draw(pipeline, prompts=PROMPTS[1:], seeds=[7])
    assert np.abs(alone[PROMPTS[1], 7] - one_by_one[PROMPTS[1], 7]).max() < 1e-5
    assert np.abs(one_by_one[PROMPTS[0], 0] - one_by_one[PROMPTS[0], 7]).max() > 1e-2


def test_global_random_state_and_training_mode_are_left_alone(pipeline):
    pipeline.unet.train()
    state = torch.get_rng_state()
    trained = draw(pipeline, seeds=[0])
    assert pipeline.unet.training and pipeline.unet.conv_in.training and not pipeline.vae.training
    assert torch.equal(torch.get_rng_state(), state)
    pipeline.unet.eval()
    evaluated = draw(pipeline, seeds=[0])
    assert all(np.array_equal(trained[key], evaluated[key]) for key in trained)


def test_prompts_encoded_beforehand_need_no_text_encoders(pipeline, monkeypatch):
    plain = draw(pipeline, negative_prompt="blurry", batch_size=4)
    encoded = encode_prompts(pipeline, PROMPTS, negative_prompt="blurry")
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        monkeypatch.setattr(pipeline, part, None)
    later = draw(pipeline, encoded_prompts=encoded, batch_size=4)
    assert all(np.array_equal(plain[key], later[key]) for key in plain)
    with pytest.raises(ValueError, match="lack 'a dog'"):
        draw(pipeline, ["a dog"], encoded_prompts=encoded)
    with pytest.raises(ValueError, match="hold their negative prompt"):
        draw(pipeline, encoded_prompts=encoded, negative_prompt="blurry")


def test_size_defaults_to_the_bases_and_can_be_set(pipeline):
    assert draw(pipeline, PROMPTS[:1], [0])[PROMPTS[0], 0].shape == (32, 32, 3)
    assert draw(pipeline, PROMPTS[:1], [0], height=24, width=40)[PROMPTS[0], 0].shape == (24, 40, 3)


def test_guidance_and_negative_prompt_matter(pipeline):
    plain = draw(pipeline, PROMPTS[:1], [0])
    for options in ({"guidance_scale": 1.0}, {"negative_prompt": "blurry"}):
        other = draw(pipeline, PROMPTS[:1], [0], **options)
        assert np.abs(other[PROMPTS[0], 0] - plain[PROMPTS[0], 0]).max() > 1e-4, options


def test_base_images_are_bit_identical_after_an_adapter_was_on(pipeline):
    before = draw(pipeline)
    load_adapter(pipeline, saved_lora())
    adapted = draw(pipeline)
    unload_adapters(pipeline)
    after = draw(pipeline)
    assert all(np.array_equal(before[key], after[key]) for key in before)
    assert all(np.abs(before[key] - adapted[key]).max() > 1e-3 for key in before)


def test_scale_zero_gives_the_base_image(pipeline):
    base = draw(pipeline)
    load_adapter(pipeline, saved_lora(), scale=0.0)
    zero = draw(pipeline)
    unload_adapters(pipeline)
    assert all(np.array_equal(base[key], zero[key]) for key in base)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"prompts": []}, "no prompt"),
        ({"prompts": ["a", " "]}, "a prompt is empty"),
        ({"prompts": ["a", "a"]}, "given twice"),
        ({"seeds": []}, "no seed"),
        ({"seeds": [-1]}, "seed=-1 must be from 0"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be at least 1"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan"),
        ({"height": 33}, "height=33 must be a positive multiple of 8"),
        ({"width": -8}, "width=-8 must be a positive multiple of 8"),
    ],
)
def test_values_out_of_range_are_refused_at_the_call(pipeline, options, message):
    arguments = {"prompts": PROMPTS, "seeds": [0], **options}
    with pytest.raises(ValueError, match=message):
        generate_images(pipeline, arguments.pop("prompts"), arguments.pop("seeds"), **arguments)


def test_image_names_are_readable_and_distinct():
    names = image_names(["[V] photo of a cat", "A cat!", "a cat?", "!!!", "猫", "x" * 400])
    assert names["[V] photo of a cat"] == "v-photo-of-a-cat"
    assert len(set(names.values())) == 6
    assert all(re.fullmatch(r"[\w-]{1,80}", name) for name in names.values())


# --- the command ------------------------------------------------------------------------------------------------------


def read_manifest(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def test_command_writes_images_and_a_manifest(tmp_path, pipeline, capsys):
    adapter = saved_lora()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{PROMPTS[1]}\n\n  a dog on the beach \n", encoding="utf-8")
    output = tmp_path / "images"
    command = ["--adapter", str(adapter), "--prompt", PROMPTS[0], "--prompt_file", str(prompts), "--num_images", "2"]
    command += ["--seed", "7", "--num_inference_steps", "2", "--batch_size", "4", "--scale", "0.5"]
    main([*command, "--output", str(output)])
    records = read_manifest(output)
    assert [(record["prompt"], record["seed"]) for record in records] == [
        (prompt, seed) for prompt in (*PROMPTS, "a dog on the beach") for seed in (7, 8)
    ]
    assert sorted(record["file"] for record in records) == sorted(path.name for path in output.glob("*.png"))
    assert "v-photo-of-a-cat-seed7.png" in {record["file"] for record in records}
    expected = {"num_inference_steps": 2, "guidance_scale": 5.0, "scale": 0.5, "negative_prompt": None}
    expected |= {"adapter": [str(adapter)], "base": str(saved_base()), "dtype": "fp32", "width": 32, "height": 32}
    assert all(record.items() >= expected.items() for record in records)
    assert not [path for path in output.iterdir() if path.suffix not in (".png", ".jsonl")]

    load_adapter(pipeline, adapter, scale=0.5)
    [drawn] = generate_images(pipeline, PROMPTS[:1], [8], num_inference_steps=2, progress=False)
    unload_adapters(pipeline)
    with Image.open(output / "v-photo-of-a-cat-seed8.png") as image:
        difference = np.abs(np.asarray(image, np.int16) - np.asarray(drawn.image, np.int16)).max()
    assert difference <= 1  # the command's batch of four, one image here: rounding to 8 bits may differ by one

    # a second command into the same folder adds its lines, and replaces those of images drawn again
    before = {path.name: path.read_bytes() for path in output.glob("*.png")}
    again = ["--base", str(saved_base()), "--prompt", PROMPTS[0], "--prompt", "new", "--seeds", "7"]
    for _ in range(2):
        main([*again, "--num_inference_steps", "1", "--output", str(output)])
        assert "8 images" in capsys.readouterr().out
    records = {record["file"]: record for record in read_manifest(output)}
    assert len(records) == 8 and sorted(records) == sorted(path.name for path in output.glob("*.png"))
    assert {name: (output / name).read_bytes() for name in before} == before
    (other,) = set(records) - set(before) - {"new-seed7.png"}
    assert re.fullmatch(r"v-photo-of-a-cat-seed7-[0-9a-f]{8}\.png", other) and records[other]["adapter"] is None


def test_prompts_that_differ_late_do_not_overwrite_each_other(tmp_path):
    prompts = [f"{'a very long prompt ' * 4}{word}" for word in ("day", "night")]
    for prompt in prompts:
        main(["--base", str(saved_base()), "--prompt", prompt, "--num_inference_steps", "1", "--output", str(tmp_path)])
    assert [record["prompt"] for record in read_manifest(tmp_path)] == prompts
    assert len(list(tmp_path.glob("*.png"))) == 2


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image, np.int16)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--scale", "0.5", "--negative_prompt", "blurry, it's", "--guidance_scale", "3"],
        ['--prompt=-robot, "it\'s"', "--adapter", "OTHER", "--adapter_weights", "0.5", "1.5"],
        ["--scheduler", "eulerancestraldiscrete", "--fuse", "--height", "40"],
        ["--adapter", "OTHER", "--adapter_weights", "0.7", "-0.4", "--refiner", "REFINER", "--refiner_start", "0.5"],
    ],
)
def test_the_command_in_an_image_draws_it_again(tmp_path, flags):
    places = {"OTHER": str(saved_lora(seed=2)), "REFINER": str(saved_refiner())}
    command = ["--adapter", str(saved_lora()), "--prompt", PROMPTS[0], "--seed", "3", "--num_inference_steps", "4"]
    main([*command, *(places.get(flag, flag) for flag in flags), "--output", str(tmp_path / "one")])
    file = sorted((tmp_path / "one").glob("*.png"))[0]
    with Image.open(file) as image:
        text = image.text
    assert json.loads(text["parameters"]) in read_manifest(tmp_path / "one")
    python, *again = shlex.split(text["command"])
    assert again[:2] == ["-m", "inference.generate"]
    main([*again[2:], "--output", str(tmp_path / "again")])
    assert np.array_equal(pixels(tmp_path / "again" / file.name), pixels(file))


def test_a_sweep_of_scales_draws_each(tmp_path):
    command = ["--adapter", str(saved_lora()), "--prompt", "a", "--num_inference_steps", "2"]
    main([*command, "--scales", "0", "0.5", "1", "--output", str(tmp_path / "sweep")])
    for scale in ("0", "0.5", "1"):
        main([*command, "--scale", scale, "--output", str(tmp_path / scale)])
        assert np.array_equal(
            pixels(tmp_path / "sweep" / f"a-seed0-scale{scale}.png"), pixels(tmp_path / scale / "a-seed0.png")
        )
    assert [record["scale"] for record in read_manifest(tmp_path / "sweep")] == [0, 0.5, 1]


def test_several_adapters_add_up(pipeline, tmp_path):
    one, two = saved_lora(), saved_lora(seed=2)
    main(
        ["--adapters", str(one), str(two), "--adapter_weights", "0.7", "0.4", "--scale", "0.5", "--prompt", "a"]
        + ["--num_inference_steps", "2", "--output", str(tmp_path)]
    )
    for path, weight in ((one, 0.35), (two, 0.2)):
        load_adapter(pipeline, path, scale=weight)
    [drawn] = generate_images(pipeline, ["a"], [0], num_inference_steps=2, progress=False)
    unload_adapters(pipeline)
    assert np.abs(pixels(tmp_path / "a-seed0.png") - np.asarray(drawn.image, np.int16)).max() <= 1


def test_adapters_in_folders_of_one_name_are_combined(tmp_path):
    paths = [tmp_path / run / "nora" for run in ("r1", "r2")]
    for seed, path in enumerate(paths, 1):
        shutil.copytree(saved_lora(seed), path)
    main(
        ["--adapters", *map(str, paths), "--prompt", "a", "--num_inference_steps", "1", "--output", str(tmp_path / "o")]
    )
    assert read_manifest(tmp_path / "o")[0]["adapter"] == [str(path) for path in paths]


def test_merged_weights_draw_the_same_and_cost_nothing_per_step(tmp_path, monkeypatch):
    command = ["--adapter", str(saved_lora()), "--prompt", "a", "--num_inference_steps", "2"]
    main([*command, "--output", str(tmp_path / "live")])
    main([*command, "--fuse", "--output", str(tmp_path / "fused")])
    assert np.abs(pixels(tmp_path / "fused" / "a-seed0.png") - pixels(tmp_path / "live" / "a-seed0.png")).max() <= 1
    products = []
    forward = torch.nn.Linear.forward
    monkeypatch.setattr(torch.nn.Linear, "forward", lambda self, x: products.append(1) or forward(self, x))
    counts = []
    for flags in ([], ["--fuse"]):
        products.clear()
        main([*command, *flags, "--output", str(tmp_path / "again")])
        counts.append(len(products))
    products.clear()
    main(["--base", str(saved_base()), *command[2:], "--output", str(tmp_path / "again")])
    assert counts[1] == len(products) < counts[0]


def test_another_autoencoder_decodes(tmp_path):
    other = build_pipeline(seed=5).vae
    other.save_pretrained(tmp_path / "vae")
    command = ["--base", str(saved_base()), "--prompt", "a", "--num_inference_steps", "1"]
    main([*command, "--output", str(tmp_path / "own")])
    main([*command, "--vae", str(tmp_path / "vae"), "--output", str(tmp_path / "other")])
    pipeline = load_pipeline(saved_base(), torch.float32, "cpu")
    pipeline.register_modules(vae=other)
    [drawn] = generate_images(pipeline, ["a"], [0], num_inference_steps=1, progress=False)
    assert np.array_equal(pixels(tmp_path / "other" / "a-seed0.png"), np.asarray(drawn.image, np.int16))
    assert not np.array_equal(pixels(tmp_path / "other" / "a-seed0.png"), pixels(tmp_path / "own" / "a-seed0.png"))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_another_autoencoder_decodes_in_half_precision(tmp_path, dtype):
    build_pipeline(seed=5).vae.save_pretrained(tmp_path / "vae")
    command = ["--base", str(saved_base()), "--prompt", "a", "--num_inference_steps", "1"]
    command += ["--vae", str(tmp_path / "vae")]
    main([*command, "--dtype", dtype, "--output", str(tmp_path / "half")])
    main([*command, "--output", str(tmp_path / "full")])
    assert np.abs(pixels(tmp_path / "half" / "a-seed0.png") - pixels(tmp_path / "full" / "a-seed0.png")).mean() < 3


def test_an_autoencoder_in_a_single_file_has_the_bases_configuration(tmp_path):
    base, other = build_pipeline(), build_pipeline(seed=5).vae
    base.vae.register_to_config(scaling_factor=0.5)
    base.save_pretrained(tmp_path / "base")
    other.save_pretrained(tmp_path / "vae")
    file = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    loaded = load_pipeline(tmp_path / "base", torch.float32, "cpu", vae=file).vae
    assert loaded.config.scaling_factor == 0.5 and not loaded.training and loaded.use_slicing
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), other.parameters()))


def test_refiner_goes_on_where_the_base_stops(pipeline):
    """Against diffusers' own two calls; and an image does not depend on its batch here either."""
    refiner = StableDiffusionXLImg2ImgPipeline.from_pretrained(saved_refiner(), vae=pipeline.vae)
    refiner.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 10, "guidance_scale": 4.0}
    both = Refiner(refiner, 0.6)
    drawn = draw(pipeline, refiner=both, batch_size=3, **options)
    latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(7))
    latents = pipeline(PROMPTS[1], latents=latents, denoising_end=0.6, output_type="latent", **options).images
    expected = refiner(PROMPTS[1], image=latents, denoising_start=0.6, output_type="np", **options).images[0]
    assert np.abs(drawn[PROMPTS[1], 7] - expected).max() < 1e-4
    assert np.abs(drawn[PROMPTS[1], 7] - draw(pipeline, **options)[PROMPTS[1], 7]).max() > 1e-2
    alone = draw(pipeline, PROMPTS[1:], [7], refiner=both, **options)
    assert np.abs(drawn[PROMPTS[1], 7] - alone[PROMPTS[1], 7]).max() < 1e-5


def test_the_refiner_steps_as_the_base_does(monkeypatch):
    """Schedulers differ in how they scale noisy latents, which go from one to the other as they are."""
    config = GenerateConfig(refiner=str(saved_refiner()), scheduler="ddim", device="cpu", base=str(saved_base()))
    pipeline = pipeline_for(config)
    refiner = refiner_for(config, pipeline).pipeline
    assert type(refiner.scheduler) is type(pipeline.scheduler) is DDIMScheduler
    assert refiner.scheduler.config == pipeline.scheduler.config and refiner.scheduler is not pipeline.scheduler

    fast = []
    name = "enable_xformers_memory_efficient_attention"
    for cls in (type(pipeline), type(refiner)):
        monkeypatch.setattr(cls, name, lambda pipeline: fast.append(type(pipeline)))
    config = replace(config, **{name: True})
    refiner_for(config, pipeline_for(config))
    assert fast == [type(pipeline), type(refiner)]


@pytest.mark.parametrize("name", ["DDIM", "dpmsolvermultistep", "EulerAncestralDiscreteScheduler", "UniPCMultistep"])
def test_schedulers_by_name_keep_the_bases_noise(pipeline, name):
    scheduler = make_scheduler(name, pipeline.scheduler)
    assert type(scheduler).__name__.lower().removesuffix("scheduler") == name.lower().removesuffix("scheduler")
    assert torch.allclose(scheduler.alphas_cumprod, pipeline.scheduler.alphas_cumprod)


def test_output_defaults_to_the_adapters_folder(tmp_path):
    (tmp_path / "run.json").write_bytes((saved_lora() / "run.json").read_bytes())
    weights = tmp_path / "pytorch_lora_weights.safetensors"
    weights.write_bytes((saved_lora() / weights.name).read_bytes())
    main(["--adapter", str(tmp_path), "--prompts", *PROMPTS, "--num_inference_steps", "1"])
    assert len(read_manifest(tmp_path / "images")) == 2


def test_the_base_is_the_one_that_the_run_downloaded(tmp_path, monkeypatch):
    """Its variant is the only one there, so that another could not be loaded."""
    build_pipeline().save_pretrained(tmp_path / "base", variant="fp16")
    shutil.copytree(saved_lora(), tmp_path / "run")
    (tmp_path / "downloads").mkdir()
    of_run = {"pretrained_model_name_or_path": str(tmp_path / "base"), "variant": "fp16", "revision": "v1"}
    options = []
    load = load_pipeline
    monkeypatch.setattr("inference.pipelines.load_pipeline", lambda *a, **k: options.append(k) or load(*a, **k))
    command = ["--adapter", str(tmp_path / "run"), "--prompt", "a", "--num_inference_steps", "1"]
    command += ["--output", str(tmp_path / "images")]
    for cache_dir in ("downloads", "on-another-machine"):
        record = {"config": of_run | {"cache_dir": str(tmp_path / cache_dir)}}
        (tmp_path / "run" / "run.json").write_text(json.dumps(record))
        main(command)
    (record,) = read_manifest(tmp_path / "images")
    assert (record["revision"], record["variant"]) == ("v1", "fp16")
    main([*command, "--base", str(tmp_path / "base"), "--variant", "fp16"])  # said: nothing of the run's is added
    names = ("revision", "variant", "cache_dir")
    given = [{name: one[name] for name in names if name in one} for one in options]
    expected = {"revision": "v1", "variant": "fp16"}
    assert given == [expected | {"cache_dir": str(tmp_path / "downloads")}, expected, {"variant": "fp16"}]


def test_an_interrupted_command_lists_the_images_it_has(tmp_path, monkeypatch):
    def cut_off(*arguments, **options):
        images = generate_images(*arguments, **options)
        yield next(images)
        raise KeyboardInterrupt

    monkeypatch.setattr("inference.sampling.generate_images", cut_off)
    with pytest.raises(SystemExit) as stopped:
        main(
            ["--base", str(saved_base()), "--prompt", "a", "--num_images", "2", "--num_inference_steps", "1"]
            + ["--batch_size", "1", "--output", str(tmp_path / "images")]
        )
    assert stopped.value.code == 130
    assert [record["file"] for record in read_manifest(tmp_path / "images")] == ["a-seed0.png"]


def test_lists_of_the_command_line_win_over_the_files(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("scale: [0.5]\nprompts: [one]\nseeds: [0, 1]\nadapter-weights: [2]\nadapter: [a, b]\nheight: 64\n")
    flags = ["--config", str(path), "--scales", "1", "--prompt=two", "--seeds", "5", "--adapter_weights", "3", "4"]
    config = parse_config(GenerateConfig, flags)
    assert (config.scale, config.prompt, config.seeds, config.adapter_weights) == ([1], ["two"], [5], [3, 4])
    assert config.adapter == ["a", "b"] and config.height == 64


def test_a_prompt_longer_than_the_encoders_read_is_reported(tmp_path, capsys):
    main(
        ["--base", str(saved_base()), "--prompt", "a very long prompt indeed " * 4, "--num_inference_steps", "1"]
        + ["--output", str(tmp_path)]
    )
    assert "tokens, the base reads the first 32" in capsys.readouterr().err


def test_a_prompt_without_the_subjects_word_is_reported(tmp_path, capsys):
    run = shutil.copytree(saved_lora(), tmp_path / "run")
    (run / "run.json").write_text(json.dumps({"config": {"instance_prompt": "a photo of [V] cat"}}))
    prompts = ["--prompt", "a cat", "a dog", "[V] photo of a cat"]
    main(["--base", str(saved_base()), "--adapter", str(run), *prompts, "--num_inference_steps", "1"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert said == [f"warning: prompt 'a cat' (and 1 other) lacks [V], the word for what {run} learned"]


def bad_commands(tmp_path: Path) -> dict[str, tuple[list[str], str]]:
    base, adapter = ["--base", str(saved_base())], ["--adapter", str(saved_lora())]
    text = tmp_path / "text.txt"
    text.write_text("a")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "taken").mkdir()
    vae = AutoencoderKL.load_config(saved_base() / "vae") | {"latent_channels": 8}
    AutoencoderKL.from_config(vae).save_pretrained(tmp_path / "wide")
    (tmp_path / "taken" / "manifest.jsonl").write_text("[1]\n")
    (tmp_path / "run" / "pytorch_lora_weights.safetensors").write_bytes(
        (saved_lora() / "pytorch_lora_weights.safetensors").read_bytes()
    )
    prompt = ["--prompt", "a"]
    return {
        "unknown flag": ([*base, *prompt, "--stepz", "3"], "unrecognized arguments: --stepz"),
        "abbreviated flag": ([*base, *prompt, "--num_inf", "3"], "unrecognized arguments: --num_inf"),
        "not a number": ([*base, *prompt, "--scale", "much"], "--scale/--scales: invalid float value: 'much'"),
        "unknown dtype": ([*base, *prompt, "--dtype", "fp8"], "--dtype"),
        "no prompt": (base, "no prompt"),
        "no base": (prompt, "no base: name one with --base"),
        "no such adapter": ([*prompt, "--adapter", str(tmp_path / "nowhere")], "nowhere does not exist"),
        "empty adapter folder": ([*base, *prompt, "--adapter", str(tmp_path / "empty")], "has neither"),
        "no record of the base": ([*prompt, "--adapter", str(tmp_path / "run")], "name it with --base"),
        "no such base": ([*prompt, *adapter, "--base", "no/such/base"], "base no/such/base does not exist"),
        "base without parts": ([*prompt, *adapter, "--base", str(tmp_path / "empty")], "no model_index.json"),
        "no prompt file": ([*base, "--prompt_file", str(tmp_path / "gone.txt")], "No such file or directory: "),
        "blank prompt file": ([*base, "--prompt_file", str(tmp_path / "blank.txt")], "holds no prompt"),
        "binary prompt file": ([*base, "--prompt_file", str(tmp_path / "latin.txt")], "is not UTF-8 text"),
        "two ways of seeds": ([*base, *prompt, "--seeds", "1", "--num_images", "2"], "leave --seed and --num_images"),
        "no images": ([*base, *prompt, "--num_images", "0"], "--num_images 0 must be at least 1"),
        "zero steps": ([*base, *prompt, "--num_inference_steps", "0"], "must be at least 1"),
        "negative seed": ([*base, *prompt, "--seed", "-3"], "seed=-3"),
        "infinite scale": ([*base, *prompt, *adapter, "--scale", "inf"], "--scale inf must be from -100 to 100"),
        "scale of nothing": ([*base, *prompt, "--scale", "0.5"], "--scale 0.5 needs an adapter"),
        "weights of nobody": ([*base, *prompt, *adapter, "--adapter_weights", "1", "2"], "2 numbers for 1 adapters"),
        "huge weight": ([*base, *prompt, *adapter, "--adapter_weights", "1e9"], "--adapter_weights 1e+09 must be from"),
        "one adapter twice": ([*base, *prompt, *adapter, *adapter], "is given twice"),
        "unknown scheduler": ([*base, *prompt, "--scheduler", "best"], "--scheduler best is none that goes with"),
        "no such refiner": ([*base, *prompt, "--refiner", str(tmp_path / "empty")], "could not be loaded"),
        "refiner from nowhere": ([*base, *prompt, "--refiner_start", "1"], "--refiner_start 1 must be between 0 and 1"),
        "no such autoencoder": ([*base, *prompt, "--vae", str(tmp_path / "empty")], "could not be loaded"),
        "adapter for an autoencoder": (
            [*base, *prompt, "--vae", str(saved_lora() / "pytorch_lora_weights.safetensors")],
            "could not be loaded",
        ),
        "autoencoder of another family": ([*base, *prompt, "--vae", str(tmp_path / "wide")], "makes 8 latent channels"),
        "another family's file": (
            [*base, *prompt, "--vae", str(tmp_path / "wide" / "diffusion_pytorch_model.safetensors")],
            "could not be loaded",
        ),
        "merged at two scales": ([*base, *prompt, *adapter, "--fuse", "--scales", "0", "1"], "give one --scale"),
        "offload from a CPU": ([*base, *prompt, "--device", "cpu", "--offload", "model"], "leave it out on a CPU"),
        "odd size": ([*base, *prompt, "--height", "100"], "height=100 must be a positive multiple of 8"),
        "no such device": ([*base, *prompt, "--device", "toaster"], "--device toaster can't be used"),
        "no such GPU": ([*base, *prompt, "--device", "cuda:99"], "--device cuda:99 can't be used (this machine has"),
        "xformers on a CPU": (
            [*base, *prompt, "--device", "cpu", "--enable_xformers_memory_efficient_attention"],
            "needs a CUDA GPU",
        ),
        "another base's adapter": (
            [*base, *prompt, "--adapter", str(saved_lora(hidden=64))],
            "belongs to another base",
        ),
        "another manifest": (
            [*base, *prompt, "--output", str(tmp_path / "taken")],
            "is not a manifest of this command",
        ),
        "output is a file": ([*base, *prompt, "--output", str(text)], "is a file, and a folder is needed"),
        "output below a file": ([*base, *prompt, "--output", str(text / "a" / "b")], "text.txt is a file"),
    }


def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, capsys, monkeypatch):
    commands = bad_commands(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    for case, (command, message) in commands.items():
        if "--output" not in command:
            command = [*command, "--output", str(tmp_path / "images")]
        with pytest.raises(SystemExit) as stopped:
            main(command)
        printed = capsys.readouterr()
        assert stopped.value.code == 2, case
        errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0], (case, printed.err)
        assert "Traceback" not in printed.err and printed.out == "", (case, printed)
        assert sorted(tmp_path.rglob("*")) == before, case


@pytest.mark.parametrize("place", ["pipelines.load_pipeline", "sampling.encode_prompts"])
def test_memory_that_runs_out_anywhere_is_one_sentence(tmp_path, monkeypatch, capsys, place):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.\nGPU 0 has …")

    monkeypatch.setattr(f"inference.{place}", fail)
    with pytest.raises(SystemExit) as stopped:
        main(["--base", str(saved_base()), "--prompt", "a", "--output", str(tmp_path / "images")])
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2 and "out of memory" in error and "lower --batch_size" in error


def test_the_module_runs_as_a_command():
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "inference.generate", "--adapter", "no-such-run", "--prompt", "a"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert re.fullmatch(r"error: adapter no-such-run does not exist .*\n", done.stderr), done.stderr
