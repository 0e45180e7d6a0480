"""Flags of the commands that set models side by side: gallery, evaluate and compare. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from settings.record import FilePath
from settings.sampling import SamplingConfig
from storage.text import expand_home

BASE_COLUMN = "base"
CLIP, DINO = "openai/clip-vit-base-patch32", "facebook/dino-vits16"  # those of the DreamBooth paper
SAMPLING = tuple(one.name for one in fields(SamplingConfig))
# The flags of judging.evaluate that say what is drawn and how; the device is the encoders' too.
EVALUATE_DRAWING = (
    *(name for name in SAMPLING if name != "device"),
    *("subject", "class_name", "protocol", "protocol_subject", "live_subject", "prompts", "seeds"),
)


@dataclass
class ColumnsConfig(SamplingConfig):
    """Flags of the commands that set models side by side."""

    adapters: list[str] | None = field(
        default=None, metadata={"action": "extend", "help": "NAME=PATH of each, beside the base."}
    )
    images: list[str] | None = field(
        default=None,
        metadata={
            "action": "extend",
            "help": "NAME=FOLDER of pictures with a manifest that inference.generate wrote: nothing is drawn.",
        },
    )

    def named_columns(self, drawing: Sequence[str]) -> tuple[dict[str, Path], dict[str, Path]]:
        """Name -> path of the adapters, and name -> folder of the pictures that are there already.

        Args:
            drawing: names of the flags that say what is drawn, and how.

        Raises:
            ValueError: if there is nothing, a name is there twice, or such a flag is given where nothing is drawn.
        """
        adapters = parse_named_paths(self.adapters or [], "--adapters")
        folders = parse_named_paths(self.images or [], "--images")
        if not adapters and not folders:
            raise ValueError("no adapter: give at least one with --adapters NAME=PATH, or pictures with --images")
        if taken := set(adapters) & set(folders):
            raise ValueError(f"--images {min(taken)}: the name is an adapter's already, choose another one")
        for name in drawing:
            if not adapters and getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"--{name} is for what is drawn, and --images are there already: leave it out")
        return adapters, folders


def parse_named_paths(pairs: Sequence[str], flag: str) -> dict[str, Path]:
    """`["lora=out/lora", …]` -> name: path, in order.

    Raises:
        ValueError: for a pair of another form, and for a name that is taken.
    """
    paths: dict[str, Path] = {}
    for pair in pairs:
        name, separator, path = pair.partition("=")
        if not (separator and name.strip() and path):
            raise ValueError(f"{flag} {pair} must be NAME=PATH, such as nora=out/nora")
        if name == BASE_COLUMN or name in paths:
            raise ValueError(f"{flag} {pair}: the name {name} is taken, choose another one")
        try:
            paths[name] = Path(expand_home(path))
        except ValueError as error:
            raise ValueError(f"{flag} {pair} {error}") from error
    return paths


@dataclass
class GalleryConfig(ColumnsConfig):
    """Flags of `python -m inference.gallery`."""

    prompts: list[str] | None = field(
        default=None,
        metadata={"aliases": ["--prompt"], "action": "extend", "help": "Default: those of --images."},
    )
    seeds: list[int] | None = field(
        default=None,
        metadata={"action": "extend", "help": "One row per prompt each. Default: 0 1, or those of --images."},
    )
    checkpoints: bool = field(
        default=False, metadata={"help": "Also at every checkpoint of the runs: the page gets a slider of steps."}
    )
    instance_images: FilePath | None = field(
        default=None, metadata={"help": "Folder of the subject's training images, shown on top."}
    )
    scores: FilePath | None = field(
        default=None, metadata={"help": "File of judging.evaluate with columns of the same names: shown below them."}
    )
    output: FilePath = field(default="out/gallery.html", metadata={"help": "The page; the sheet is beside it as .png."})


@dataclass
class EvaluateConfig(ColumnsConfig):
    """Flags of `python -m judging.evaluate`."""

    instance_images: FilePath | None = field(
        default=None, metadata={"help": "Folder of the subject's pictures. Default: what the first run was trained on."}
    )
    subject: str | None = field(
        default=None, metadata={"help": 'In words, such as "[V] dog". Default: from the first run\'s instance prompt.'}
    )
    class_name: str | None = field(
        default=None, metadata={"help": "What the subject is, such as dog. Default: --subject without [V]."}
    )
    protocol: FilePath = field(
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
    clip: FilePath = field(default=CLIP, metadata={"help": "A CLIP of transformers: folder or Hub id."})
    dino: FilePath = field(default=DINO, metadata={"help": "An image encoder of transformers: folder or Hub id."})
    attributes: FilePath | None = field(
        default=None,
        metadata={"help": "Folder of an attribute reader: also scores what attributes.json says of the subject."},
    )
    output: FilePath = field(default="out/scores.json", metadata={"help": "The scores; pictures are kept beside it."})


@dataclass
class CompareConfig(SamplingConfig):
    """Flags of `python -m trainer.compare`."""

    methods: list[str] | None = field(
        default=None,
        metadata={
            "action": "extend",
            "help": 'Values of --method, or NAME="flags": "lora16=--method lora --rank 16". Default: nora lora.',
        },
    )
    train_seeds: list[int] | None = field(
        default=None, metadata={"action": "extend", "help": "Each method is trained once with each. Default: 0."}
    )
    jobs: int = field(default=1, metadata={"help": "Trainings at once, a CPU core each; on one GPU leave it at 1."})
    protocol: FilePath = field(default="scenes", metadata={"help": "As in judging.evaluate."})
    live_subject: bool = field(default=False, metadata={"help": "As in judging.evaluate."})
    subject: str | None = field(default=None, metadata={"help": "As in judging.evaluate."})
    class_name: str | None = field(default=None, metadata={"help": "As in judging.evaluate."})
    instance_images: FilePath | None = field(default=None, metadata={"help": "As in judging.evaluate."})
    seeds: list[int] | None = field(
        default=None, metadata={"action": "extend", "help": "Of the pictures. Default: as many as the protocol says."}
    )
    clip: FilePath = field(default=CLIP, metadata={"help": "As in judging.evaluate."})
    dino: FilePath = field(default=DINO, metadata={"help": "As in judging.evaluate."})
    attributes: FilePath | None = field(default=None, metadata={"help": "As in judging.evaluate."})
    output_dir: FilePath = field(
        default="out/compare", metadata={"help": "A folder for each run, the scores and the page."}
    )
