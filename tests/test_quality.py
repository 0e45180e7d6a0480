"""On the embedded base, a trained adapter knows its subject: neither a no-op nor noise."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.heldout_loss import heldout_loss
from inference.base import load_pipeline
from inference.load import load_adapter
from settings.training import TrainConfig
from train_dreambooth_nora_sdxl import train

ROOT = Path(__file__).parent.parent
BASE = ROOT / "assets" / "tiny-sdxl"
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "dreambooth"
SUBJECTS = ("cat", "dog", "teapot", "backpack", "rc_car", "red_cartoon")


def config(folder, **options) -> TrainConfig:
    quick = {"pretrained_model_name_or_path": str(BASE), "report_to": "none", "num_validation_images": 0}
    return TrainConfig.of(output_dir=str(folder), **(quick | options))


def test_loss_on_held_out_pictures_falls(tmp_path):
    prompt, heldout = "a photo of [V] cat", ROOT / "assets" / "subjects" / "heldout" / "cat"
    options = {"instance_data_dir": str(ROOT / "assets" / "subjects" / "cat"), "instance_prompt": prompt}
    folder = train(config(tmp_path, max_train_steps=60, learning_rate=1e-3, **options))
    pipeline = load_pipeline(BASE, torch.float32, "cpu")
    base = heldout_loss(pipeline, heldout, prompt, samples=96)
    load_adapter(pipeline, folder)
    adapted = heldout_loss(pipeline, heldout, prompt, samples=96)
    assert adapted < 0.9 * base, f"{adapted:.4f} against the base's {base:.4f}"


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="needs the DreamBooth photographs, which are not in this checkout")
@pytest.mark.parametrize("subject", SUBJECTS)
def test_photographs_train(tmp_path, subject):
    train(
        config(
            tmp_path / "run",
            instance_data_dir=str(PHOTOGRAPHS / subject),
            instance_prompt="[V] thing",
            max_train_steps=2,
            calibration_passes=2,
        )
    )


@pytest.mark.skipif(not PHOTOGRAPHS.is_dir(), reason="needs the DreamBooth photographs, which are not in this checkout")
def test_photographs_as_phones_and_editors_leave_them_train(tmp_path):
    folder = tmp_path / "variants"
    folder.mkdir()
    photographs = [Image.open(path).convert("RGB") for path in sorted((PHOTOGRAPHS / "cat").iterdir())[:4]]
    exif = Image.Exif()
    exif[0x0112] = 6
    photographs[0].save(folder / "rotated.jpg", exif=exif)
    cut_out = photographs[1].copy()
    cut_out.putalpha(Image.linear_gradient("L").resize(cut_out.size))
    cut_out.save(folder / "cut-out.png")
    photographs[2].crop((0, 0, photographs[2].width, photographs[2].height // 3)).save(folder / "panorama.webp")
    photographs[3].resize((40, 90)).convert("P").save(folder / "small-palette.gif")
    (folder / ".DS_Store").write_bytes(b"left by a file manager")
    options = {"instance_data_dir": str(folder), "instance_prompt": "[V] cat", "random_flip": True}
    train(config(tmp_path / "run", max_train_steps=2, calibration_passes=2, **options))
