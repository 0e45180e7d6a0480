"""Texts of users where the suite reads them: prompts, captions, manifests, records, scores, protocols."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from test_trainer import CAT, QUICK, run
from tiny_sdxl import saved_base

from dreambooth.data import folder_examples, read_caption
from inference.adapter_files import recorded_base
from inference.gallery import read_scores
from inference.manifest import image_names, read_manifest, write_image, write_manifest
from inference.score_labels import SCORES_VERSION
from judging.prompts import Protocol
from runs.interval import Interval
from settings.sampling import GenerateConfig, read_prompts
from storage.text import spell

ROOT = Path(__file__).parent.parent
INPUTS = ROOT.parent / "shared" / "faults" / "inputs"
BOM = b"\xef\xbb\xbf"
SEPARATORS = "a\u2028b\x85c\u2029d\x0be\x0cf\x1cg"
NOT_UTF8 = os.fsdecode(b"caf\xe9")


def test_a_prompt_file_with_a_mark_has_no_letter_more(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(BOM + b"a robot on the beach\r\na robot in the snow\r\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["a robot on the beach", "a robot in the snow"]
    if (INPUTS / "bom_prompts.txt").is_file():
        assert read_prompts(INPUTS / "bom_prompts.txt") == ["a robot on the beach", "a robot in the snow"]


def test_a_prompt_ends_at_the_end_of_its_line(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(f"{SEPARATORS}\nother\n".encode())
    assert read_prompts(tmp_path / "prompts.txt") == [SEPARATORS, "other"]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "latin-1"])
def test_prompts_and_captions_in_another_encoding_are_refused(tmp_path, encoding):
    file = tmp_path / "a.txt"
    file.write_bytes("a robot in a café".encode(encoding))
    for read, what in ((read_prompts, "prompt file"), (read_caption, "caption")):
        with pytest.raises(ValueError, match=f"^{what} .*a.txt .*: save it as UTF-8$"):
            read(file)
    if (INPUTS / "utf16le_caption").is_dir():
        with pytest.raises(ValueError, match="holds NULs"):
            read_caption(next((INPUTS / "utf16le_caption").iterdir()))


def test_captions_with_marks_and_other_separators(tmp_path):
    for name in "ab":
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_bytes(BOM + "a [V] cat,\r\non\u2028a mat \r\n".encode())
    line = json.dumps({"file_name": "b.png", "text": SEPARATORS}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(BOM + f"{line}\r\n".encode())
    assert [one.prompt for one in folder_examples(tmp_path, "x")] == ["a [V] cat, on\u2028a mat", SEPARATORS]


@pytest.mark.parametrize("text", [r'"\ud83d"', r'"a\u0000b"'])
def test_captions_that_no_file_could_hold_are_refused(tmp_path, text):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "a.png", "text": {text}}}\n')
    with pytest.raises(ValueError, match=r"metadata.jsonl, line 1"):
        folder_examples(tmp_path, "x")


# --- what the commands wrote, and a user edited -----------------------------------------------------------------------


def record_of(prompt, **others):
    return {"file": "a.png", "prompt": prompt, "seed": 0, "adapter": None, "scale": 1.0, **others}


@settings(max_examples=100, deadline=None)
@given(prompt=st.text(st.characters(exclude_categories=("Cs",)) | st.sampled_from(SEPARATORS), min_size=1))
def test_a_manifest_takes_any_prompt_and_is_read_again(tmp_path_factory, prompt):
    folder = tmp_path_factory.mktemp("images")
    write_image(folder, record_of(prompt), Image.new("RGB", (4, 4)))
    write_manifest(folder, [record_of(prompt)])
    write_manifest(folder, [record_of(prompt, file="b.png")])
    assert [record["prompt"] for record in read_manifest(folder)] == [prompt, prompt]
    assert json.loads(Image.open(folder / "a.png").text["parameters"])["prompt"] == prompt
    assert image_names([prompt])


def test_records_with_a_mark_are_read(tmp_path):
    run_json = json.dumps({"config": {"pretrained_model_name_or_path": str(saved_base())}})
    (tmp_path / "run.json").write_bytes(BOM + run_json.encode())
    assert recorded_base(tmp_path) == str(saved_base())
    (tmp_path / "manifest.jsonl").write_bytes(BOM + json.dumps(record_of("a")).encode() + b"\r\n\r\n")
    assert read_manifest(tmp_path) == [record_of("a")]
    score = {"dino": Interval(0.5, 0.4, 0.6, varies=("prompts",), count=(6,)).fields()}
    scores = {"version": SCORES_VERSION, "scores": {"a": score}, "differences": None}
    (tmp_path / "scores.json").write_bytes(BOM + json.dumps(scores).encode())
    assert set(read_scores(str(tmp_path / "scores.json")).cells) == {"a"}


def test_protocols_mean_what_was_written(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(
        BOM + "images_per_prompt: 02\nobjects: {no: yes}\nboth_prompts: ['{} at 1:30', '{}\u2028']".encode()
    )
    found = Protocol.read(str(path), "no", False)
    assert (found.images_per_prompt, found.class_name, found.prompts) == (2, "yes", ["{} at 1:30", "{}\u2028"])
    for text in (
        "images_per_prompt: x\nboth_prompts: ['{}']",
        "- a",
        "a: [",
        "images_per_prompt: 1.5\nboth_prompts: []",
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="^--protocol "):
            Protocol.read(str(path), None, False)


# --- names and words --------------------------------------------------------------------------------------------------


def test_a_new_word_is_learned_where_it_stands_and_not_in_desks(tmp_path):
    options = {"train_text_encoder_ti": True, "token_abstraction": "sks"}
    with pytest.raises(ValueError, match="--token_abstraction sks is in no prompt"):
        run(tmp_path / "run", **options, instance_prompt="a cat asks for desks")
    folder = run(tmp_path / "run", **options, instance_prompt="a sks cat asks")
    words = json.loads((folder / "run.json").read_text())["new_words"]
    assert spell("a sks cat asks", words) == "a <sks0><sks1> cat asks"
    assert 'pipeline("a <sks0><sks1> cat asks")' in (folder / "README.md").read_text()


def test_pictures_whose_names_are_not_utf8_are_trained_on(tmp_path):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    try:
        shutil.copy(CAT / "01_sitting_white.png", pictures / f"{NOT_UTF8}.png")
    except OSError:
        pytest.skip("this file system takes no such name")
    (pictures / f"{NOT_UTF8}.txt").write_text("a [V] cat")
    folder = run(tmp_path / "run", instance_data_dir=str(pictures), max_train_steps=1)
    assert (folder / "run.json").is_file() and (folder / "README.md").is_file()
    # a dry run names pictures that are small
    flags = {**QUICK, "instance_data_dir": pictures, "pretrained_model_name_or_path": saved_base(), "resolution": 1024}
    command = [sys.executable, str(ROOT / "train_dreambooth_nora_sdxl.py"), "--dry_run"]
    command += [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 and rb"caf\udce9.png" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("flag", ["--output_dir", "--instance_data_dir", "--instance_prompt"])
def test_arguments_that_are_not_utf8_are_refused_before_anything_is_done(tmp_path, flag):
    command = [sys.executable, str(ROOT / "train_dreambooth_nora_sdxl.py")]
    command += [text for name, value in QUICK.items() for text in (f"--{name}", str(value))]
    command += ["--pretrained_model_name_or_path", str(saved_base()), "--output_dir", "run", flag, NOT_UTF8]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == 2 and not list(tmp_path.iterdir())
    assert done.stderr.decode().startswith(f"error: {flag} caf\\udce9 is not UTF-8")


def test_a_home_folder_that_a_shell_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = run("~/out", max_train_steps=1, encoded_cache_dir="~/cache")
    assert folder == tmp_path / "out" and (folder / "run.json").is_file() and (tmp_path / "cache").is_dir()
    assert not (tmp_path / "~").exists()
    assert GenerateConfig(adapter=["~/out"]).output_folder() == folder / "images"
    entries = [{"instance_data_dir": "~/pictures", "instance_prompt": "a [V] cat"}]
    (tmp_path / "concepts.json").write_text(json.dumps(entries))
    shutil.copytree(CAT, tmp_path / "pictures")
    options = {"concepts_list": "~/concepts.json", "instance_data_dir": None, "instance_prompt": None}
    run("~/other", max_train_steps=1, **options)
