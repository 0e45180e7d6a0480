"""A run stopped at any moment and resumed ends as the run that never stopped, bit for bit."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from browser_pages import page_data
from safetensors.torch import load_file
from test_trainer import QUICK, losses, run
from tiny_sdxl import saved_base

from methods.components import FOLDED_WEIGHTS, INNER_WEIGHTS
from methods.files import tools_file
from runs.checkpoints import (
    STATE,
    check_earlier_run,
    checkpoints,
    clear_earlier_run,
    find_checkpoint,
    read_step,
    save_checkpoint,
)
from trainer import hooks

ROOT = Path(__file__).parent.parent
VARIANTS = {
    "unet": {},
    "lora": {"method": "lora", "random_flip": True, "lr_scheduler": "cosine"},
    "everything": {
        "train_text_encoder": True,
        "gradient_accumulation_steps": 2,
        "with_prior_preservation": True,
        "prior_teacher": True,
        "class_prompt": "a photo of a cat",
        "ema_decay": 0.9,
        "lora_dropout": 0.1,
        "caption_dropout": 0.2,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": 2,
    },
    "new tokens": {"train_text_encoder_ti": True, "optimizer": "prodigy", "learning_rate": 1.0},
}


def same_ends(one: Path, other: Path) -> None:
    assert losses(one) == losses(other)
    for path in sorted(one.glob("*.safetensors")):
        name = tools_file(other) if path.name == tools_file(one) else path.name  # which has its folder's name
        first, second = load_file(path), load_file(other / name)
        assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first), path.name


@pytest.mark.parametrize("variant", VARIANTS)
def test_resumed_run_ends_like_the_whole_one(tmp_path, variant):
    options = VARIANTS[variant] | {"max_train_steps": 5, "encoded_cache_dir": str(tmp_path / "encoded")}
    whole = run(tmp_path / "whole", **options)
    parts = tmp_path / "parts"
    run(parts, checkpointing_steps=2, **options)
    for name in ("run.json", FOLDED_WEIGHTS, INNER_WEIGHTS):  # as if it had been cut off after step 2
        (parts / name).unlink(missing_ok=True)
    shutil.rmtree(parts / "checkpoint-4")
    run(parts, checkpointing_steps=2, resume_from_checkpoint="latest", **options)
    same_ends(whole, parts)


# --- killed for good --------------------------------------------------------------------------------------------------


def command(folder: Path, *flags: str) -> list[str]:
    options = QUICK | {"pretrained_model_name_or_path": str(saved_base()), "output_dir": str(folder)}
    given = [argument for name, value in options.items() for argument in (f"--{name}", str(value))]
    return [sys.executable, str(ROOT / "train_dreambooth_nora_sdxl.py"), *given, *flags]


def test_killed_at_random_moments(tmp_path):
    """SIGKILL, six times, each a random while after a step; the last resumption ends like the run never killed."""
    steps, environment = 36, os.environ | {"OMP_NUM_THREADS": "1"}
    flags = ["--max_train_steps", str(steps), "--checkpointing_steps", "2", "--checkpoints_total_limit", "3"]
    flags += ["--encoded_cache_dir", str(tmp_path / "encoded"), "--train_text_encoder", "--random_flip"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole, *flags), env=environment, check=True, capture_output=True)
    last = command(killed, *flags, "--resume_from_checkpoint", "latest")
    killing = [sys.executable, str(Path(__file__).parent / "killed_runs.py"), str(killed), str(steps), "6", *last[2:]]
    kills = subprocess.run(killing, env=environment, check=True, capture_output=True, text=True)
    assert kills.stdout.split() == ["6"], kills.stdout
    done = subprocess.run(last, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    same_ends(whole, killed)
    assert [step for step, _ in checkpoints(killed)] == [steps - 4, steps - 2, steps]
    assert not list(killed.glob(".checkpoint-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_and_leaves(tmp_path, number):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(tmp_path / "run", "--max_train_steps", "100000"), env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") >= 2):
        time.sleep(0.02)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "--resume_from_checkpoint latest" in error
    (step, folder), *rest = checkpoints(tmp_path / "run")
    assert not rest and step == len(losses(tmp_path / "run"))
    assert (folder / FOLDED_WEIGHTS).is_file() and (folder / INNER_WEIGHTS).is_file()
    assert f"Stopped at step {step:,} of 100,000" in (tmp_path / "run" / "run.html").read_text()


# --- what a checkpoint is ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    run(folder, max_train_steps=3, checkpointing_steps=1)
    (folder / "run.json").unlink()
    return folder


@pytest.fixture
def copy(stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    return tmp_path / "run"


def test_torn_and_foreign_folders_are_passed_over(copy):
    (copy / "checkpoint-9").mkdir()  # what diffusers would take for the latest
    (copy / "checkpoint-x").mkdir()
    (copy / "checkpoint-12").write_text("")
    assert find_checkpoint("latest", copy).name == "checkpoint-3"
    assert find_checkpoint("checkpoint-2", copy).name == find_checkpoint(str(copy / "checkpoint-2"), copy).name
    with pytest.raises(
        ValueError, match="checkpoint-9 is no whole checkpoint; .* has checkpoint-1, checkpoint-2, chec"
    ):
        find_checkpoint("checkpoint-9", copy)


def test_a_path_is_that_path(copy, tmp_path):
    shutil.copytree(copy / "checkpoint-1", tmp_path / "other" / "checkpoint-1")
    path = tmp_path / "other" / "checkpoint-1"
    assert find_checkpoint(str(path), copy) == path and find_checkpoint("checkpoint-1", copy) == copy / path.name


def test_a_checkpoint_of_an_earlier_version_is_called_that(copy):
    state = json.loads((copy / "checkpoint-3" / STATE).read_text())
    del state["plans_ahead"]
    (copy / "checkpoint-3" / STATE).write_text(json.dumps(state))
    with pytest.raises(ValueError, match="checkpoint-3 is of an earlier version, .*start anew in another --output_dir"):
        read_step(copy / "checkpoint-3", state, 3)


def test_every_damaged_file_is_named(copy):
    identity = {name: json.loads((copy / "checkpoint-3" / STATE).read_text())[name] for name in ("flags", "content")}
    assert read_step(copy / "checkpoint-3", identity, 3) == 3
    with pytest.raises(ValueError, match="--max_train_steps 2 is less than the 3"):
        read_step(copy / "checkpoint-3", identity, 2)
    files = [path for path in (copy / "checkpoint-3").rglob("*") if path.is_file()]
    assert len(files) >= 7
    for path in files:
        whole = path.read_bytes()
        for damaged in (whole[: len(whole) // 2], b"{}", b"[]"):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=f"is damaged .file {re.escape(path.name)}.: go on from an older one"):
                read_step(copy / "checkpoint-3", identity, 3)
        path.write_bytes(whole)


@pytest.mark.parametrize("steps", [3, 4])
def test_resuming_without_the_log_of_the_steps(copy, steps):
    (copy / "metrics.jsonl").write_text("garbage\n")
    before = sorted(copy.rglob("*"))
    with pytest.raises(ValueError, match="metrics.jsonl is damaged"):
        run(copy, max_train_steps=steps, resume_from_checkpoint="latest")
    assert sorted(copy.rglob("*")) == before
    (copy / "metrics.jsonl").unlink()
    run(copy, max_train_steps=steps, resume_from_checkpoint="latest")
    record = json.loads((copy / "run.json").read_text())
    assert ("seconds_per_step" in record["timings"]) == (steps == 4)


def test_latest_of_nothing_is_a_new_run(tmp_path):
    assert losses(run(tmp_path / "run", resume_from_checkpoint="latest")) == losses(run(tmp_path / "plain"))


def test_a_run_older_than_an_option_goes_on_as_it_was(tmp_path):
    """With flags that say nothing of it, whose default is another now; the record says what it was."""
    options = {"max_train_steps": 3, "checkpointing_steps": 2, "encoded_cache_dir": str(tmp_path / "encoded")}
    whole, older = tmp_path / "whole", tmp_path / "older"
    run(whole, method_args=["statistic=subject", "basis=exact"], **options)
    shutil.copytree(whole, older)
    for name in ("run.json", FOLDED_WEIGHTS, INNER_WEIGHTS):
        (older / name).unlink()
    path = older / "checkpoint-2" / STATE
    state = json.loads(path.read_text())
    del state["flags"]["targets"]
    said = [one for one in state["flags"]["method_args"] if not one.startswith(("statistic=", "basis="))]
    state["flags"]["method_args"] = said
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match="--targets was attention and is all-linear"):
        run(older, resume_from_checkpoint="latest", targets="all-linear", **options)
    with pytest.raises(ValueError, match="--method_args was .* and is "):
        run(older, resume_from_checkpoint="latest", method_args=["awsvd_gamma=1"], **options)
    run(older, resume_from_checkpoint="latest", **options)
    same_ends(whole, older)
    recorded = json.loads((older / "run.json").read_text())["config"]["method_args"]
    assert {"statistic=subject", "basis=exact"} <= set(recorded)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rank": 2}, "--rank was 4 and is 2"),
        ({"learning_rate": 1e-3, "seed": 3}, "--learning_rate was 0.01 and is 0.001; --seed was 0 and is 3"),
        ({"train_text_encoder": True}, "--train_text_encoder was False and is True"),
        ({"instance_prompt": "a [V] cat"}, "--instance_prompt was a photo of"),
        ({"instance_data_dir": str(ROOT / "assets" / "subjects" / "dog")}, "the pictures and prompts changed"),
    ],
)
def test_another_run_is_refused_with_the_difference(copy, changes, words):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=words):
        run(copy, max_train_steps=4, resume_from_checkpoint="latest", checkpointing_steps=1, **changes)
    assert before == {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path in before}


def test_another_base_is_refused(copy, tmp_path):
    from tiny_sdxl import build_pipeline

    build_pipeline(seed=9).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the base changed"):
        run(
            copy,
            max_train_steps=4,
            resume_from_checkpoint="latest",
            pretrained_model_name_or_path=str(tmp_path / "other"),
        )


def test_a_run_that_did_not_finish_is_not_overwritten(copy):
    with pytest.raises(ValueError, match="checkpoint-3 of a run that did not finish: add --resume_from_checkpoint"):
        run(copy)
    assert [step for step, _ in checkpoints(copy)] == [1, 2, 3]
    (copy / "run.json").write_text("{}")  # finished: its result may be replaced
    run(copy)
    assert checkpoints(copy) == []


def test_earlier_samples_are_kept(tmp_path):
    options = {"validation_steps": 1, "num_validation_images": 1, "checkpointing_steps": 2, "max_train_steps": 4}
    folder = run(tmp_path, **options)
    names = sorted(str(path.relative_to(folder)) for path in (folder / "samples").rglob("*.png"))
    first = folder / "samples" / "step-000001" / Path(names[-1]).name
    first.write_bytes(b"of the first two steps")
    (folder / "samples" / "step-000003" / "stale.png").touch()
    run(tmp_path, **options, resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert first.read_bytes() == b"of the first two steps"
    assert sorted(str(path.relative_to(folder)) for path in (folder / "samples").rglob("*.png")) == names
    data = page_data(folder / "run.html")  # one continuous curve, and the samples of both parts
    assert data["charts"][0]["series"][0]["steps"] == [1, 2, 3, 4] and data["steps"] == [2, 3, 4]
    assert data["charts"][0]["series"][0]["values"] == pytest.approx(losses(folder), rel=1e-4)


def test_a_page_that_can_not_be_written_ends_no_run(copy, capsys):
    (copy / "run.html").unlink()
    (copy / "run.html").mkdir()
    (copy / "run.html" / "mine.txt").write_text("mine")
    run(copy, max_train_steps=4, checkpointing_steps=1, resume_from_checkpoint="latest")
    assert capsys.readouterr().err.count("run.html was not written") == 1
    assert len(losses(copy)) == 4 and (copy / "run.json").is_file() and (copy / "run.html" / "mine.txt").is_file()


def test_more_steps_than_before(copy):
    resumed = run(copy, max_train_steps=5, resume_from_checkpoint="latest")
    assert losses(resumed) == losses(run(copy.parent / "whole", max_train_steps=5))


PLANNED = {
    "cosine": ({"lr_scheduler": "cosine"}, "--lr_scheduler cosine depends on it"),
    "linear": ({"lr_scheduler": "linear"}, "--lr_scheduler linear depends on it"),
    "restarts": ({"lr_scheduler": "cosine_with_restarts"}, "--lr_scheduler cosine_with_restarts depends on it"),
    "polynomial": ({"lr_scheduler": "polynomial"}, "--lr_scheduler polynomial depends on it"),
    "text encoders": (
        {"train_text_encoder": True, "train_text_encoder_frac": 0.5},
        "--train_text_encoder_frac 0.5 depends on it",
    ),
    "new tokens": ({"train_text_encoder_ti": True}, "--train_text_encoder_ti_frac 0.5 depends on it"),
    "adalora": ({"method": "adalora", "rank": None}, "--method adalora depends on it"),
}


@pytest.mark.parametrize("case", PLANNED)
def test_other_steps_than_a_schedule_was_made_for_are_refused(tmp_path, case):
    """A cosine went .01 … .0015, 0, .0031, .0015, and text encoders that had been done learned again."""
    options, words = PLANNED[case]
    folder = run(tmp_path, max_train_steps=2, checkpointing_steps=2, **options)
    before = losses(folder)
    # six pictures, two a step
    longer = {"max_train_steps": None, "num_train_epochs": 3} if case == "cosine" else {"max_train_steps": 9}
    with pytest.raises(ValueError, match=f"--max_train_steps was 2 and is 9, and {words}. Undo that, or start anew"):
        run(tmp_path, resume_from_checkpoint="latest", **longer, **options)
    assert losses(folder) == before


def test_a_warmup_and_text_encoders_that_always_learn_may_go_on(tmp_path):
    options = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 3, "train_text_encoder": True}
    resumed = run(tmp_path / "one", max_train_steps=2, checkpointing_steps=1, **options)
    run(tmp_path / "one", max_train_steps=4, resume_from_checkpoint="latest", **options)
    assert losses(resumed) == losses(run(tmp_path / "whole", max_train_steps=4, **options))


def test_limit_keeps_the_newest_and_deletes_only_after_writing(tmp_path, monkeypatch):
    counts = []
    save = hooks.save_checkpoint

    def look(accelerator, folder, **rest):
        before = {step for step, _ in checkpoints(folder)}
        path = save(accelerator, folder, **rest)
        counts.append((before, {step for step, _ in checkpoints(folder)}))
        return path

    monkeypatch.setattr(hooks, "save_checkpoint", look)
    folder = run(tmp_path, max_train_steps=6, checkpointing_steps=2, checkpoints_total_limit=2)
    assert counts == [(set(), {2}), ({2}, {2, 4}), ({2, 4}, {4, 6})]
    assert json.loads((folder / "checkpoint-6" / "training_state.json").read_text())["step"] == 6


class OneProcess:
    """As much of an accelerator as saving a checkpoint needs."""

    is_main_process = True

    def wait_for_everyone(self):
        pass

    def save_state(self, folder):
        (Path(folder) / "weights").write_text("")


def save_steps(folder: Path, *steps: int, limit: int | None = None) -> list[int]:
    for step in steps:
        assert save_checkpoint(OneProcess(), folder, step, {}, limit).is_dir()
    return [step for step, _ in checkpoints(folder)]


@pytest.mark.parametrize(("limit", "left"), [(None, [2, 3]), (1, [3]), (2, [2, 3]), (5, [2, 3])])
def test_going_on_from_an_older_one_leaves_the_later_ones_behind(tmp_path, limit, left):
    """With the highest steps kept, the limit would take the checkpoint that was just written."""
    assert save_steps(tmp_path, 2, 4, 6) == [2, 4, 6]
    assert save_steps(tmp_path, 3, limit=limit) == left
    assert len(list(tmp_path.iterdir())) == len(left)


def test_later_ones_go_only_after_writing(tmp_path):
    class Looking(OneProcess):
        def save_state(self, folder):
            super().save_state(folder)
            assert [step for step, _ in checkpoints(tmp_path)] == [2, 4]

    save_steps(tmp_path, 2, 4)
    save_checkpoint(Looking(), tmp_path, 2, {}, total_limit=1)
    assert [step for step, _ in checkpoints(tmp_path)] == [2]


def test_a_checkpoint_of_another_trainer_is_refused(tmp_path):
    """diffusers' script has the same default folder, and the same names in it."""
    (tmp_path / "checkpoint-500").mkdir()
    (tmp_path / "checkpoint-500" / "optimizer.bin").write_text("weeks of work")
    save_steps(tmp_path, 2)
    with pytest.raises(ValueError, match="has checkpoint-500 without training_state.json: it is not of this trainer"):
        run(tmp_path, resume_from_checkpoint="latest")
    shutil.rmtree(tmp_path / "checkpoint-500")
    check_earlier_run(tmp_path, ["run.json"], "run.json", "metrics.jsonl", resumes=True)


def test_a_deletion_that_is_cut_off_leaves_nothing_that_is_refused(tmp_path, monkeypatch):
    rmtree = shutil.rmtree

    def cut_off(path, **options):
        if Path(path).exists():
            (Path(path) / STATE).unlink()
            raise KeyboardInterrupt

    save_steps(tmp_path, 2)
    monkeypatch.setattr(shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        save_steps(tmp_path, 4, limit=1)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    check_earlier_run(tmp_path, [], "run.json", "metrics.jsonl", resumes=True)
    clear_earlier_run(OneProcess(), tmp_path, [], keep_state=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_a_process_that_died_is_no_full_disk(tmp_path):
    class Alone(OneProcess):
        def wait_for_everyone(self):
            if list(tmp_path.rglob("weights")):
                raise RuntimeError("connection closed by peer")

    with pytest.raises(RuntimeError, match="^connection closed by peer"):
        save_checkpoint(Alone(), tmp_path, 3, {}, total_limit=None)


def test_old_checkpoints_survive_a_failed_write(tmp_path):
    class Failing(OneProcess):
        def save_state(self, folder):
            (Path(folder) / "half").write_text("")
            raise OSError("no space left on device")

    for step in (1, 2):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "training_state.json").write_text("{}")
    with pytest.raises(
        OSError, match="checkpoint-3 could not be written .no space left .* Older checkpoints are whole"
    ):
        save_checkpoint(Failing(), tmp_path, 3, {}, total_limit=1)
    assert [step for step, _ in checkpoints(tmp_path)] == [1, 2] and len(list(tmp_path.iterdir())) == 2
