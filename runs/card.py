"""The model card of a run: the README.md of its folder, which the Hugging Face Hub reads too."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from methods.components import FOLDED_WEIGHTS
from methods.files import tools_file
from methods.registry import METHODS
from runs.interval import Interval, format_interval
from runs.plot import loss_plot
from runs.record import LOSS_PLOT, METRICS, MODEL_CARD
from runs.tools_header import LICENSES
from storage.files import write_atomic
from storage.text import counted, spell

_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"


def write_card(folder: Path, record: Mapping[str, Any], samples: Sequence[tuple[str, str]] = ()) -> None:
    """Write the adapter's README.md and its plot of the loss.

    Args:
        samples: prompt and image file, relative to the folder.
    """
    write_atomic(folder / LOSS_PLOT, loss_plot(folder / METRICS))
    write_atomic(folder / MODEL_CARD, card_text(record, samples))


def card_text(record: Mapping[str, Any], samples: Sequence[tuple[str, str]] = ()) -> str:
    """The card, with the metadata that the Hugging Face Hub reads in front; see `write_card`."""
    config = record["config"]
    instance_prompt = config["instance_prompt"] or config["validation_prompt"][0]  # the first of several subjects'
    instance_prompt = spell(instance_prompt, record["new_words"])
    data = ModelCardData(
        base_model=config["pretrained_model_name_or_path"],
        license=config.get("license") or LICENSES.get(config["pretrained_model_name_or_path"]),
        library_name="diffusers",
        tags=["text-to-image", "diffusers", "lora", "dreambooth", "stable-diffusion-xl", record["method"]],
        instance_prompt=one_line(instance_prompt),
        widget=[{"text": one_line(prompt), "output": {"url": file}} for prompt, file in samples],
    )
    options = {"template_path": str(_TEMPLATE), "record": record, "samples": samples, "loss_plot": LOSS_PLOT}
    options |= {"prompt": instance_prompt, "plain": plain, "code": code, "literal": literal, "counted": counted}
    options |= {"best_score": best_score(record.get("best")), "method": METHODS[record["method"]].title}
    tools = tools_file(Path(config.get("output_dir", "")))
    options["tools_file"] = tools if tools in record["files"] else None
    options |= _prediction(record)
    options["lora_file"] = FOLDED_WEIGHTS if FOLDED_WEIGHTS in record["files"] else None
    return str(ModelCard.from_template(data, **options))


def _prediction(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the card's commands must say of a base that predicts velocity, and of skipped layers."""
    config, velocity = record["config"], record.get("prediction_type") == "v_prediction"
    call = ", guidance_rescale=0.7" if record.get("zero_terminal_snr") else ""
    if config.get("clip_skip"):
        call += f", clip_skip={config['clip_skip']}"
    loading = ""
    if velocity:
        loading = ', prediction_type="v_prediction"'
        loading += f', zero_terminal_snr="{"on" if record.get("zero_terminal_snr") else "off"}"'
    return {"velocity": velocity, "call": call, "loading": loading}


def best_score(best: Mapping[str, Any] | None) -> str | None:
    """The score by which an adapter was the best one, with its interval over what was drawn."""
    if best is None:
        return None
    if "interval" not in best:  # a loss is no score of pictures
        return format_interval(Interval(best[best["by"]]))
    found = Interval.read(best["interval"])
    what = f"{found.level:.0%} interval, " if found.low is not None else ""
    return f"{format_interval(found)} ({what}{found.units}; of this training alone)"


def one_line(text: str) -> str:
    """A text without the ends of lines that YAML and Markdown would see in it, U+0085 among them."""
    return " ".join(text.split())


def plain(text: str, link_text: bool = False) -> str:
    """A text in one line of Markdown, in a table or not, which shows it as it is.

    Args:
        link_text: it stands in brackets itself.
    """
    marks = r"[\\`*_<>#|~$&]|\](?=[(\[])"  # brackets alone are no link, and [V] stays readable
    return re.sub(rf"({marks}|[\[\]])" if link_text else f"({marks})", r"\\\1", one_line(text))


def code(text: str) -> str:
    """A text in one line as code, in Markdown."""
    text = one_line(text)
    ticks = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{ticks}{text}{ticks}" if ticks == "`" else f"{ticks} {text} {ticks}"


def literal(text: str) -> str:
    """A text as Python writes it, in one line."""
    return json.dumps(text, ensure_ascii=False)
