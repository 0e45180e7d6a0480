"""On the embedded base, a trained adapter knows its subject: neither a no-op nor noise."""

from pathlib import Path
from statistics import mean

import pytest
import torch
from PIL import Image

from inference.base import load_pipeline
from inference.load import load_adapter
from inference.sampling import generate_images
from judging.attributes import SubjectReading
from settings.training import TrainConfig
from train_dreambooth_nora_sdxl import train

ROOT = Path(__file__).parent.parent
BASE = ROOT / "assets" / "tiny-sdxl"
READER = ROOT / "assets" / "tiny-attributes"
PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "dreambooth"
SUBJECTS = ("cat", "dog", "teapot", "backpack", "rc_car", "red_cartoon")


def config(folder, **options) -> TrainConfig:
    quick = {"pretrained_model_name_or_path": str(BASE), "report_to": "none", "num_validation_images": 0}
    return TrainConfig.of(output_dir=str(folder), **(quick | options))


def test_the_subject_is_in_the_pictures_and_the_scene_is_the_prompts(tmp_path):
    """Neither a no-op nor noise: more of the cat's attributes than by chance, in the places that were asked for."""
    subject = ROOT / "assets" / "subjects" / "cat"
    options = {"instance_data_dir": str(subject), "instance_prompt": "a photo of [V] cat"}
    folder = train(config(tmp_path, max_train_steps=70, learning_rate=3e-3, **options))
    pipeline, reading = load_pipeline(BASE, torch.float32, "cpu"), SubjectReading(READER, subject)
    prompts = [f"a photo of [V] cat {place}" for place in ("in the jungle", "on the beach", "at night")]

    def means():
        drawn = list(generate_images(pipeline, prompts, [1, 2], num_inference_steps=8, batch_size=6, progress=False))
        return {
            score: mean(one for seeds in draws.values() for one in seeds.values())
            for score, draws in reading.score(drawn).items()
        }

    base = means()
    load_adapter(pipeline, folder)
    adapted = means()
    assert adapted["attributes"] > base["attributes"] + 0.3 and adapted["scene"] > 0.8, (base, adapted)


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
