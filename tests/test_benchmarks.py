"""What the benchmarks measure on."""

import json
import re
import runpy
from pathlib import Path
from statistics import fmean

import pytest
import torch
from accelerate import init_empty_weights

from benchmarks import __main__ as bench
from benchmarks import base_world, basis, block, cards, full_size, gpu
from benchmarks.sdxl_shape import base_folder, build_sdxl_shape
from inference.base import base_geometry, load_pipeline
from methods.components import TARGETS
from trainer.blocks import HalfLayerNorm

PERFORMANCE = (Path(__file__).parent.parent / "docs" / "performance.md").read_text()


def test_the_full_shape_is_sdxls():
    with init_empty_weights():
        pipeline = build_sdxl_shape("full")
    # as published: the UNet's 2.6 billion parameters, CLIP ViT-L's and OpenCLIP ViT-bigG's text towers, the autoencoder
    counts = {"unet": 2_567_463_684, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "vae": 83_653_863}
    assert {name: getattr(pipeline, name).num_parameters() for name in counts} == counts
    targets = [name for name, _ in pipeline.unet.named_modules() if name.endswith(TARGETS["unet"])]
    assert len(targets) == 560


def test_a_shape_is_a_base_like_any_other():
    with base_folder("sixteenth") as folder:
        assert base_geometry(folder) == (512, 32)
        pipeline = load_pipeline(folder, torch.float32, "cpu")
        latents = torch.randn(1, 4, 8, 8)
        added = {"text_embeds": torch.randn(1, 80), "time_ids": torch.zeros(1, 6)}
        with torch.no_grad():
            prediction = pipeline.unet(latents, 1, torch.randn(1, 77, 128), added_cond_kwargs=added).sample
        assert prediction.shape == latents.shape


def test_what_an_adapter_adds_to_a_block(capsys, monkeypatch):
    """NoRA keeps fewer activations than LoRA, at any speed of this machine."""
    monkeypatch.setattr(block, "WIDTH", 320)
    monkeypatch.setattr(block, "CONTEXT", 128)
    block.main(["--repeats", "1", "--tokens", "256"])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    kept = {row[0]: float(row[3]) for row in rows}
    assert kept["frozen"] == 1 < kept["NoRA (64, 8)"] < kept["LoRA 16"]


def test_a_whole_step_takes_as_long_as_itself(capsys, monkeypatch):
    monkeypatch.setattr(full_size, "in_own_process", lambda measure, items: list(map(measure, items)))
    full_size.main(["--shape", "sixteenth", "--rounds", "1", "--methods", "LoRA 2", "LoRA 2"])
    found = re.fullmatch(r"LoRA 2 of LoRA 2: time ([\d.]+), peak memory 1.000\n", capsys.readouterr().out)
    assert found and 0.3 < float(found[1]) < 3


def test_the_bases_of_a_whole_model(capsys):
    basis.main(["--base", "sixteenth", "--outer_rank", "16"])
    assert "736 layers" in capsys.readouterr().out


def test_every_way_to_step(capsys, tmp_path, monkeypatch):
    """The benchmark of a GPU on a CPU: a cell of each kind; one that fails is named, and one that is too long."""
    lora = gpu.Cell("bf16", "LoRA 2", checkpointing="feed_forward")
    cells = [gpu.Cell(method="frozen"), lora, gpu.Cell(method="LoRA x"), lora._replace(compiled=True)]
    monkeypatch.setattr(gpu, "planned", lambda: cells)
    monkeypatch.setattr(
        gpu, "CLAIMS", (gpu.Claim("small", "peak_mb", 1e9, lora), gpu.Claim("fast", "seconds", 0, lora))
    )
    monkeypatch.setattr(gpu, "WARM_UP", 0)
    small = ["--pixels", "64", "--steps", "1", "--seconds", str(gpu.COMPILATION)]
    gpu.main(["--shape", "sixteenth", "--device", "cpu", *small, "--output", str(tmp_path / "gpu.json")])
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert [cell.get("seconds") is not None for cell in record["cells"]] == [True, True, False]
    assert record["cells"][2]["failed"] and record["left_out"][0]["compiled"]
    assert [claim["verdict"] for claim in record["claims"]] == ["confirmed", "refuted"]
    assert "left out for time: bf16, LoRA 2, batch 1, checkpointing feed_forward, compiled" in capsys.readouterr().out


def test_a_gpus_claims_are_the_documents():
    document = " ".join(PERFORMANCE.split())
    cells = set(gpu.planned())
    for claim in gpu.CLAIMS:
        assert claim.words in document, claim.words
        assert {cell for cell in (claim.of, claim.to, claim.floor) if cell} <= cells, claim


def test_what_cards_hold_is_computed():
    """A cell of the documents' table; `python -m benchmarks.cards` makes them all."""
    lora = cards.need(cards.unet_without_numbers("full", gpu.LORA_16), 768, "none")
    row = cards.row(768, 4, "none", lora, lora).split("|")
    documented = next(line.split("|") for line in PERFORMANCE.splitlines() if line.startswith("| 768, 4 | none"))
    assert documented[4] == row[4] == f" {(lora.weights + lora.learning + 4 * lora.activations) / 1e9:.1f} "


def test_cudas_autocast_is_imitated():
    """What it keeps of a norm's input, and that a norm outside of it keeps that in half precision."""
    norm, hidden = torch.nn.LayerNorm(8, dtype=torch.bfloat16), torch.zeros(2, 8, dtype=torch.bfloat16)
    with cards.CudaAutocast(), torch.autocast("cpu", torch.bfloat16):
        assert norm(hidden).dtype == torch.float32
        norm.__class__ = HalfLayerNorm
        assert norm(hidden).dtype == torch.bfloat16


def test_goals_are_met_or_not(capsys):
    bench.main(["--one", "memory"])
    (megabytes,) = json.loads(capsys.readouterr().out)
    assert f"{megabytes:.0f} MB in fp16" in PERFORMANCE
    assert bench.rows("memory", [megabytes])[0].endswith("| 173 | yes |")
    assert bench.rows("memory", [205.0])[0].endswith("| 205 | no |")
    assert "failed: too small" in bench.rows("block", "too small")[1]
    figures = [figure for group in bench.GROUPS.values() for figure in group.figures]
    assert all(f"| {figure.name} | {figure.peer} | ≤ {figure.goal:g} |" in PERFORMANCE for figure in figures)


def test_what_the_reader_finds_of_subjects_that_are_there():
    """The figures of docs/judging.md and docs/study.md; another machine's autoencoder may round otherwise."""
    assets = Path(__file__).parent.parent / "assets"
    pipeline = load_pipeline(str(assets / "tiny-sdxl"), torch.float32)
    heldout = sorted((assets / "subjects" / "heldout").iterdir())
    found = base_world.kept_at_most(pipeline, assets / "tiny-attributes", heldout)
    assert {how: fmean(shares.values()) for how, shares in found.items()} == {
        "as drawn": pytest.approx(0.98, abs=0.01),
        "through the autoencoder": pytest.approx(0.96, abs=0.015),
    }
    assert found["through the autoencoder"]["robot"] == pytest.approx(0.81, abs=0.03)


NOWHERE = "no/such/folder"


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("benchmarks/base_world.py", ["--reader", NOWHERE]),
        ("benchmarks/base_world.py", ["--base", NOWHERE]),
        ("benchmarks/base_world.py", ["--subjects_dir", NOWHERE]),
        ("benchmarks/copies.py", ["--base", NOWHERE]),
        ("benchmarks/copies.py", ["--dino", NOWHERE]),
        ("benchmarks/half_precision.py", ["--base", NOWHERE]),
        ("benchmarks/loop_shape.py", ["--base", NOWHERE]),
        ("benchmarks/swap_adapter.py", ["--base", NOWHERE]),
        ("benchmarks/study/__main__.py", ["--tuning_subjects", "bear", "--base", NOWHERE, "--work", "work"]),
        ("benchmarks/study/__main__.py", ["--tuning_subjects", "bear", "--attributes", NOWHERE, "--work", "work"]),
        ("benchmarks/study/__main__.py", ["--tuning_subjects", "bear", "--clip", NOWHERE, "--work", "work"]),
        ("benchmarks/study/__main__.py", ["--tuning_subjects", "bear", "--dino", NOWHERE, "--work", "work"]),
        ("benchmarks/study/__main__.py", ["--tuning_subjects", "bear", "--groups", NOWHERE, "--work", "work"]),
        ("tools/single_file.py", [NOWHERE, "file.safetensors"]),
        ("tools/velocity_base.py", [NOWHERE, "file.safetensors"]),
        ("tools/world_sheet.py", ["sheet.png", "--base", NOWHERE]),
        ("tools/pretrain_attributes.py", ["--base", NOWHERE]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_what_is_not_there_is_one_sentence(program, words, monkeypatch, capsys, tmp_path):
    root = Path(__file__).parent.parent
    if program in ("tools/world_sheet.py", "tools/pretrain_attributes.py"):  # they draw
        pytest.importorskip("resvg_py")
        monkeypatch.syspath_prepend(root / "tools")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets").symlink_to(root / "assets")
    monkeypatch.setattr("sys.argv", [program, *words])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(root / program), run_name="__main__")
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2
    assert said.count("error: ") == 1 and "error: " in said.splitlines()[-1] and "Traceback" not in said, said
    if "--groups" not in words:
        assert NOWHERE in said
    assert [path.name for path in tmp_path.iterdir()] == ["assets"]
