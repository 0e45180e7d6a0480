"""--eval_steps: scores while training, the best adapter kept, stopping early."""

import json
from pathlib import Path

import pytest
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from test_trainer import CAT, losses, run
from tiny_sdxl import saved_base

from dreambooth.prepare import read_pictures
from inference.adapter_files import recorded_base
from inference.base import load_pipeline
from inference.load import load_adapter
from inference.sampling import GeneratedImage
from methods.components import FOLDED_WEIGHTS
from settings.training import TrainConfig
from storage.pictures import find_images, open_image
from trainer.best_adapter import RunJudge
from trainer.hooks import Look

ASSETS = Path(__file__).parent.parent / "assets"
JUDGES = {"clip": str(ASSETS / "tiny-clip"), "dino": str(ASSETS / "tiny-dino")}
SCORED = {"eval_steps": 2, "num_eval_images": 1, "num_inference_steps": 1, "max_train_steps": 4, **JUDGES}


def test_the_run_is_scored_and_the_best_adapter_kept(tmp_path):
    folder = run(tmp_path / "scored", **SCORED, checkpointing_steps=2, best_by="clip_t")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scored = {line["step"]: line for line in lines if "dino" in line}
    assert set(scored) == {2, 4} and all(-1 <= scored[2][name] <= 1 for name in ("dino", "clip_i", "clip_t"))
    assert losses(folder) == losses(run(tmp_path / "plain", max_train_steps=4))  # looking does not change the run
    best = json.loads((folder / "run.json").read_text())["best"]
    assert best["step"] == max(scored, key=lambda step: scored[step]["clip_t"]) and best["by"] == "clip_t"
    assert best == json.loads((folder / "best" / "scores.json").read_text())
    kept = load_file(folder / "best" / FOLDED_WEIGHTS)
    expected = load_file(folder / f"checkpoint-{best['step']}" / FOLDED_WEIGHTS)
    assert all((kept[key] == expected[key]).all() for key in expected)
    assert recorded_base(folder / "best") == str(saved_base())
    load_adapter(load_pipeline(saved_base(), device="cpu"), folder / "best")

    page = (folder / "run.html").read_text()
    assert "Finished after 4 steps" in page and f"{best['step']} (best)" in page
    low, high = (scored[4]["intervals"]["clip_t"][end] for end in ("low", "high"))
    assert f"{scored[4]['clip_t']:.3f} [{low:.3f}, {high:.3f}]" in page

    # resumed after the first evaluation, it ends with the same best one, having looked again at the last step only
    (folder / "run.json").unlink()
    for name in ("checkpoint-4",):
        for file in (folder / name).iterdir():
            file.unlink()
        (folder / name).rmdir()
    options = SCORED | {"checkpointing_steps": 2, "best_by": "clip_t", "resume_from_checkpoint": "latest"}
    resumed = run(folder, **options)
    assert json.loads((resumed / "run.json").read_text())["best"] == best
    again = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in again if "dino" in line] == [2, 4]


def best_of(folder):
    return json.loads((folder / "run.json").read_text())["best"]


def test_going_back_to_an_older_checkpoint_brings_its_best_back(tmp_path, monkeypatch):
    """best/ was of step 4 while the record said step 1."""
    scores = {1: 5.0, 2: 6.0, 3: 7.0, 4: 1.0}  # losses: the first is the best until the last

    def validate(self, step):
        return scores[step]

    monkeypatch.setattr(Look, "_validate", validate)
    options = SCORED | {"eval_steps": 1, "best_by": "val_loss", "checkpointing_steps": 1, "checkpoints_total_limit": 9}
    folder = run(tmp_path, **options)
    first = load_file(folder / "checkpoint-1" / FOLDED_WEIGHTS)
    assert best_of(folder)["step"] == 4 == json.loads((folder / "best" / "scores.json").read_text())["step"]
    scores[4] = 8.0
    run(tmp_path, **options, resume_from_checkpoint="checkpoint-2")
    assert best_of(folder)["step"] == 1 and best_of(folder) == json.loads((folder / "best" / "scores.json").read_text())
    kept = load_file(folder / "best" / FOLDED_WEIGHTS)
    assert all((kept[key] == first[key]).all() for key in first)


def test_a_best_of_steps_that_are_made_anew_goes(tmp_path):
    options = SCORED | {"eval_steps": 2, "best_by": "val_loss", "checkpointing_steps": 1}
    folder = run(tmp_path, **options)
    assert (folder / "best" / "scores.json").is_file() and not (folder / "checkpoint-1" / "best.zip").exists()
    later = json.loads((folder / "best" / "scores.json").read_text())
    run(tmp_path, **options, resume_from_checkpoint="checkpoint-1")
    assert best_of(folder) == json.loads((folder / "best" / "scores.json").read_text()) == later


def test_the_last_step_is_scored_however_long_the_run_is(tmp_path):
    options = SCORED | {"max_train_steps": None, "num_train_epochs": 1, "eval_steps": 50}  # six pictures, two a step
    folder = run(tmp_path, **options)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "dino" in line] == [3]


def test_stopping_early(tmp_path):
    """A learning rate of next to nothing leaves the loss where it is: the first evaluation stays the best."""
    options = SCORED | {"eval_steps": 1, "max_train_steps": 50, "learning_rate": 1e-30}
    folder = run(tmp_path, **options, best_by="val_loss", early_stopping_patience=2)
    assert len(losses(folder)) == 3
    record = json.loads((folder / "run.json").read_text())
    assert record["best"]["step"] == 1 and record["config"]["max_train_steps"] == 3


@pytest.fixture
def judge(tmp_path):
    base = {"pretrained_model_name_or_path": str(saved_base()), "output_dir": str(tmp_path), "resolution": 32}
    options = {"instance_data_dir": str(CAT), "instance_prompt": "a photo of [V] cat", "eval_steps": 1}
    config = TrainConfig.of(**base, **options, **JUDGES)
    pictures = read_pictures(config.data, config.prior, 8)
    return RunJudge(config.evaluation, Accelerator(cpu=True), pictures, tmp_path, total_steps=10)


def test_an_adapter_that_copies_is_never_the_best(judge, tmp_path, capsys):
    cats = [open_image(path) for path in find_images(CAT, "instance_data_dir")]
    blank = [GeneratedImage("a [V] cat", seed, Image.new("RGB", (64, 64), "teal")) for seed in range(6)]
    copies = [GeneratedImage("a [V] cat", seed, image) for seed, image in enumerate(cats)]
    kept = []

    def save(folder):
        kept.append(folder)
        return []

    first = judge.look(1, blank, 0.5, save)
    assert judge.best["step"] == 1 and len(kept) == 1 and not capsys.readouterr().err
    second = judge.look(2, copies, 0.4, save)
    assert second["dino"] > first["dino"] and judge.best["step"] == 1 and len(kept) == 1
    printed = capsys.readouterr().err
    assert "step 2 draws its training images" in printed and "fidelity rises only by memorising" in printed
    assert judge.waited == 1


def test_one_copy_of_a_dozen_is_within_the_detector_s_error(judge):
    """--best_by leaves an evaluation out for more copies than the detector's own errors would give, for no fewer."""
    cats = [open_image(path) for path in find_images(CAT, "instance_data_dir")]
    blank = [GeneratedImage("a [V] cat", seed, Image.new("RGB", (64, 64), "teal")) for seed in range(12)]
    for copies, best in ((1, 1), (3, 1)):
        mixed = [GeneratedImage("a [V] cat", seed, image) for seed, image in enumerate(cats[:copies])]
        found = judge.look(copies, [*mixed, *blank[copies:]], 0.5, lambda folder: [])
        assert found["copies"] == copies / 12 and judge.best["step"] == best
    assert judge.waited == 1 and judge.best["interval"]["varies"] == ("seeds",)


def test_prompts_are_the_protocol_s_with_the_subject_in_them(judge):
    assert judge.prompts[0] == "a photo of [V] cat in the jungle" and len(judge.prompts) == 6
