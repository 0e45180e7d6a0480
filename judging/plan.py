"""What is drawn to be scored: prompts and seeds, the subject in words, its pictures. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from judging.prompts import (
    CLASS_PROMPTS,
    UNRELATED_PROMPTS,
    Protocol,
    class_of,
    subject_of_prompt,
    with_article,
)
from settings.columns import EvaluateConfig
from storage.pictures import find_images, open_image


@dataclass(frozen=True)
class Plan:
    """What is drawn of each model."""

    prompts: dict[str, list[str]]  # "subject", "drift" and "class_drift" -> prompts
    seeds: list[int]


def read_protocol(config: EvaluateConfig) -> Protocol:
    """The protocol of the flags.

    Raises:
        ValueError: if there is none of that name, or its flags have no effect beside --prompts.
    """
    for name in ("protocol", "protocol_subject", "live_subject"):
        if config.prompts and getattr(config, name) != getattr(EvaluateConfig, name):
            raise ValueError(f"--{name} has no effect on --prompts: leave one of them out; --class_name says the class")
    return Protocol.read(config.protocol, config.protocol_subject, config.live_subject)


def plan_images(config: EvaluateConfig, recorded: Sequence[Mapping[str, Any]]) -> Plan:
    """The protocol's prompts, or the flags', for the subject.

    Args:
        recorded: the flags of the runs.

    Raises:
        ValueError: for what can't be drawn, and if neither a flag nor a run says what the subject is.
    """
    protocol = read_protocol(config)
    words, class_name = subject_in_words(config, protocol, recorded)
    prompts = config.prompts or [with_article(prompt, words) for prompt in protocol.prompts]
    seeds = config.seeds or protocol.seeds
    config.check_ranges(prompts, seeds)
    unrelated = [prompt for prompt in UNRELATED_PROMPTS if f" {class_name} " not in prompt]
    of_class = [with_article(prompt, class_name) for prompt in CLASS_PROMPTS]
    return Plan({"subject": prompts, "drift": unrelated, "class_drift": of_class}, seeds)


def subject_in_words(
    config: EvaluateConfig, protocol: Protocol, recorded: Sequence[Mapping[str, Any]]
) -> tuple[str, str]:
    """The subject with its identifier, and its class.

    Raises:
        ValueError: if neither a flag nor a run says them.
    """
    words = config.subject
    if words is not None and not words.strip():
        raise ValueError('--subject is empty: say it in words, such as "[V] dog"')
    if words is None:
        words = next((prompt for one in recorded if isinstance(prompt := one.get("instance_prompt"), str)), None)
        if words is None:
            raise ValueError('no run says what the subject is: add --subject, such as "[V] dog"')
    words = subject_of_prompt(words)
    class_name = config.class_name or protocol.class_name
    return words, subject_of_prompt(class_name) if class_name else class_of(words)


def instance_folder(folder: str | None, recorded: Sequence[Mapping[str, Any]]) -> str:
    """Where the subject's pictures are: the folder of the flag, or else of the first run that names one.

    Raises:
        ValueError: if no run names one that is there.
    """
    if folder is not None:
        return folder
    folder = next((found for one in recorded if (found := one.get("instance_data_dir"))), None)
    if folder is None or not Path(folder).is_dir():
        missing = (
            f"--instance_data_dir {folder} of the run is not here" if folder else "no run has a folder of pictures"
        )
        raise ValueError(f"{missing}: name the subject's with --instance_images")
    return folder


def instance_pictures(folder: str) -> list[Image.Image]:
    return [open_image(path) for path in find_images(folder, "instance_images")]
