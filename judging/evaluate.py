"""Measured fidelity: DINO, CLIP-I, CLIP-T, drift and diversity of adapters, and a memorisation alarm.

    python -m judging.evaluate --adapters lora=out/lora nora=out/nora --output out/scores.json

The same command gives the same file, to the last bit on a CPU: pictures are drawn with fixed seeds, or read again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from inference.adapter_files import BASE_COLUMN, recorded_config
from inference.base import check_device
from inference.columns import SAMPLING, ColumnsConfig, Job, Studio, picture_folder
from inference.generate import GeneratedImage, choose_base
from judging.prompts import (
    CLASS_PROMPTS,
    UNRELATED_PROMPTS,
    Protocol,
    class_of,
    subject_of_prompt,
    with_article,
    without_identifier,
)
from judging.scores import (
    ClipEncoder,
    ImageEncoder,
    Spread,
    diversity,
    drift,
    memorisation,
    prompt_fidelity,
    spread,
    subject_fidelity,
)
from settings.command_line import parse_config, quiet_libraries, run_command
from storage.files import check_writable_target, write_atomic
from storage.pictures import find_images, open_image

CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dino-vits16"  # those of the DreamBooth paper


class Judge:
    """The encoders, and what they see in the subject's pictures.

    Args:
        clip, dino: folders or Hub ids.

    Raises:
        ValueError: if one of them can't be loaded.
    """

    def __init__(self, clip: str, dino: str, instances: Sequence[Image.Image], device: torch.device) -> None:
        self.clip, self.dino = ClipEncoder(clip, device), ImageEncoder(dino, device)
        self.instances = list(instances)
        self.clip_instances, self.dino_instances = self.clip.images(instances), self.dino.images(instances)

    def judge(self, drawn: Sequence[GeneratedImage]) -> dict[str, Any]:
        """Scores of pictures of the subject: each name of a score -> its spread, and the memorisation's figures."""
        images = [one.image for one in drawn]
        clip, dino = self.clip.images(images), self.dino.images(images)
        texts = self.clip.texts([without_identifier(one.prompt) for one in drawn])
        by_prompt: dict[str, list[int]] = {}
        for row, one in enumerate(drawn):
            by_prompt.setdefault(one.prompt, []).append(row)
        scores = {
            "dino": by_seed(drawn, subject_fidelity(dino, self.dino_instances)),
            "clip_i": by_seed(drawn, subject_fidelity(clip, self.clip_instances)),
            "clip_t": by_seed(drawn, prompt_fidelity(clip, texts)),
        }
        several = [rows for rows in by_prompt.values() if len(rows) > 1]
        if several:
            # its spread is between prompts
            scores["diversity"] = spread({prompt: [diversity(dino[rows])] for prompt, rows in enumerate(several)})
        scores["memorisation"] = memorisation(images, self.instances)
        return scores

    def features(self, drawn: Sequence[GeneratedImage]) -> torch.Tensor:
        """(N, D), of which drift is measured."""
        return self.dino.images([one.image for one in drawn])

    def drift(self, adapted: Sequence[GeneratedImage], base: torch.Tensor) -> Spread:
        """Of pictures with the adapter from those without, of the same prompts and seeds in the same order.

        Args:
            base: `features` of those without.
        """
        return by_seed(adapted, drift(self.features(adapted), base))


def by_seed(drawn: Sequence[GeneratedImage], values: torch.Tensor) -> Spread:
    scores: dict[int, list[float]] = {}
    for one, value in zip(drawn, values.tolist()):
        scores.setdefault(one.seed, []).append(value)
    return spread(scores)


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass
class EvaluateConfig(ColumnsConfig):
    """Flags of `python -m judging.evaluate`."""

    instance_images: str | None = field(
        default=None, metadata={"help": "Folder of the subject's pictures. Default: what the first run was trained on."}
    )
    subject: str | None = field(
        default=None, metadata={"help": 'In words, such as "[V] dog". Default: from the first run\'s instance prompt.'}
    )
    class_name: str | None = field(
        default=None, metadata={"help": "What the subject is, such as dog. Default: --subject without [V]."}
    )
    protocol: str = field(
        default="scenes",
        metadata={"help": "Prompts and images a prompt: scenes, dreambooth (25 prompts), or a file like theirs."},
    )
    protocol_subject: str | None = field(
        default=None, metadata={"help": "One of the protocol's subjects, such as dog6: says class and kind of prompts."}
    )
    live_subject: bool = field(default=False, metadata={"help": "The protocol's prompts for animals, not for objects."})
    prompts: list[str] | None = field(
        default=None,
        metadata={"aliases": ["--prompt"], "action": "extend", "help": "Instead of the protocol's prompts."},
    )
    seeds: list[int] | None = field(
        default=None,
        metadata={
            "action": "extend",
            "help": "Default: as many as the protocol says, from 1000 on.",
        },
    )
    clip: str = field(default=CLIP, metadata={"help": "A CLIP of transformers: folder or Hub id."})
    dino: str = field(default=DINO, metadata={"help": "An image encoder of transformers: folder or Hub id."})
    output: str = field(default="out/scores.json", metadata={"help": "The scores; pictures are kept beside it."})


# What says what is drawn and how; the device is the judges' too.
DRAWING = (
    *(name for name in SAMPLING if name != "device"),
    *("subject", "class_name", "protocol", "protocol_subject", "live_subject", "prompts", "seeds"),
)
SCORES = {
    "dino": "DINO ↑",
    "clip_i": "CLIP-I ↑",
    "clip_t": "CLIP-T ↑",
    "drift": "Drift ↓",
    "class_drift": "Class drift ↓",
    "diversity": "Diversity ↑",
}


@dataclass(frozen=True)
class Plan:
    """What is drawn of each model."""

    prompts: dict[str, list[str]]  # of the subject, and for "drift" and "class_drift"
    seeds: list[int]


def plan(config: EvaluateConfig, recorded: Sequence[Mapping[str, Any]]) -> Plan:
    """The protocol's prompts, or the flags', for the subject.

    Args:
        recorded: the flags of the runs.

    Raises:
        ValueError: for what can't be drawn, and if neither a flag nor a run says what the subject is.
    """
    for name in ("protocol", "protocol_subject", "live_subject"):
        if config.prompts and getattr(config, name) != getattr(EvaluateConfig, name):
            raise ValueError(f"--{name} has no effect on --prompts: leave one of them out; --class_name says the class")
    protocol = Protocol.read(config.protocol, config.protocol_subject, config.live_subject)
    words, class_name = subject_in_words(config, protocol, recorded)
    prompts = config.prompts or [with_article(prompt, words) for prompt in protocol.prompts]
    seeds = config.seeds or protocol.seeds
    config.check_sampling(prompts, seeds)
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


def check(config: EvaluateConfig, recorded: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError for what `run` would refuse once runs of these flags are there."""
    plan(config, recorded)
    instances = instance_pictures(instance_folder(config.instance_images, recorded))
    Judge(config.clip, config.dino, instances, torch.device("cpu"))


def run(config: EvaluateConfig) -> dict[str, Any]:
    """Draw what is missing, score it, write the scores and return them. Flags are checked before anything is loaded."""
    adapters, pictures = config.columns(DRAWING)
    for name, given in pictures.items():
        if len(scales := list(dict.fromkeys(one.scale for one in given))) > 1:
            several = ", ".join("none" if scale is None else f"{scale:g}" for scale in scales)
            raise ValueError(
                f"--images {name} has pictures at scales {several}: keep each scale in a folder of its own"
            )
    output = Path(config.output)
    check_writable_target(output, "--output", folder=False)
    if len(config.scales) > 1:
        raise ValueError("--scale: scores are of one scale; run the command once for each, with another --output")
    recorded = [recorded_config(path) for path in adapters.values()]
    if adapters:
        asked = plan(config, recorded)
        config = choose_base(config, str(next(iter(adapters.values()))))
    instances = instance_pictures(instance_folder(config.instance_images, recorded))
    judge = Judge(config.clip, config.dino, instances, check_device(config.device))
    drifts = {}
    if adapters:
        models: dict[str, Path | None] = {BASE_COLUMN: None, **adapters}
        jobs = {
            (name, kind): Job(name, path, prompts, config.scales[0] if path else 1.0)
            for name, path in models.items()
            for kind, prompts in asked.prompts.items()
        }
        studio = Studio(config, picture_folder(output))
        drawn = dict(zip(jobs, studio.draw(list(jobs.values()), asked.seeds)))
        pictures = {name: drawn[name, "subject"] for name in models} | pictures
        without = {kind: judge.features(drawn[BASE_COLUMN, kind]) for kind in ("drift", "class_drift")}
        drifts = {
            name: {kind: judge.drift(drawn[name, kind], off) for kind, off in without.items()} for name in adapters
        }
    columns = {name: judge.judge(images) | drifts.get(name, {}) for name, images in pictures.items()}
    result = {
        "version": 1,
        "encoders": {"clip": config.clip, "dino": config.dino},
        "protocol": config.protocol if adapters and not config.prompts else None,
        "seeds": asked.seeds if adapters else None,
        "prompts": asked.prompts["subject"] if adapters else None,
        "instance_images": len(instances),
        "scores": {name: {key: value._asdict() for key, value in scores.items()} for name, scores in columns.items()},
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(output, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return result


def table(result: Mapping[str, Any]) -> str:
    """The scores as a Markdown table: mean ± spread over seeds."""
    known = [key for key in SCORES if any(key in scores for scores in result["scores"].values())]
    rows = [
        [name, *(format_score(scores.get(key)) for key in known), format_memorisation(scores["memorisation"])]
        for name, scores in result["scores"].items()
    ]
    return markdown_table(["", *(SCORES[key] for key in known), "nearest training image"], rows)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def format_score(score: Mapping[str, float] | None) -> str:
    return "–" if score is None else f"{score['mean']:.3f} ± {score['std']:.3f}"


def format_memorisation(found: Mapping[str, Any]) -> str:
    return f"{found['nearest']:.2f}" + (" **MEMORISED**" if found["alarm"] else "")


def warn_of_memorisation(name: str, found: Mapping[str, Any]) -> None:
    if found["alarm"]:
        print(
            f"warning: {name} draws its training images: {found['share']:.0%} of its pictures are nearer to one of "
            f"them (median {found['nearest']:.2f}) than they are to each other ({found['between_instances']:.2f}); "
            "train for fewer steps, at a lower learning rate, or with --with_prior_preservation",
            file=sys.stderr,
        )


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(
        EvaluateConfig, argv, prog="python -m judging.evaluate", description="Score adapters on a subject."
    )
    quiet_libraries()

    def command() -> None:
        result = run(config)
        print(table(result))
        for name, scores in result["scores"].items():
            warn_of_memorisation(name, scores["memorisation"])
        print(f"scores: {config.output}")

    run_command(command)


if __name__ == "__main__":
    main()
