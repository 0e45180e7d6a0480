"""A user's files: nothing that a flag names is lost, nor anything that this suite has not written."""

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from drawn_pictures import encoded, ramp
from PIL import Image
from tiny_sdxl import saved_base

from inference import gallery, generate
from judging import evaluate
from runs.checkpoints import check_earlier_run, clear_earlier_run, save_checkpoint
from runs.exports import RESULTS
from runs.record import PAGE_MARK, file_sizes
from settings.columns import CompareConfig, EvaluateConfig, GalleryConfig
from settings.sampling import GenerateConfig
from settings.training import TrainConfig
from storage.files import replacing_folder
from storage.pictures import drawn_here, png_bytes
from trainer.compare import check_places, plan
from trainer.preflight import preflight
from trainer.samples import Sample, keep_samples


def save(folder, *names, mode="RGB"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        Image.new(mode, (40, 30), (number * 20, 90, 200) if mode == "RGB" else 255).save(folder / name)
    return folder


def preflight_of(output_dir, **options):
    given = {"pretrained_model_name_or_path": str(saved_base()), "instance_prompt": "a photo of [V] cat"}
    return preflight(TrainConfig.of(**given, output_dir=str(output_dir), **options))


@pytest.mark.parametrize("place", ["samples", "best", "peft/unet", "checkpoint-5/mine", "encoded", "best/../samples/x"])
@pytest.mark.parametrize("dry_run", [False, True])
def test_pictures_in_a_place_that_is_cleared_are_refused_before_training(tmp_path, place, dry_run):
    save(tmp_path / "out" / place, "a.png")
    with pytest.raises(ValueError, match="--instance_data_dir .* is an input, and .* is written or cleared here"):
        preflight_of(tmp_path / "out", instance_data_dir=str(tmp_path / "out" / place), dry_run=dry_run)
    assert len(list((tmp_path / "out").rglob("a.png"))) == 1


@pytest.mark.parametrize("flag", ["class_data_dir", "mask_data_dir", "validation_data_dir"])
def test_every_folder_that_a_flag_names_is_kept(tmp_path, flag):
    save(tmp_path / "out" / "samples", "a.png", mode="L")
    options = {"class_prompt": "a cat", "with_prior_preservation": True} if flag == "class_data_dir" else {}
    options |= {"validation_loss_steps": 1} if flag == "validation_data_dir" else {}
    options |= {"instance_data_dir": str(save(tmp_path / "cat", "a.png")), flag: str(tmp_path / "out" / "samples")}
    with pytest.raises(ValueError, match=f"--{flag} .* is an input, and .*samples is written or cleared here"):
        preflight_of(tmp_path / "out", **options)
    if flag != "class_data_dir":
        with pytest.raises(ValueError, match=f"--{flag} and --output_dir are the same folder"):
            preflight_of(tmp_path / "out" / "samples", **options)


def test_links_do_not_hide_where_a_picture_lies(tmp_path):
    """Pictures that are links into samples/, and a samples/ that is a link to the pictures."""
    save(tmp_path / "out" / "samples", "a.png")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").symlink_to(tmp_path / "out" / "samples" / "a.png")
    with pytest.raises(ValueError, match="the picture .*cat/a.png is an input, and .*samples is written"):
        preflight_of(tmp_path / "out", instance_data_dir=str(tmp_path / "cat"))
    save(tmp_path / "photos", "b.png")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "samples").symlink_to(tmp_path / "photos")
    with pytest.raises(ValueError, match="--instance_data_dir .*photos is an input, and .*samples is written"):
        preflight_of(tmp_path / "other", instance_data_dir=str(tmp_path / "photos"))


def finished_run(folder: Path) -> Path:
    """What a run leaves, with its record."""
    for place in ("samples/step-000001", "best", "peft/unet"):
        (folder / place).mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 0.1}\n')
    names = {"best": ["a.safetensors"], "": ["pytorch_lora_weights.safetensors", "peft/unet/adapter_model.safetensors"]}
    for place, record in (("best", "scores.json"), ("", "run.json")):
        for name in names[place]:
            (folder / place / name).write_bytes(b"weights")
        (folder / place / record).write_text(json.dumps({"files": file_sizes(folder / place, names[place])}))
    (folder / "README.md").write_text("card")
    (folder / "run.html").write_text(PAGE_MARK)
    for name in ("samples/a.png", "samples/step-000001/a.png"):
        (folder / name).write_bytes(png_bytes(ramp()))
    return folder


def test_only_what_a_run_has_recorded_is_cleared(tmp_path):
    folder = finished_run(tmp_path / "out")
    mine = [
        "samples/holiday.png",
        "samples/notes.txt",
        "best/notes.txt",
        "best/other.safetensors",
        "peft/unet/mine.txt",
    ]
    for name in mine:
        (folder / name).write_bytes(encoded(ramp()) if name.endswith("png") else b"mine")
    names = [*RESULTS, "samples", "best"]
    clear_earlier_run(SimpleNamespace(is_main_process=True), folder, names, keep_state=False)
    left = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert left == {"metrics.jsonl", *mine}
    assert not (folder / "samples" / "step-000001").exists()


def test_all_that_a_run_has_recorded_is_cleared(tmp_path):
    folder = finished_run(tmp_path / "out")
    clear_earlier_run(SimpleNamespace(is_main_process=True), folder, [*RESULTS, "samples", "best"], keep_state=False)
    assert [path.name for path in folder.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "name", ["pytorch_lora_weights.safetensors", "best/a.safetensors", "peft/unet/adapter_model.safetensors"]
)
def test_weights_that_the_record_does_not_have_are_refused(tmp_path, name):
    """Another LoRA was copied over the run's own, or beside it."""
    folder = finished_run(tmp_path / "out")
    check = partial(
        check_earlier_run, folder, [*RESULTS, "samples", "best"], "run.json", "metrics.jsonl", resumes=False
    )
    check()
    (folder / name).write_bytes(b"weeks of work")
    with pytest.raises(ValueError, match=f"has {name}, which no run has recorded there"):
        check()
    assert (folder / name).read_bytes() == b"weeks of work"


def test_another_programs_metrics_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("epoch,loss\n1,0.5\n")
    with pytest.raises(ValueError, match="has metrics.jsonl, .* it looks like your own"):
        check_earlier_run(tmp_path, list(RESULTS), "run.json", "metrics.jsonl", resumes=False)


def test_a_picture_with_a_samples_name_stays(tmp_path):
    (tmp_path / "a.png").write_bytes(mine := encoded(ramp()))
    here = SimpleNamespace(is_main_process=True, trackers=[])
    kept = keep_samples(here, [Sample("a", 0, "a.png", ramp()), Sample("b", 0, "b.png", ramp())], tmp_path, 1)
    assert (tmp_path / "a.png").read_bytes() == mine and kept[1].file == "b.png"
    assert all(drawn_here(tmp_path / one.file) for one in kept) and len(list(tmp_path.iterdir())) == 3


def test_files_in_a_folder_that_is_replaced_stay(tmp_path):
    (tmp_path / "best" / "in").mkdir(parents=True)
    for name in ("mine.txt", "weights", "in/mine.txt"):
        (tmp_path / "best" / name).write_text("old")
    with replacing_folder(tmp_path / "best") as fresh:
        (fresh / "weights").write_text("new")
    found = {str(path.relative_to(tmp_path)): path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {"best/mine.txt": "old", "best/in/mine.txt": "old", "best/weights": "new"}


def test_rotation_keeps_a_named_checkpoint_and_what_was_put_into_another(tmp_path):
    one = SimpleNamespace(
        is_main_process=True,
        wait_for_everyone=lambda: None,
        save_state=lambda folder: (Path(folder) / "weights").write_text("w"),
    )
    for step in (1, 2, 3):
        save_checkpoint(one, tmp_path, step, {}, total_limit=None)
    (tmp_path / "checkpoint-2" / "notes.txt").write_text("mine")
    save_checkpoint(one, tmp_path, 4, {}, total_limit=1, keep=tmp_path / "checkpoint-1")
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.name in ("weights", "notes.txt")}
    assert found == {"checkpoint-1/weights", "checkpoint-4/weights", "checkpoint-2-kept/notes.txt"}


@pytest.mark.parametrize("name", ["gallery.png", "gallery.html"])
def test_a_page_takes_the_place_of_no_other_file(tmp_path, name):
    """The sheet has the page's name, which nobody has asked for."""
    save(tmp_path, "gallery.png") if name == "gallery.png" else (tmp_path / name).write_text(
        "<title>My holiday</title>"
    )
    before = (tmp_path / name).read_bytes()
    with pytest.raises(ValueError, match=f"--output: .*{name} is there and is no"):
        gallery.run(
            GalleryConfig(adapters=["a=b"], prompts=["x"], output=str(tmp_path / "gallery.html"), instance_images=None)
        )
    assert (tmp_path / name).read_bytes() == before


def test_a_page_that_lands_on_an_input_is_refused(tmp_path):
    save(tmp_path / "cat", "gallery.png")
    with pytest.raises(ValueError, match="the picture .*gallery.png is an input"):
        gallery.run(
            GalleryConfig(
                adapters=["a=b"],
                prompts=["x"],
                output=str(tmp_path / "cat" / "gallery.html"),
                instance_images=str(tmp_path / "cat"),
            )
        )


@pytest.mark.parametrize("content", [b"method: nora", b'{"method": "nora", "files": {}}', b"\x00\x01"])
def test_scores_take_the_place_of_no_other_file(tmp_path, content):
    """Such as the run's own record, or a configuration."""
    (tmp_path / "run.json").write_bytes(content)
    with pytest.raises(ValueError, match="run.json is there and is no file of scores"):
        evaluate.run(EvaluateConfig(adapters=["a=b"], output=str(tmp_path / "run.json")))
    assert (tmp_path / "run.json").read_bytes() == content


@pytest.mark.parametrize(("place", "words"), [("nora/samples", "is an input"), (".", "same folder")])
def test_a_comparison_writes_over_no_input(tmp_path, place, words):
    save(tmp_path / place, "a.png")
    config = CompareConfig(output_dir=str(tmp_path), methods=["nora", "lora"])
    runs = plan(config, ["--pretrained_model_name_or_path", "b"])
    with pytest.raises(ValueError, match=f"--instance_data_dir .*{words}"):
        check_places(tmp_path, runs, [{"instance_data_dir": str(tmp_path / place)}], None)
    for name in ("table.md", "scores.json", "lora.log", "gallery.png"):
        (tmp_path / name).write_text("mine")
        with pytest.raises(ValueError, match=f"{name} is there and is no"):
            check_places(tmp_path, runs, [{}], None)
        (tmp_path / name).unlink()


def test_a_drawn_picture_takes_the_place_of_no_photo(tmp_path):
    name = "a-cat-seed0.png"
    (tmp_path / name).write_bytes(mine := encoded(ramp()))
    generate.run(
        GenerateConfig(
            base=str(saved_base()), prompt=["a cat"], output=str(tmp_path), num_inference_steps=1, device="cpu"
        )
    )
    assert (tmp_path / name).read_bytes() == mine and len(list(tmp_path.glob("*.png"))) == 2
