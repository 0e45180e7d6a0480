"""Where an adapter lies and of which kind it is: files of LoRAs, NoRA's inner factors, folders of PEFT.

Only headers are read, and a file's own keys decide: names and endings say nothing of what is in it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from methods.components import COMPONENT_NAMES, EMBEDDINGS, FOLDED_WEIGHTS, INNER_WEIGHTS, RUN_RECORD
from methods.files import KOHYA_WEIGHTS, PEFT_FOLDER
from methods.formats.keys import refused_kind, split_key, what_it_is
from storage.files import read_json
from storage.tensors import read_safetensors_header

PEFT_PREFIX = "base_model.model."
_KOHYA_PREFIXES = ("lora_unet_", "lora_te1_", "lora_te2_", "lycoris_")
_RUN_FILES = re.compile("|".join(map(re.escape, (FOLDED_WEIGHTS, INNER_WEIGHTS, KOHYA_WEIGHTS))))
_APPROXIMATE = re.compile(r"approximate_lora_rank\d+\.safetensors")


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's place and header."""

    path: Path  # the file, or the folder of a PEFT adapter
    kind: Literal["folded", "inner", "kohya", "peft"]  # "folded": dotted names; "inner": NoRA's inner factors
    metadata: dict[str, str] = field(default_factory=dict)
    parts: dict[str, Path] = field(default_factory=dict)  # of "peft": component, or "" where it isn't said -> folder
    new_word: Path | None = None  # the learned embeddings of its run


def inspect_adapter(path: str | Path) -> AdapterFile:
    """Say what is at a path: an adapter's file, or the file or folder to use in a folder; no weights are read.

    In a run's folder the folded file comes first, because it needs no outer factors to be computed anew, then the inner
    factors, then PEFT's folders. A folder may also be PEFT's own (one adapter, or one each in unet/, text_encoder/ and
    text_encoder_2/), or hold a single LoRA file of any name.

    Raises:
        ValueError: no such path, no adapter in it, or not an adapter file.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"adapter {path} does not exist (looked from {Path.cwd()})")
    return _in_folder(path) if path.is_dir() else _file(path, _run_embeddings(path))


def _in_folder(path: Path) -> AdapterFile:
    for name in (FOLDED_WEIGHTS, INNER_WEIGHTS):
        if (path / name).is_file():
            return _file(path / name, _embeddings(path))
    if parts := _peft_parts(path):
        return _peft(path, parts, _embeddings(path.parent) if path.name == PEFT_FOLDER else None)
    if parts := _peft_parts(path / PEFT_FOLDER):
        return _peft(path / PEFT_FOLDER, parts, _embeddings(path))
    others = [file for file in path.glob("*.safetensors") if file.name != EMBEDDINGS]
    if len(others) != 1:
        raise ValueError(
            f"adapter folder {path} has neither {FOLDED_WEIGHTS} nor {INNER_WEIGHTS}, nor is it a PEFT folder "
            f"({CONFIG_NAME}), nor does it hold just one .safetensors file: name the file itself"
        )
    return _file(others[0], None)


def _file(path: Path, new_word: Path | None) -> AdapterFile:
    metadata, shapes = read_safetensors_header(path, "adapter")
    if "fingerprints" in metadata:
        return AdapterFile(path, "inner", metadata, new_word=new_word)
    if (path.parent / CONFIG_NAME).is_file() and any(key.startswith(PEFT_PREFIX) for key in shapes):
        return _peft(path.parent, {"": path.parent}, None)
    if not any(map(split_key, shapes)):
        raise ValueError(f"adapter {path} {_no_adapter(shapes)}")
    kohya = any(key.startswith(_KOHYA_PREFIXES) for key in shapes)
    return AdapterFile(path, "kohya" if kohya else "folded", metadata, new_word=new_word)


def _no_adapter(keys: Iterable[str]) -> str:
    keys = list(keys)
    if (kind := next(filter(None, map(refused_kind, keys)), None)) is not None:
        return f"is of {kind}, which is not read from such files: convert it to a LoRA first"
    if (kind := what_it_is(keys)) is not None:
        return f"is {kind}"
    return (
        "holds no LoRA matrices in a format that is known here, such as unet.….lora_A.weight of diffusers or "
        "lora_unet_….lora_down.weight of kohya"
    )


def _peft_parts(path: Path) -> dict[str, Path]:
    """Component -> folder with a PEFT adapter; a lone adapter's component is told from its layers later."""
    if (path / CONFIG_NAME).is_file():
        return {"": path}
    return {name: path / name for name in COMPONENT_NAMES if (path / name / CONFIG_NAME).is_file()}


def _peft(path: Path, parts: dict[str, Path], new_word: Path | None) -> AdapterFile:
    for folder in parts.values():
        if not (folder / SAFETENSORS_WEIGHTS_NAME).is_file():
            raise ValueError(f"adapter folder {folder} has {CONFIG_NAME} and no {SAFETENSORS_WEIGHTS_NAME} beside it")
        read_json(folder / CONFIG_NAME)
        read_safetensors_header(folder / SAFETENSORS_WEIGHTS_NAME, "adapter")
    return AdapterFile(path, "peft", parts=parts, new_word=new_word)


def _run_embeddings(file: Path) -> Path | None:
    """The learned embeddings beside a file, if it is the run's own: others may have been put there since."""
    own = _RUN_FILES.fullmatch(file.name) or _APPROXIMATE.fullmatch(file.name) or _is_recorded(file)
    return _embeddings(file.parent) if own else None


def _is_recorded(file: Path) -> bool:
    """Whether the run's record beside a file lists it, which has its own folder's name."""
    with suppress(OSError, ValueError):
        listed = read_json(file.parent / RUN_RECORD).get("files")
        return isinstance(listed, dict) and listed.get(file.name) == file.stat().st_size
    return False


def _embeddings(folder: Path) -> Path | None:
    return folder / EMBEDDINGS if (folder / EMBEDDINGS).is_file() else None
