"""What is in an adapter's file, told from its keys, header and run record: `python -m inference.adapters inspect`."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open

from inference.adapter_files import inspect_adapter, read_run_record, trained_steps
from methods.adapter_file import AdapterFile
from methods.formats.keys import refused_kind, split_key, what_it_is
from runs.tools_header import METHOD_KEY
from storage.files import read_json
from storage.tensors import read_safetensors_header
from storage.text import counted

FORMATS = {
    "folded": "diffusers, or another's dotted names",
    "kohya": "kohya",
    "inner": "NoRA, inner factors only",
    "peft": "PEFT folders",
}
_COMPONENTS = (  # how keys begin -> component; the longer first
    (r"(text_encoder_2\.|lora_te2_|text_encoders\.clip_g\.)", "text_encoder_2"),
    (r"(text_encoder\.|lora_te1_|text_encoders\.clip_l\.)", "text_encoder"),
    (r"", "unet"),
)
_SGM = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks)_")


def adapter_facts(path: Path) -> dict[str, Any]:
    """Format, kinds, layers, ranks, alphas, base, trigger, training; None where a file doesn't say.

    Raises:
        ValueError: if there is no readable file.
    """
    if path.is_file():  # what can't be loaded has a name, too
        metadata, shapes = read_safetensors_header(path, "adapter")
        if not any(map(split_key, shapes)) and "fingerprints" not in metadata:
            return {"path": str(path), "format": _foreign(shapes), "tensors": len(shapes), "bytes": path.stat().st_size}
    file = inspect_adapter(path)
    record = read_run_record(path)
    facts = {"path": str(file.path), "format": FORMATS[file.kind], "bytes": _size(file)}
    if file.kind == "inner":
        facts |= _inner_facts(file)
    elif file.kind == "peft":
        facts |= _peft_facts(file)
    else:
        facts |= _lora_facts(file)
    return facts | _training(file, record) | {"new_word": str(file.new_word) if file.new_word else None}


def identifiers(file: AdapterFile) -> list[str]:
    """The words that stand for the subject in the training's prompts: new ones, and what is in brackets, as [V]."""
    record = read_run_record(file.path)
    trigger = _training(file, record)["trigger"]
    bracketed = re.findall(r"\[[^\]\s]+\]|<[^>\s]+>", trigger) if isinstance(trigger, str) else []
    words = record.get("new_words")
    return list(dict.fromkeys([*(words if isinstance(words, dict) else ()), *bracketed]))


def warn_of_missing_words(adapter: str | Path, prompts: Sequence[str]) -> None:
    """Say once for an adapter that a prompt has none of the words that stand for its subject.

    Raises:
        ValueError: what `inspect_adapter` refuses.
    """
    words = identifiers(inspect_adapter(adapter))
    lacking = [prompt for prompt in prompts if words and not any(word in prompt for word in words)]
    if lacking:
        others = f" (and {counted(len(lacking) - 1, 'other')})" if lacking[1:] else ""
        print(
            f"warning: prompt {lacking[0]!r}{others} lacks {' and '.join(words)}, the word for what {adapter} learned",
            file=sys.stderr,
        )


def _foreign(keys: Iterable[str]) -> str:
    keys = list(keys)
    kind = next(filter(None, map(refused_kind, keys)), None) or what_it_is(keys)
    return (kind or "not known here").removesuffix(", and this base is an SDXL")


def _size(file: AdapterFile) -> int:
    files = [one for part in file.parts.values() for one in part.iterdir()] or [file.path]
    return sum(one.stat().st_size for one in files)


def _lora_facts(file: AdapterFile) -> dict[str, Any]:
    _, shapes = read_safetensors_header(file.path, "adapter")
    layers: dict[str, dict[str, tuple[int, ...]]] = {}
    others: Counter[str] = Counter()
    for key, shape in shapes.items():
        if (split := split_key(key)) is not None:
            layers.setdefault(split[0], {})[split[1]] = shape
        else:
            others[refused_kind(key) or "unknown keys"] += 1
    kinds = Counter(map(_layer_kind, layers.values())) + others
    with safe_open(file.path, "pt") as opened:
        alphas = Counter(round(opened.get_tensor(key).float().item(), 6) for key in shapes if key.endswith(".alpha"))
        weights = {opened.get_slice(key).get_dtype() for key in shapes if not key.endswith(".alpha")}
    sgm = any(map(_SGM.match, layers))
    blocks = {"blocks": "Stability's (SGM)" if sgm else "diffusers'"} if file.kind == "kohya" else {}
    return {
        **blocks,
        "kinds": dict(kinds),
        "layers": dict(Counter(_component(name) for name in layers)),
        "ranks": _counted(rank for parts in layers.values() if (rank := _layer_rank(parts)) is not None),
        "alphas": {f"{alpha:g}": count for alpha, count in sorted(alphas.items())} or "none: alpha is the rank",
        "dtypes": sorted(weights),
        "base_family": _family(layers),
    }


def _layer_kind(parts: Mapping[str, Any]) -> str:
    names = set(parts)
    if names & {"magnitude", "dora_scale"}:
        return "DoRA"
    if any(name.startswith("hada") for name in names):
        return "LoHa"
    if any(name.startswith("lokr") for name in names):
        return "LoKr"
    if names & {"diff", "diff_b"}:
        return "full difference"
    return "LoRA of a convolution" if len(parts.get("down", ())) == 4 else "LoRA"


def _layer_rank(parts: Mapping[str, tuple[int, ...]]) -> int | None:
    for name in ("down", "hada_w1_b", "lokr_w1_b", "lokr_w2_b"):
        if name in parts:
            return parts[name][0]
    return None


def _component(name: str) -> str:
    return next(component for start, component in _COMPONENTS if re.match(start, name))


def _family(layers: Mapping[str, Mapping[str, tuple[int, ...]]]) -> str:
    """By the width of the prompts that cross-attention sees."""
    if (kind := what_it_is(layers)) is not None:
        return kind.removesuffix(", and this base is an SDXL").removeprefix("an adapter of ")
    widths = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "SDXL's refiner", 2048: "SDXL"}
    for name, parts in layers.items():
        if re.search(r"attn2[._](processor[._])?to_[kv](_lora)?$", name) and "down" in parts:
            width = parts["down"][1]
            return widths.get(width, f"another, with prompts of width {width}")
    return "SDXL" if any(_component(name) == "text_encoder_2" for name in layers) else "not known"


def _counted(values: Iterable[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}


def _inner_facts(file: AdapterFile) -> dict[str, Any]:
    from nora.files import parse_inner

    inner = parse_inner(file.path)
    configs = {prefix: (config.r, config.outer_r, config.outer_init) for prefix, config in inner.configs.items()}
    layers = Counter(max((p for p in configs if key.startswith(f"{p}.")), key=len) for key in inner.trained)
    return {
        "kinds": {"NoRA": len(inner.trained)},
        "layers": {prefix.removesuffix(".text_model"): count for prefix, count in layers.items()},
        "ranks": _counted(
            min(min(tensor.shape) for tensor in entries.values() if tensor.ndim == 2)
            for entries in inner.trained.values()
        ),
        "outer": {prefix: f"rank {outer}, {init}" for prefix, (_, outer, init) in configs.items()},
        "base_family": "that of its run, by fingerprints of the weights",
    }


def _peft_facts(file: AdapterFile) -> dict[str, Any]:
    kinds: Counter[str] = Counter()
    layers: dict[str, int] = {}
    ranks: set[str] = set()
    alphas: set[str] = set()
    for part, folder in file.parts.items():
        config = read_json(folder / CONFIG_NAME)
        _, shapes = read_safetensors_header(folder / SAFETENSORS_WEIGHTS_NAME, "adapter")
        found = {key.rpartition(".lora_")[0] for key in shapes if ".lora_" in key} or set(shapes)
        kind = "DoRA" if config.get("use_dora") else "NoRA" if config.get("peft_type") == "NORA" else None
        kinds[kind or str(config.get("peft_type"))] += len(found)
        layers[part or "not said"] = len(found)
        ranks |= {str(config[name]) for name in ("r", "rank") if config.get(name) is not None}
        ranks |= {str(one) for one in (config.get("rank_pattern") or {}).values()}
        alphas |= {str(config[name]) for name in ("lora_alpha", "alpha") if config.get(name) is not None}
    return {"kinds": dict(kinds), "layers": layers, "ranks": sorted(ranks), "alphas": sorted(alphas)}


def _training(file: AdapterFile, record: Mapping[str, Any]) -> dict[str, Any]:
    """What header and record say: the record is the run's own, the header any program's."""
    header = file.metadata
    config = record.get("config") if isinstance(record.get("config"), dict) else {}
    told = {
        "title": header.get("modelspec.title") or header.get("ss_output_name"),
        "method": record.get("method") or header.get(METHOD_KEY) or header.get("ss_network_module"),
        "base": config.get("pretrained_model_name_or_path") or header.get("ss_sd_model_name"),
        "base_version": header.get("ss_base_model_version") or header.get("modelspec.architecture"),
        "trigger": config.get("instance_prompt") or header.get("modelspec.trigger_phrase"),
        "steps": (trained_steps(file.path) if record else None) or header.get("ss_steps"),
        "resolution": config.get("resolution") or header.get("modelspec.resolution") or header.get("ss_resolution"),
        "prediction_type": header.get("modelspec.prediction_type"),
        "license": header.get("modelspec.license"),
        "tags": _tags(header.get("ss_tag_frequency")),
    }
    if "sshs_model_hash" in header:
        told["hash"] = "as in the header" if header["sshs_model_hash"] == data_hash(file.path) else "not the header's"
    return told


def _tags(text: str | None) -> dict[str, int] | None:
    """The commonest twenty."""
    try:
        folders = json.loads(text or "{}")
        counts: Counter[str] = Counter()
        for tags in folders.values():
            counts.update({tag: int(count) for tag, count in tags.items()})
    except (ValueError, AttributeError, TypeError):
        return None
    return dict(counts.most_common(20)) or None


def data_hash(path: Path) -> str:
    """SHA-256 of a safetensors file after its header."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(8 + int.from_bytes(file.read(8), "little"))
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def facts_text(facts: Mapping[str, Any]) -> str:
    """One fact a line; what isn't known is left out."""
    lines = [str(facts["path"])]
    for name, value in facts.items():
        if name == "path" or value is None:
            continue
        if isinstance(value, Mapping):
            value = ", ".join(f"{key} ({count})" for key, count in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        elif name == "bytes":
            value = f"{value:,}"
        lines.append(f"  {name.replace('_', ' ') + ':':16} {value}")
    return "\n".join(lines)
