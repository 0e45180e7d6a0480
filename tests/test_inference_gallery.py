"""inference.gallery: a page that stands alone, a sheet, and the figures of each adapter."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browser_pages import page_data
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from tiny_sdxl import build_pipeline, randomise_adapter, saved_base, saved_lora, saved_nora

from inference import columns
from inference.base import load_pipeline
from inference.figures import adapter_figures
from inference.gallery import main
from inference.generate import main as generate_main
from inference.load import load_adapter
from inference.page import UNKNOWN, PageColumn
from inference.sampling import generate_images
from inference.sheet import draw_sheet
from methods.components import EMBEDDINGS
from methods.registry import METHODS
from settings.sampling import SamplingConfig

PROMPTS = ["[V] photo of a cat", 'a <b>"dog"</b> & a cat on the beach']
VOID = {"meta", "img", "col", "br", "link", "input"}
COMMAND = ["--base", str(saved_base()), "--adapters", f"lora={saved_lora()}", f"nora={saved_nora()}"]
COMMAND += ["--prompts", *PROMPTS, "--seeds", "0", "1", "--num_inference_steps", "2"]


class Parsed(HTMLParser):
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
        if tag == "img" and "src" in attributes:  # those without are the enlarged view's, filled when it opens
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
    main([*COMMAND, "--instance_images", str(folder / "subject"), "--output", str(folder / "out" / "gallery.html")])
    return folder / "out"


def shown(page: Path) -> list[Image.Image]:
    """The pictures of the grid, row by row."""
    pictures = [image for image in Parsed(page.read_text(encoding="utf-8")).images if "seed" in image["alt"]]
    return [decode(image["src"]) for image in pictures]


def test_the_page_has_every_picture(gallery):
    page = Parsed((gallery / "gallery.html").read_text(encoding="utf-8"))
    assert len(page.images) == 2 + 3 * len(PROMPTS) * 2 and all(image["alt"] for image in page.images)
    assert [picture.size for picture in shown(gallery / "gallery.html")] == [(32, 32)] * 12
    rows = page_data(gallery / "gallery.html")["rows"]
    commands = [(row["prompt"], shlex.split(cell[0]["command"])) for row in rows for cell in row["cells"]]
    assert all(f"--prompt={prompt}" in command for prompt, command in commands)
    assert sum(f"--adapter={saved_nora()}" in command for _, command in commands) == len(commands) // 3
    assert PROMPTS[1] in page.text  # escaped in the source, itself on the page
    assert sorted(path.name for path in gallery.iterdir()) == ["gallery.html", "gallery.png", "pictures"]


def test_what_is_there_is_not_drawn_again(gallery, monkeypatch, tmp_path):
    """The same command draws nothing, and not even loads the base; another prompt costs its own pictures."""
    monkeypatch.setattr(columns, "pipeline_for", lambda *args: pytest.fail("nothing is missing"))
    before = (gallery / "gallery.html").read_text()
    main([*COMMAND, "--output", str(gallery / "again.html")])
    assert shown(gallery / "again.html") == shown(gallery / "gallery.html")
    opened = []
    read = columns.open_image
    monkeypatch.setattr(columns, "open_image", lambda path: opened.append(path) or read(path))
    main([*COMMAND, "--output", str(gallery / "again.html")])
    assert len(opened) == len(set(opened)) == 12  # each once
    monkeypatch.undo()
    drawn = []
    generate = columns.generate_images
    monkeypatch.setattr(
        columns, "generate_images", lambda p, prompts, *a, **k: drawn.append(prompts) or generate(p, prompts, *a, **k)
    )
    main([*COMMAND, "--prompt", "a dog", "--output", str(gallery / "again.html")])
    assert drawn == [["a dog"]] * 3
    (gallery / "again.html").unlink()
    (gallery / "again.png").unlink()
    assert (gallery / "gallery.html").read_text() == before


def test_another_adapter_under_the_same_name_is_drawn_anew(tmp_path):
    output = ["--prompts", "a", "--seeds", "0", "--num_inference_steps", "1", "--output", str(tmp_path / "g.html")]
    pages = []
    for path in (saved_lora(), saved_lora(seed=2), saved_lora()):
        main(["--adapters", f"mine={path}", *output])
        pages.append(shown(tmp_path / "g.html"))
    assert pages[0] == pages[2] != pages[1] and pages[0][0] == pages[1][0]


def test_another_base_or_new_words_at_the_same_path_are_drawn_anew(tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(saved_base(), base)
    shutil.copytree(saved_lora(), run)
    command = ["--base", str(base), "--adapters", f"mine={run}", "--prompts", "a [V]", "--seeds", "0"]
    command += ["--num_inference_steps", "1", "--output", str(tmp_path / "g.html")]
    main(command)
    first = shown(tmp_path / "g.html")
    shutil.copytree(saved_base(48), base, dirs_exist_ok=True)
    shutil.copytree(saved_lora(hidden=48), run, dirs_exist_ok=True)
    main(command)
    second = shown(tmp_path / "g.html")
    assert first[0] != second[0] and first[1] != second[1]
    words = {"clip_l": torch.ones(1, 48), "clip_g": torch.ones(1, 48)}
    save_file(words, run / EMBEDDINGS, metadata={"word": "[V]"})
    main(command)
    third = shown(tmp_path / "g.html")
    assert third[0] == second[0] and third[1] != second[1]


def test_a_run_s_variant_of_the_base_is_drawn_with_and_another_s_pictures_are_not_taken(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved_lora(), run)
    for seed, variant in enumerate(("fp16", "other")):
        build_pipeline(seed=seed).save_pretrained(tmp_path / "base", variant=variant)
    pages = []
    for variant in ("fp16", "other"):
        config = {"pretrained_model_name_or_path": str(tmp_path / "base"), "variant": variant}
        (run / "run.json").write_text(json.dumps({"config": config}))
        command = ["--adapters", f"mine={run}", "--prompts", "a", "--seeds", "0", "--num_inference_steps", "1"]
        main([*command, "--output", str(tmp_path / "g.html")])
        pages.append(shown(tmp_path / "g.html"))
    assert all(one != other for one, other in zip(*pages))


def test_a_prompt_without_the_subjects_word_is_reported(tmp_path, capsys):
    run = shutil.copytree(saved_lora(), tmp_path / "run")
    (run / "run.json").write_text(json.dumps({"config": {"instance_prompt": "a photo of [V] cat"}}))
    command = ["--base", str(saved_base()), "--adapters", f"lora={run}", "--output", str(tmp_path / "gallery.html")]
    main([*command, "--prompts", "a cat", "[V] photo of a cat", "--num_inference_steps", "1", "--seeds", "0"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert said == [f"warning: prompt 'a cat' lacks [V], the word for what {run} learned"]


def test_a_grid_with_gaps(tmp_path, capsys):
    for name, prompt in (("one", "a cat"), ("two", "a dog")):
        command = ["--base", str(saved_base()), "--prompt", prompt, "--num_inference_steps", "1"]
        generate_main([*command, "--output", str(tmp_path / name)])
    images = ["--images", f"one={tmp_path / 'one'}", f"two={tmp_path / 'two'}", "--output", str(tmp_path / "g.html")]
    main(images)
    assert len(shown(tmp_path / "g.html")) == 2 and (tmp_path / "g.png").is_file()
    with pytest.raises(SystemExit):
        main([*images, "--prompts", "a bird"])
    assert "have no picture of these --prompts" in capsys.readouterr().err


def test_scales_and_checkpoints_are_on_the_page(tmp_path):
    run = tmp_path / "run"
    shutil.copytree(saved_lora(), run)
    for step, seed in ((100, 2), (300, 3), (500, 1)):  # the last is the finished one
        shutil.copytree(saved_lora(seed), run / f"checkpoint-{step}")
    (run / "checkpoint-x").mkdir()
    output = ["--prompts", "a", "--seeds", "0", "--num_inference_steps", "1", "--output", str(tmp_path / "g.html")]
    main(["--adapters", f"mine={run}", "--checkpoints", "--scales", "0.5", "1", *output])
    data = page_data(tmp_path / "g.html")
    assert data["steps"] == [100, 300, 500] and data["scales"] == [0.5, 1.0]
    assert [len(cell) for cell in data["rows"][0]["cells"]] == [1, 6]
    pictures = len(list((tmp_path / "pictures" / "mine").glob("*.png")))
    assert pictures == 6


def test_checkpoints_and_the_best_are_not_the_finished_run(tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(saved_lora(), run)
    for name in ("checkpoint-100", "best"):
        shutil.copytree(saved_lora(2), run / name)
        (run / name / "run.json").unlink()
    (run / "best" / "scores.json").write_text('{"step": 200}')
    columns = ["--adapters", f"early={run / 'checkpoint-100'}", f"best={run / 'best'}", f"last={run}"]
    output = ["--prompts", "a", "--seeds", "0", "--num_inference_steps", "1", "--output", str(tmp_path / "g.html")]
    main([*columns, *output])
    assert page_data(tmp_path / "g.html")["steps"] == [100, 200, 500]
    figures = adapter_figures(run / "checkpoint-100")
    assert figures["Steps"] == "100" and figures["Training time"] == UNKNOWN and figures["Method"] == "LoRA"
    assert adapter_figures(run / "best")["Steps"] == "200" and adapter_figures(run)["Training time"] == "1 min 23 s"
    with pytest.raises(SystemExit):
        main([*columns[:3], "--checkpoints", *output])
    assert "none of the --adapters is a run's folder with checkpoints" in capsys.readouterr().err


def test_scales_of_a_folder_are_a_slider(tmp_path, capsys):
    command = ["--adapter", str(saved_lora()), "--prompt", "a", "--seeds", "0", "--num_inference_steps", "1"]
    generate_main([*command, "--scales", "0", "0.5", "1", "--output", str(tmp_path / "in")])
    flags = ["--images", f"x={tmp_path / 'in'}", "--output", str(tmp_path / "g.html")]
    main(flags)
    data = page_data(tmp_path / "g.html")
    assert data["scales"] == [0, 0.5, 1] and [shot["scale"] for shot in data["rows"][0]["cells"][0]] == [0, 0.5, 1]
    generate_main([*command, "--output", str(tmp_path / "in")])  # scale 1 again, under another name
    with pytest.raises(SystemExit):
        main(flags)
    assert "has two pictures of 'a' with seed 0, a-seed0-scale1.png and a-seed0.png" in capsys.readouterr().err


def test_pictures_from_manifests_are_columns(tmp_path):
    for name, adapter in (("one", saved_lora()), ("two", saved_lora(seed=2))):
        command = ["--adapter", str(adapter), "--prompts", *PROMPTS, "--seeds", "5", "--num_inference_steps", "1"]
        generate_main([*command, "--output", str(tmp_path / name)])
    main(["--images", f"one={tmp_path / 'one'}", f"two={tmp_path / 'two'}", "--output", str(tmp_path / "g.html")])
    page = Parsed((tmp_path / "g.html").read_text())
    assert len(page.images) == 4 and "seed 5" in page.text
    assert not (tmp_path / "pictures").exists()


def score_file(path, columns=("nora",), **more):
    score = {"estimate": 0.7123, "low": 0.701, "high": 0.7236, "level": 0.95, "varies": ["prompts"], "count": [6]}
    copies = {"count": 1, "pictures": 24, "false_alarm_rate": 0.05, "p_value": 0.7, "alarm": False}
    scores = {name: {"dino": score, "copies": copies} for name in columns}
    path.write_text(json.dumps({"version": 2, "scores": scores, "differences": None, **more}))
    return str(path)


def test_scores_are_shown_below_their_columns(gallery, tmp_path):
    difference = {
        "estimate": -0.007,
        "low": -0.028,
        "high": 0.014,
        "level": 0.95,
        "varies": ["trainings"],
        "count": [3],
    }
    difference |= {"p_value": 0.29, "detectable": 0.03}
    more = {"differences": {"first": "lora", "others": {"nora": {"dino": difference}}}}
    more["costs"] = {"nora": {"Peak memory": "77 MB"}}
    more["draws"] = {"nora": {"dino": {PROMPTS[0]: {"1": 0.8125}}, "diversity": {PROMPTS[0]: {"1": 0.5}}}}
    scores = score_file(tmp_path / "scores.json", ("lora", "nora"), **more)
    main([*COMMAND, "--scores", scores, "--output", str(gallery / "scored.html")])
    text = Parsed((gallery / "scored.html").read_text()).text
    cells = [row["scores"] for row in page_data(gallery / "scored.html")["rows"]]
    assert [cell for row in cells for cell in row if cell] == [{"DINO ↑": 0.8125}]  # to sort by: of one picture alone
    assert "0.712 [0.701, 0.724]" in text and "DINO" in text and "1 of 24" in text and "77 MB" in text
    assert "-0.007 [-0.028, +0.014], p 0.290" in text
    assert "nora and lora in DINO: no difference shown at 3 trainings; one of 0.030 would have been" in text
    for name in ("scored.html", "scored.png"):
        (gallery / name).unlink()


def test_scores_of_an_older_version_are_refused_in_a_sentence(tmp_path, capsys):
    """Their ± was another one: half an interval here, a spread there."""
    old = {
        "dino": {"mean": 0.7, "std": 0.01, "low": 0.69, "high": 0.71},
        "memorisation": {"nearest": 0.6, "alarm": True},
    }
    for version in ({"version": 1}, {}):
        (tmp_path / "old.json").write_text(json.dumps({**version, "scores": {"nora": old}}))
        with pytest.raises(SystemExit):
            main([*COMMAND, "--scores", str(tmp_path / "old.json"), "--output", str(tmp_path / "g.html")])
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1 and "is of version 1" in errors[0] and "run judging.evaluate again" in errors[0]
    assert not (tmp_path / "g.html").exists()


def test_the_page_shows_what_each_adapter_costs(gallery):
    text = Parsed((gallery / "gallery.html").read_text(encoding="utf-8")).text
    for figure in ("LoRA", "NoRA", "1,234,567", "7,654,321", "1 min 23 s", "0.167 s", "1.54 GB", "500"):
        assert figure in text, figure


def test_columns_hold_the_models_images_and_rows_start_from_the_same_noise(gallery):
    images = shown(gallery / "gallery.html")
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
    columns = [PageColumn("base", "", {}, {}), PageColumn("a-very-long-name-" * 5, "many words " * 20, {}, {})]
    prompt = "a very long prompt " * 20
    images = {(column.name, prompt, 0): Image.new("RGB", (2048, 1024), "green") for column in columns}
    sheet = draw_sheet(columns, images, [prompt], [0])
    assert 2 * 512 < sheet.width < 2 * 512 + 200
    assert sheet.height > 256 + 3 * 40


def test_the_sheet_keeps_the_shape_of_every_picture():
    columns = [PageColumn(name, "", {}, {}) for name in ("square", "tall", "wide")]
    sizes = {"square": (256, 256), "tall": (100, 200), "wide": (300, 100)}
    colours = {"square": (255, 0, 0), "tall": (0, 255, 0), "wide": (0, 0, 255)}
    images = {(name, "a", 0): Image.new("RGB", size, colours[name]) for name, size in sizes.items()}
    sheet = np.asarray(draw_sheet(columns, images, ["a"], [0]))
    for name, (width, height) in sizes.items():
        rows, places = np.nonzero((sheet == colours[name]).all(axis=2))
        shown = np.ptp(places) + 1, np.ptp(rows) + 1
        assert shown[0] / shown[1] == pytest.approx(width / height, rel=0.02) and max(shown) == 256


def test_the_sheet_shows_every_training_image():
    images = {("base", "a", 0): Image.new("RGB", (64, 64), "white")}
    colours = [(200, 5 * index, 0) for index in range(40)]
    instances = [(str(colour), Image.new("RGB", (300, 40 + colour[1]), colour)) for colour in colours]
    instances.append(("panorama", Image.new("RGB", (9000, 100), (0, 200, 200))))
    sheet = draw_sheet([PageColumn("base", "", {}, {})], images, ["a"], [0], instances)
    shown = {colour for _, colour in sheet.getcolors(sheet.width * sheet.height)}
    assert not {*colours, (0, 200, 200)} - shown


def test_figures_that_are_not_known_are_dashes(tmp_path):
    shutil.copy(saved_lora() / "pytorch_lora_weights.safetensors", tmp_path / "from-elsewhere.safetensors")
    figures = adapter_figures(tmp_path / "from-elsewhere.safetensors")
    assert figures["Method"] == figures["Trainable parameters"] == figures["Training time"] == UNKNOWN
    assert figures["LoRA file"].endswith("kB") and "NoRA file (inner only)" not in figures
    record = {"method": "nora", "config": {"rank": 16, "outer_rank": None}, "timings": None, "peak_memory_mb": None}
    (tmp_path / "run.json").write_text(json.dumps(record))
    figures = adapter_figures(tmp_path)
    assert (figures["Method"], figures["Rank of the update"], figures["Outer rank"]) == ("NoRA", "16", UNKNOWN)


def test_figures_are_those_of_the_files_that_the_run_recorded(tmp_path):
    """Of any method: a run may hold nothing but PEFT folders, and its name may be in no registry."""
    (tmp_path / "peft" / "unet").mkdir(parents=True)
    sizes = {"peft/unet/adapter_config.json": 100, "peft/unet/adapter_model.safetensors": 2400}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(b"x" * size)
    for method, title in (("lokr", METHODS["lokr"].title), ("my-own", "my-own")):
        record = {"method": method, "config": {"rank": 4}, "files": sizes}
        (tmp_path / "run.json").write_text(json.dumps(record))
        figures = adapter_figures(tmp_path)
        assert figures["Method"] == title and figures["PEFT folders"] == "2.5 kB"
        assert not any("LoRA file" in label for label in figures)
    names = ("pytorch_lora_weights.safetensors", "nora_inner_weights.safetensors")
    record = {"method": "nora", "files": {name: (saved_nora() / name).stat().st_size for name in names}}
    for name in names:
        shutil.copy(saved_nora() / name, tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(record))
    figures = adapter_figures(tmp_path)
    assert figures["LoRA file"] != figures["NoRA file (inner only)"] and "PEFT folders" not in figures


@pytest.mark.parametrize("adapter", ["lora", "nora", "loha", "ia3", "oft", "pissa"])
def test_a_base_column_is_drawn_with_nothing_on_the_pipeline(adapter, tmp_path):
    """Base, adapter, base, on one pipeline: the base's pictures are the same to the bit."""
    path = {"lora": saved_lora, "nora": saved_nora}.get(adapter, lambda: saved_peft(adapter, tmp_path / adapter))()
    config = SamplingConfig(base=str(saved_base()), num_inference_steps=2, device="cpu")
    sets = [columns.SampleSet(str(place), model, PROMPTS) for place, model in enumerate((None, path, None))]
    before, adapted, after = columns.CachedSampler(config, tmp_path / "pictures").draw(sets, [0, 1])
    pairs = list(zip(before, adapted, after, strict=True))
    assert len(pairs) == 4 and len(list((tmp_path / "pictures" / "2").glob("*.png"))) == 4  # not read from the first
    for one, other, again in pairs:
        assert one.image.tobytes() == again.image.tobytes() != other.image.tobytes()


def saved_peft(method: str, folder: Path) -> Path:
    """A PEFT folder with a random update: of a method that no LoRA file holds, or of PiSSA, which changes the base."""
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    config = {
        "loha": lambda: LoHaConfig(r=2, target_modules=targets),
        "ia3": lambda: IA3Config(target_modules=targets, feedforward_modules=[]),
        "pissa": lambda: LoraConfig(r=2, target_modules=targets, init_lora_weights="pissa"),
        "oft": lambda: OFTConfig(oft_block_size=4, target_modules=targets, module_dropout=0.0),
    }[method]()
    model = get_peft_model(build_pipeline().unet, config)
    randomise_adapter(model, seed=4)
    model.save_pretrained(folder)
    return folder


def test_bad_input_is_one_sentence_and_writes_nothing(tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "cat.png").write_bytes(b"not an image")
    (tmp_path / "a.html").mkdir()
    (tmp_path / "record").mkdir()
    (tmp_path / "record" / "run.json").write_text("{")
    (tmp_path / "record" / "scores.json").write_text('{"version": 2, "scores": []}')
    score_file(tmp_path / "other.json", ["y"])
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "run.json").write_text('{"config": ["a"], "method": ["x"]}')
    for name in ("record", "odd"):
        shutil.copy(saved_lora() / "pytorch_lora_weights.safetensors", tmp_path / name)
    base, prompts = ["--base", str(saved_base())], ["--prompts", "a"]
    good = [*base, *prompts, "--adapters", f"x={saved_lora()}"]
    cases = {
        "unknown flag": ([*good, "--theme", "dark"], "unrecognized arguments: --theme dark"),
        "no adapter": ([*base, *prompts], "no adapter: give at least one"),
        "no name": ([*base, *prompts, "--adapters", str(saved_lora())], "must be NAME=PATH"),
        "name twice": ([*good, f"x={saved_lora()}"], "the name x is taken"),
        "name of the base": ([*base, *prompts, "--adapters", f"base={saved_lora()}"], "the name base is taken"),
        "no such adapter": ([*base, *prompts, "--adapters", "x=nowhere"], "adapter nowhere does not exist"),
        "damaged record": ([*prompts, "--adapters", f"x={tmp_path / 'odd'}"], "that names its base"),
        "no manifest": (["--images", f"x={tmp_path / 'empty'}"], "has no manifest"),
        "pictures of an adapter's name": ([*good, "--images", f"x={tmp_path}"], "the name is an adapter's already"),
        "no scores": (
            [*good, "--scores", str(tmp_path / "record" / "scores.json")],
            "is not a file of judging.evaluate",
        ),
        "no prompt": ([*base, "--adapters", f"x={saved_lora()}"], "no prompt: give at least one with --prompts"),
        "scores of others": ([*good, "--scores", str(tmp_path / "other.json")], "has none of these columns: it has y"),
        "a flag of drawing": (["--images", "x=y", "--scales", ".2", ".9"], "--scale is for what is drawn"),
        "checkpoints of pictures": (["--images", "x=y", "--checkpoints"], "--checkpoints is for what is drawn"),
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
