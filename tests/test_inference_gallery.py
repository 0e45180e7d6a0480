"""inference.gallery: a page that stands alone, a sheet, and the figures of each adapter."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_sdxl import saved_base, saved_lora, saved_nora

from inference.base import load_pipeline
from inference.gallery import BASE_COLUMN, UNKNOWN, Column, adapter_figures, draw_sheet, main, render_page
from inference.generate import generate_images
from inference.load import load_adapter

PROMPTS = ["[V] photo of a cat", 'a <b>"dog"</b> & a cat on the beach']
VOID = {"meta", "img", "col", "br", "link", "input"}


class Page(HTMLParser):
    """Collects images and text, and checks that every tag is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.images: list[dict[str, str]] = []
        self.references: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], self.open

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "img":
            self.images.append(attributes)
        self.references += [value for name, value in attributes.items() if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data + "\n"


def decode(uri: str) -> Image.Image:
    kind, data = uri.split(",", 1)
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


@pytest.fixture(scope="module")
def gallery(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gallery")
    (folder / "subject").mkdir()
    Image.new("RGB", (60, 40), "red").save(folder / "subject" / "b.jpg")
    Image.new("RGBA", (40, 60), (0, 0, 255, 128)).save(folder / "subject" / "a.png")
    main(
        ["--base", str(saved_base()), "--adapters", f"lora={saved_lora()}", f"nora={saved_nora()}"]
        + ["--prompts", *PROMPTS, "--seeds", "0", "1", "--num_inference_steps", "2"]
        + ["--instance_images", str(folder / "subject"), "--output", str(folder / "out" / "gallery.html")]
    )
    return folder / "out"


def test_the_page_has_every_image_with_a_text_and_fetches_nothing(gallery):
    text = (gallery / "gallery.html").read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.images) == 2 + 3 * len(PROMPTS) * 2
    assert [image["alt"] for image in page.images[:2]] == ["instance image a.png", "instance image b.jpg"]
    expected = [
        f"{column}, seed {seed}: {prompt}"
        for prompt in PROMPTS
        for seed in (0, 1)
        for column in ("base", "lora", "nora")
    ]
    assert [image["alt"] for image in page.images[2:]] == expected
    assert all(decode(image["src"]).size == (32, 32) for image in page.images[2:])
    assert all(reference.startswith("data:image/png;base64,") for reference in page.references)
    assert not re.search(r"https?://|//[a-z]|url\(|@import|<script|<link", re.sub(r"base64,[\w+/=]+", "", text))
    assert PROMPTS[1] in page.text  # escaped in the source, itself on the page
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert sorted(path.name for path in gallery.iterdir()) == ["gallery.html", "gallery.png"]


def test_the_page_shows_what_each_adapter_costs(gallery):
    text = Page((gallery / "gallery.html").read_text(encoding="utf-8")).text
    for figure in ("LoRA", "NoRA", "1,234,567", "7,654,321", "1 min 23 s", "0.167 s", "1.54 GB", "500"):
        assert figure in text, figure


def test_columns_hold_the_models_images_and_rows_start_from_the_same_noise(gallery):
    images = [decode(image["src"]) for image in Page((gallery / "gallery.html").read_text()).images[2:]]
    pipeline = load_pipeline(saved_base(), torch_dtype=torch.float32, device="cpu")
    options = {"num_inference_steps": 2, "batch_size": 4, "progress": False}
    base = [drawn.image for drawn in generate_images(pipeline, PROMPTS, [0, 1], **options)]
    load_adapter(pipeline, saved_nora())
    adapted = [drawn.image for drawn in generate_images(pipeline, PROMPTS, [0, 1], **options)]
    for row in range(4):
        assert np.array_equal(images[3 * row], base[row])
        assert np.array_equal(images[3 * row + 2], adapted[row])
        assert not np.array_equal(images[3 * row + 1], base[row])


def test_the_sheet_is_legible(gallery):
    with Image.open(gallery / "gallery.png") as sheet:
        assert sheet.width > 3 * 160 and sheet.height > 4 * 160
        colours = {colour for _, colour in sheet.convert("RGB").getcolors(sheet.width * sheet.height)}
    assert (0, 0, 0) in colours and (168, 67, 15) in colours  # prompts and column headers were written


def test_sheet_wraps_long_texts_and_limits_large_images():
    columns = [
        Column(BASE_COLUMN, None, {}),
        Column("a-very-long-name-" * 5, Path("x"), dict(adapter_figures(Path("x")))),
    ]
    prompt = "a very long prompt " * 20
    images = {(column.name, prompt, 0): Image.new("RGB", (2048, 1024), "green") for column in columns}
    sheet = draw_sheet(columns, images, [prompt], [0])
    assert 2 * 512 < sheet.width < 2 * 512 + 200
    assert sheet.height > 256 + 3 * 40


def test_figures_that_are_not_known_are_dashes(tmp_path):
    shutil.copy(saved_lora() / "pytorch_lora_weights.safetensors", tmp_path / "from-elsewhere.safetensors")
    figures = adapter_figures(tmp_path / "from-elsewhere.safetensors")
    assert figures["Method"] == figures["Trainable parameters"] == figures["Training time"] == UNKNOWN
    assert figures["Adapter file (folded)"].endswith("kB") and figures["Adapter file (inner only)"] == UNKNOWN
    record = {"method": "nora", "config": {"rank": 16, "outer_rank": None}, "timings": None, "peak_memory_mb": None}
    (tmp_path / "run.json").write_text(json.dumps(record))
    figures = adapter_figures(tmp_path)
    assert (figures["Method"], figures["Rank of the update"], figures["Outer rank"]) == ("NoRA", "16", UNKNOWN)


def test_a_page_with_no_known_figure_and_no_instance_image_is_whole():
    columns = [Column(BASE_COLUMN, None, {}), Column("x", Path("x"), dict(adapter_figures(Path("x"))))]
    images = {(column.name, "a", 0): Image.new("RGB", (8, 8)) for column in columns}
    page = Page(render_page(columns, images, ["a"], [0], {"base": "b", "sampling": "2 steps"}))
    assert len(page.images) == 2 and UNKNOWN in page.text


def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "cat.png").write_bytes(b"not an image")
    (tmp_path / "a.html").mkdir()
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "run.json").write_text("{")
    shutil.copy(saved_lora() / "pytorch_lora_weights.safetensors", tmp_path / "record")
    base, prompts = ["--base", str(saved_base())], ["--prompts", "a"]
    good = [*base, *prompts, "--adapters", f"x={saved_lora()}"]
    cases = {
        "unknown flag": ([*good, "--theme", "dark"], "unrecognized arguments: --theme dark"),
        "no adapter": ([*base, *prompts], "no adapter: give at least one"),
        "no name": ([*base, *prompts, "--adapters", str(saved_lora())], "must be NAME=PATH"),
        "name twice": ([*good, f"x={saved_lora()}"], "the name x is taken"),
        "name of the base": ([*base, *prompts, "--adapters", f"base={saved_lora()}"], "the name base is taken"),
        "no such adapter": ([*base, *prompts, "--adapters", "x=nowhere"], "adapter nowhere does not exist"),
        "no prompt": ([*base, "--adapters", f"x={saved_lora()}"], "no prompt"),
        "seed twice": ([*good, "--seeds", "1", "1"], "seed 1 is given twice"),
        "no such base": ([*good, "--base", "./gone"], "base ./gone does not exist"),
        "no base": ([*prompts, "--adapters", f"x={tmp_path / 'record'}"], "run.json is not valid JSON"),
        "not a page": ([*good, "--output", str(tmp_path / "gallery.pdf")], "must end in .html"),
        "page is a folder": ([*good, "--output", str(tmp_path / "a.html")], "is a folder, and a file name is needed"),
        "no such folder": ([*good, "--instance_images", "gone"], "gone does not exist"),
        "empty folder": ([*good, "--instance_images", str(tmp_path / "empty")], "holds no picture"),
        "not an image": ([*good, "--instance_images", str(tmp_path / "damaged")], "cat.png is not a picture"),
        "another base's": (
            [*base, *prompts, "--adapters", f"fine={saved_lora()}", f"x={saved_lora(hidden=64)}"],
            "belongs to another base",
        ),
    }
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for case, (command, message) in cases.items():
        if "--output" not in command:
            command = [*command, "--output", str(tmp_path / "new" / "gallery.html")]
        with pytest.raises(SystemExit) as stopped:
            main(command)
        printed = capsys.readouterr()
        assert stopped.value.code == 2, case
        errors = [line for line in printed.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and message in errors[0], (case, printed.err)
        assert "Traceback" not in printed.err and printed.out == "", (case, printed)
        assert sorted(tmp_path.rglob("*")) == before, case


def test_the_module_runs_as_a_command():
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "inference.gallery", "--adapters", "nora=no-such-run", "--prompts", "a"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[1])
    assert done.returncode == 2
    assert re.fullmatch(r"error: adapter no-such-run does not exist .*\n", done.stderr), done.stderr
