"""The header of an adapter's file for drawing programs: what they show, sort and filter by (docs/files.md).

Keys `ss_*` are those of kohya's sd-scripts, which A1111, Forge and managers read; `modelspec.*` are Stability's
ModelSpec 1.0.1, which SwarmUI and SD.Next read. Each value is a string.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from storage.text import spell

ARCHITECTURE = "stable-diffusion-xl-v1-base/lora"  # with "sdxl_…" what A1111 and Forge know an SDXL adapter by
METHOD_KEY = "nora_suite.method"  # ours; other tools pass it over
# ModelSpec's names of what a UNet predicts.
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v"}
LICENSES = {"stabilityai/stable-diffusion-xl-base-1.0": "openrail++"}  # which holds for what is made of them
THUMBNAIL_PIXELS = 256  # ModelSpec's advice
_LEARNING = {  # sd-scripts' name -> flag
    "ss_learning_rate": "learning_rate",
    "ss_text_encoder_lr": "text_encoder_lr",
    "ss_optimizer": "optimizer",
    "ss_lr_scheduler": "lr_scheduler",
    "ss_lr_warmup_steps": "lr_warmup_steps",
    "ss_max_train_steps": "max_train_steps",
    "ss_steps": "max_train_steps",
    "ss_gradient_accumulation_steps": "gradient_accumulation_steps",
    "ss_gradient_checkpointing": "gradient_checkpointing",
    "ss_max_grad_norm": "max_grad_norm",
    "ss_mixed_precision": "mixed_precision",
    "ss_seed": "seed",
    "ss_noise_offset": "noise_offset",
    "ss_min_snr_gamma": "snr_gamma",
    "ss_batch_size_per_device": "train_batch_size",
}


def minimal_header(name: str, date: datetime | None = None) -> dict[str, str]:
    """What makes every reader take a file for a LoRA of SDXL.

    Args:
        name: that programs show it under.
        date: None: now.
    """
    return {
        "ss_v2": "False",
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_network_module": "networks.lora",
        "ss_network_args": "{}",
        "ss_output_name": name,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": ARCHITECTURE,
        "modelspec.implementation": "https://github.com/huggingface/diffusers",
        "modelspec.title": name,
        "modelspec.date": (date or datetime.now(timezone.utc)).isoformat(timespec="seconds"),
    }


def run_header(
    name: str, record: Mapping[str, Any], prompts: Sequence[str], captions: Sequence[Counter[str]] = ()
) -> dict[str, str]:
    """The header of a run's file.

    Args:
        record: as `runs.record.run_record` makes it.
        prompts: one of each subject; what a drawing program says triggers it.
        captions: of each subject's pictures, with how many have it. Only their words go in, no folder's name.
    """
    config, words = record["config"], record.get("new_words") or {}
    base = config["pretrained_model_name_or_path"]
    side, predicted = config.get("resolution"), record.get("prediction_type") or "epsilon"
    trigger = ", ".join(dict.fromkeys(spell(prompt, words) for prompt in prompts))
    header = minimal_header(name) | {
        METHOD_KEY: record["method"],
        "ss_sd_model_name": Path(base).name,
        "ss_num_train_images": str(sum(sum(one.values()) for one in captions)),
        "ss_training_comment": f"method {record['method']}",
        "modelspec.trigger_phrase": trigger,
        "modelspec.prediction_type": PREDICTIONS.get(predicted, predicted),
    }
    header |= {key: str(config[flag]) for key, flag in _LEARNING.items() if config.get(flag) is not None}
    if side is not None:
        header |= {"ss_resolution": f"({side}, {side})", "modelspec.resolution": f"{side}x{side}"}
    if (found := config.get("license") or LICENSES.get(base)) is not None:
        header["modelspec.license"] = found
    if captions:
        counts = [tag_counts(one, words) for one in captions]
        names = [name] if len(counts) == 1 else [f"{name}_{number}" for number in range(1, len(counts) + 1)]
        header["ss_tag_frequency"] = json.dumps(dict(zip(names, counts)), ensure_ascii=False)
    return header


def tag_counts(captions: Counter[str], words: Mapping[str, str]) -> dict[str, int]:
    """Tag -> number of pictures; tags are what commas divide a caption into, as in sd-scripts."""
    counts: Counter[str] = Counter()
    for caption, number in captions.items():
        for tag in spell(caption, words).split(","):
            if tag.strip():
                counts[tag.strip()] += number
    return dict(counts)


def thumbnail(image: Image.Image) -> dict[str, str]:
    """The header's entry of a picture, as a small JPEG."""
    small = ImageOps.contain(image.convert("RGB"), (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=85)
    return {"modelspec.thumbnail": f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"}
