"""What a dry run says and refuses: all that the run itself would, before its first step."""

import json
import shutil

import pytest
from PIL import Image
from test_trainer import CAT, run
from tiny_sdxl import saved_base

import trainer.accelerator
from runs.checkpoints import FolderLock
from runs.record import METRICS


def refused(folder, words, **options):
    """By the dry run and by the run, in the same words, and nothing is written."""
    before = sorted(folder.rglob("*"))
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=words):
            run(folder / "run", dry_run=dry_run, **options)
        assert sorted(folder.rglob("*")) == before


@pytest.fixture
def pictures(tmp_path):
    shutil.copytree(CAT, tmp_path / "cat")
    return tmp_path / "cat"


def test_captions_that_are_too_long(tmp_path, pictures):
    (pictures / "01_sitting_white.txt").write_text("cat " * 99)
    refused(tmp_path, "has .* tokens and the base reads 32", instance_data_dir=str(pictures))


def test_prompts_of_held_out_pictures_and_classes_that_are_too_long(tmp_path, pictures):
    options = {"with_prior_preservation": True, "prior_teacher": True, "class_prompt": "cat " * 99}
    refused(tmp_path, "tokens and the base reads 32", **options)


def test_new_tokens_make_a_prompt_longer(tmp_path):
    options = {"train_text_encoder_ti": True, "token_abstraction": "cat", "num_new_tokens_per_abstraction": 40}
    refused(tmp_path, "tokens and the base reads 32", **options)


def test_a_new_word_that_the_base_knows(tmp_path):
    base = shutil.copytree(saved_base(), tmp_path / "base")
    from transformers import CLIPTokenizer

    for name in ("tokenizer", "tokenizer_2"):
        tokenizer = CLIPTokenizer.from_pretrained(base / name)
        tokenizer.add_tokens(["<v0>"])
        tokenizer.save_pretrained(base / name)
    options = {"train_text_encoder_ti": True, "pretrained_model_name_or_path": str(base)}
    refused(tmp_path, "the base's vocabulary has <v0> already", **options)


def test_checkpoints_of_another_run(tmp_path, pictures):
    options = {"checkpointing_steps": 1, "max_train_steps": 2, "instance_data_dir": str(pictures)}
    folder = run(tmp_path / "run", **options)
    options |= {"max_train_steps": 4, "resume_from_checkpoint": "latest"}
    refused(tmp_path, "--seed was 0 and is 5", **options, seed=5)
    Image.new("RGB", (40, 40), "red").save(pictures / "another.png")
    refused(tmp_path, "the pictures and prompts changed", **options)
    (pictures / "another.png").unlink()
    lines = (folder / METRICS).read_text()
    (folder / METRICS).write_text("{" + lines)
    refused(tmp_path, "metrics.jsonl is damaged", **options)
    (folder / METRICS).write_text(lines)
    (folder / "run.json").unlink()
    refused(tmp_path, "of a run that did not finish", **options | {"resume_from_checkpoint": None})


def test_a_folder_in_use(tmp_path):
    with FolderLock() as lock:
        lock.take(tmp_path / "run")
        refused(tmp_path, "is in use by another run")


def test_a_share_of_the_steps_that_leaves_none_and_a_method_that_has_too_few(tmp_path):
    refused(tmp_path, "leave the text encoders none", train_text_encoder=True, train_text_encoder_frac=0.1)
    args = {"method": "adalora", "rank": None, "method_args": ["tinit=2"]}
    refused(tmp_path, "leave none of the 2 steps", **args)


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_a_hub_that_is_not_reached_is_said_before_the_training(tmp_path):
    """The tests run offline."""
    for dry_run in (True, False):
        with pytest.raises(ValueError, match=r"^--push_to_hub .*offline.*hf auth login") as error:
            run(tmp_path / "run", push_to_hub=True, hub_token="hf_secret", dry_run=dry_run)
        assert "hf_secret" not in str(error.value) and not (tmp_path / "run").exists()


def test_an_error_of_the_hub_shows_no_token(tmp_path, monkeypatch):
    def fail(name, token, exist_ok):
        raise RuntimeError(f"401 for Bearer {token}")

    monkeypatch.setattr(trainer.accelerator, "create_repo", fail)
    with pytest.raises(ValueError, match="401 for Bearer …"):
        run(tmp_path / "run", push_to_hub=True, hub_token="hf_secret")


# --- what it says -----------------------------------------------------------------------------------------------------

SAID = "the subject has no word of its own"
CLASS = {"with_prior_preservation": True, "prior_teacher": True, "class_prompt": "a photo of a cat"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"instance_prompt": "a photo of sks cat"}, False),
        ({"instance_prompt": "a photo of sks cat"} | CLASS, False),
        ({"instance_prompt": "a photo of [V] cat"} | CLASS, False),
        ({"instance_prompt": "a photo of a cat"} | CLASS, True),
        ({"instance_prompt": "A photo of a cat"} | CLASS, True),
    ],
)
def test_sks_is_a_word_of_the_subjects_own(tmp_path, capsys, options, said):
    run(tmp_path / "run", dry_run=True, **options)
    assert (SAID in capsys.readouterr().out) == said


def test_lists_of_captions_are_called_lists(tmp_path, pictures):
    lines = [{"file_name": "01_sitting_white.png", "text": ["a cat", "a [V] cat"]}]
    (pictures / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    refused(tmp_path, "line 1: the caption of 01_sitting_white.png is a list, and", instance_data_dir=str(pictures))


def test_lists_of_captions_of_a_dataset_are_called_lists(tmp_path):
    import datasets

    rows = {
        "image": [str(CAT / "01_sitting_white.png")],
        "text": [["a cat", "a [V] cat"]],
        "number": [3],
        "none": [None],
    }
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    (tmp_path / "data").mkdir()
    data.to_parquet(tmp_path / "data" / "train.parquet")
    options = {"dataset_name": str(tmp_path / "data"), "instance_data_dir": None}
    refused(tmp_path, "row 0, in column text, is a list, and", caption_column="text", **options)
    refused(tmp_path, "row 0, in column number, is 3, and", caption_column="number", **options)
    refused(tmp_path, "row 0, in column none, is empty", caption_column="none", **options)
