"""A base pipeline, and adapters on and off it.

Every check that can be made on a file's header is made before the pipeline is touched, and a load that fails leaves
the pipeline as it was.
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import SingleFileComponentError
from diffusers.utils import is_xformers_available
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from torch import nn

import nora
from inference.components import (
    COMPONENT_NAMES,
    EMBEDDINGS,
    FOLDED_WEIGHTS,
    INNER_WEIGHTS,
    RUN_RECORD,
    adapter_components,
)
from inference.tokens import load_new_word, remove_new_words

BASE_PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CHECKPOINT_UNET = "model.diffusion_model."  # how single-file checkpoints spell the UNet's keys
_LORA_MATRIX = re.compile(r"(?P<layer>.+)\.(?P<side>lora_A|lora_B|lora\.down|lora\.up)\.weight")
_LORA_EXTRA = (".alpha", ".lora_magnitude_vector")  # scalars and DoRA vectors, whose shapes follow from the matrices


# --- the base ---------------------------------------------------------------------------------------------------------


def check_base(base: str | Path) -> None:
    """Raise ValueError unless `base` is a whole SDXL folder, a `.safetensors` file, or could be a Hub id."""
    path = Path(base)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise ValueError(
                f"base {base} is a file, but not a .safetensors one: name a diffusers folder or such a file"
            )
        _, keys = _read_header(path, "base")
        if not any(key.startswith(_CHECKPOINT_UNET) for key in keys):
            raise ValueError(f"base {base} holds no UNet ({_CHECKPOINT_UNET}…): a whole SDXL checkpoint is needed")
        return
    if not path.exists():
        if _HUB_ID.fullmatch(str(base)) and path.suffix != ".safetensors" and not path.parent.is_dir():
            return
        raise ValueError(
            f"base {base} does not exist (looked from {Path.cwd()}): "
            "name a diffusers folder, a .safetensors file or a Hub id"
        )
    index = path / "model_index.json"
    if not index.is_file():
        raise ValueError(f"base folder {base} has no model_index.json: it is not a diffusers pipeline folder")
    class_name = _read_json(index).get("_class_name")
    if not str(class_name).startswith("StableDiffusionXL"):
        raise ValueError(f"base folder {base} holds a {class_name}, and SDXL (StableDiffusionXLPipeline) is needed")
    missing = [part for part in BASE_PARTS if not _part_is_there(path / part)]
    if missing:
        raise ValueError(f"base folder {base} lacks {', '.join(missing)}: copy or download the whole pipeline folder")


def _part_is_there(folder: Path) -> bool:
    if folder.name.startswith("tokenizer"):
        return (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()
    if folder.name == "scheduler":
        return (folder / "scheduler_config.json").is_file()
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def load_pipeline(
    base: str | Path,
    torch_dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    **from_pretrained_options: Any,
) -> StableDiffusionXLPipeline:
    """Load SDXL from a diffusers folder, a Hub id or a single `.safetensors` file.

    Args:
        torch_dtype: of every model in the pipeline, text encoders stored in another dtype included.
            None: float16 on a GPU, float32 on a CPU.
        device: None: a GPU where there is one.
        from_pretrained_options: passed on, such as `variant="fp16"` or `local_files_only=True`.

    Raises:
        ValueError: the base is missing, incomplete, not SDXL, or can't be fetched.
    """
    check_base(base)
    device = torch.device(device or default_device())
    torch_dtype = torch_dtype or default_dtype(device)
    options = {
        "dtype": torch_dtype,
        "add_watermarker": False,  # an invisible watermark would differ between machines with and without its package
        **from_pretrained_options,
    }
    try:
        if Path(base).is_file():
            pipeline = StableDiffusionXLPipeline.from_single_file(str(base), **options)
        else:
            # safetensors only: a pickle from outside can run code
            pipeline = StableDiffusionXLPipeline.from_pretrained(str(base), use_safetensors=True, **options)
    except (OSError, SafetensorError, SingleFileComponentError) as error:
        where = "" if Path(base).exists() else f", which is no folder in {Path.cwd()} either,"
        reason = textwrap.shorten(str(error).strip().split("\n")[0], 200, placeholder="…")
        raise ValueError(f"base {base}{where} could not be loaded: {reason}") from error
    _check_loaded(base, pipeline, from_pretrained_options)
    pipeline.vae.enable_slicing()  # one image at a time: decoding four at 1024 px takes more memory than the UNet
    for model in pipeline.components.values():
        if isinstance(model, nn.Module) and model.dtype != torch_dtype:
            model.to(torch_dtype)
    return pipeline.to(device)


def _check_loaded(base: str | Path, pipeline: StableDiffusionXLPipeline, given: dict[str, Any]) -> None:
    """Refuse relatives of SDXL that load as it: diffusers leaves out what another family lacks."""
    missing = [part for part in BASE_PARTS if part not in given and getattr(pipeline, part) is None]
    if missing:
        raise ValueError(f"base {base} has no {', '.join(missing)}: SDXL is needed, and this is another model")
    if pipeline.unet is not None:
        config = pipeline.unet.config
        if config.addition_embed_type != "text_time" or config.in_channels != pipeline.vae.config.latent_channels:
            raise ValueError(
                f"base {base} has a UNet with {config.in_channels} input channels and {config.addition_embed_type} "
                "conditioning: SDXL's text-to-image UNet is needed, with text_time conditioning"
            )


def base_geometry(base: str | Path, **download_options: Any) -> tuple[int, int]:
    """Side of the pictures that a base was trained on, and what a side must be a multiple of; pixels.

    Only configurations are read. A single file has no configuration, and is SDXL at its own size.
    """
    if Path(base).is_file():
        return 1024, 32
    options = {name: value for name, value in download_options.items() if name != "variant"}
    try:
        unet = UNet2DConditionModel.load_config(str(base), subfolder="unet", **options)
        vae = AutoencoderKL.load_config(str(base), subfolder="vae", **options)
    except (OSError, ValueError) as error:
        reason = textwrap.shorten(str(error).strip().split("\n")[0], 200, placeholder="…")
        raise ValueError(f"base {base} could not be loaded: {reason}") from error
    vae_scale_factor = 2 ** (len(vae["block_out_channels"]) - 1)
    return unet["sample_size"] * vae_scale_factor, vae_scale_factor * 2 ** (len(unet["block_out_channels"]) - 1)


def load_vae(path: str, device: torch.device | str) -> AutoencoderKL:
    """An autoencoder to use instead of the base's own, in fp32.

    Raises:
        ValueError: if there is none.
    """
    folder = Path(path)
    subfolder = "vae" if (folder / "vae" / "config.json").is_file() else None
    try:
        if folder.is_file():
            vae = AutoencoderKL.from_single_file(path)
        else:
            vae = AutoencoderKL.from_pretrained(path, subfolder=subfolder, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"autoencoder {path} could not be loaded: {str(error).strip().splitlines()[0]}") from error
    return vae.to(device, torch.float32).requires_grad_(False)


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def check_xformers(device: torch.device | str) -> None:
    """Raise ValueError, with the way out, where xformers' attention can't serve."""
    way_out = "leave --enable_xformers_memory_efficient_attention out, PyTorch's own attention is used then"
    if torch.device(device).type != "cuda":
        raise ValueError(f"xformers' attention needs a CUDA GPU and the device is {device}: {way_out}")
    if not is_xformers_available():
        raise ValueError(f"xformers is not installed: pip install xformers, or {way_out}")
    try:
        from xformers.ops import memory_efficient_attention

        query = torch.zeros(1, 2, 40, device=device)  # fp32, as in the trial that diffusers makes
        memory_efficient_attention(query, query, query)
    except (ImportError, NotImplementedError, RuntimeError) as error:  # built for another PyTorch, or for other GPUs
        reason = str(error).strip().split("\n")[0]
        raise ValueError(f"xformers' attention does not run on {device} ({reason}): {way_out}") from error


# --- adapter files ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AdapterFile:
    """An adapter file's header."""

    path: Path
    kind: str  # "folded": diffusers LoRA, or "inner": NoRA's inner factors
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]


def inspect_adapter(path: str | Path) -> AdapterFile:
    """Read the header of an adapter file, or of the file to use in a run folder; no weights are read.

    A folder's folded file comes first, because it needs no outer factors to be recomputed. The kind is read from the
    header, so files may be renamed.

    Raises:
        ValueError: no such path, no adapter in it, or not an adapter file.
    """
    path = Path(path)
    if not path.exists():
        raise ValueError(f"adapter {path} does not exist (looked from {Path.cwd()})")
    if path.is_dir():
        candidates = [path / name for name in (FOLDED_WEIGHTS, INNER_WEIGHTS)]
        path = next((file for file in candidates if file.is_file()), path)
        if path.is_dir():
            raise ValueError(f"adapter folder {path} has neither {FOLDED_WEIGHTS} nor {INNER_WEIGHTS}")
    metadata, shapes = _read_header(path, "adapter")
    kind = "inner" if "fingerprints" in metadata else "folded"
    if not any(_LORA_MATRIX.fullmatch(key) for key in shapes):
        raise ValueError(f"adapter {path} holds no LoRA matrices in the diffusers format, such as unet.….lora_A.weight")
    return AdapterFile(path, kind, shapes, metadata)


def _read_header(path: Path, role: str) -> tuple[dict[str, str], dict[str, tuple[int, ...]]]:
    """Metadata, and key -> shape, of a safetensors file; `role` names the file in the error."""
    try:
        with safe_open(path, framework="pt") as file:
            # not a mapping: it can't be iterated without keys()
            shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
            return dict(file.metadata() or {}), shapes
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{role} {path} is not a readable safetensors file: {error}") from error


def read_run_record(path: str | Path) -> dict[str, Any]:
    """The `run.json` beside an adapter (a run folder, or a file in one); {} where there is none."""
    path = Path(path)
    record = (path if path.is_dir() else path.parent) / RUN_RECORD
    return _read_json(record) if record.is_file() else {}


def recorded_base(path: str | Path) -> str:
    """The base that an adapter was trained on, as its `run.json` names it.

    Raises:
        ValueError: there is no record, or the base it names is not here.
    """
    base = (read_run_record(path).get("config") or {}).get("pretrained_model_name_or_path")
    if not base:
        raise ValueError(f"adapter {path} has no {RUN_RECORD} that names its base: name it with --base")
    try:
        check_base(base)
    except ValueError as error:
        raise ValueError(
            f"{RUN_RECORD} of adapter {path} names a base that can't be used: {error}; or use --base"
        ) from error
    return base


def _read_json(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds a JSON {type(record).__name__}, and an object is expected")
    return record


def _check_folded(file: AdapterFile, components: dict[str, nn.Module]) -> None:
    """Raise ValueError, naming the layer, unless every LoRA pair of the file fits a layer of the base."""
    pairs: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, shape in file.shapes.items():
        match = _LORA_MATRIX.fullmatch(key)
        if match:
            side = "A" if match["side"] in ("lora_A", "lora.down") else "B"
            pairs.setdefault(match["layer"], {})[side] = shape
        elif not key.endswith(_LORA_EXTRA):
            raise ValueError(f"adapter {file.path}: {key} is not a key of a LoRA in the diffusers format")
    for layer, pair in pairs.items():
        if set(pair) != {"A", "B"}:
            raise ValueError(f"adapter {file.path}: {layer} has only lora_{min(pair)}, the file is incomplete")
        weight = _base_weight(components, layer)
        if weight is None:
            raise ValueError(
                f"adapter {file.path} belongs to another base: this one has no layer {layer}; "
                "use the base it was trained on"
            )
        (rank, in_features), (out_features, rank_out) = pair["A"][:2], pair["B"][:2]
        if rank != rank_out:
            raise ValueError(f"adapter {file.path}: {layer} has rank {rank} in lora_A and {rank_out} in lora_B")
        if (out_features, in_features) != tuple(weight.shape[:2]):
            raise ValueError(
                f"adapter {file.path} belongs to another base: {layer} is {out_features}×{in_features} in the file and "
                f"{weight.shape[0]}×{weight.shape[1]} in this base; use the base it was trained on"
            )


def _base_weight(components: dict[str, nn.Module], layer: str) -> torch.Tensor | None:
    """The frozen weight behind a key's layer, for keys with and without transformers' old `text_model` level."""
    for prefix, component in components.items():
        for spelling in (prefix, prefix.removesuffix(".text_model")):
            if not layer.startswith(f"{spelling}."):
                continue
            try:
                module = component.get_submodule(layer.removeprefix(f"{spelling}."))
            except AttributeError:
                continue
            if isinstance(module, BaseTunerLayer):
                module = module.get_base_layer()
            weight = getattr(module, "weight", None)
            if weight is not None and weight.ndim >= 2:
                return weight
    return None


# --- adapters on a pipeline -------------------------------------------------------------------------------------------


def load_adapter(
    pipeline: StableDiffusionXLPipeline, path: str | Path, scale: float = 1.0, name: str | None = None
) -> str:
    """Load a NoRA or LoRA adapter onto the pipeline, beside those already there, and return its name.

    Args:
        path: a run folder, its folded file (any LoRA in the diffusers format), or its inner-only file.
        scale: factor on the adapter's update; 0 gives the base, 1 what was trained.
        name: for `set_adapter_scale` and `unload_adapters`; letters, digits, "-" and "_". None: from the path.

    Raises:
        ValueError: not an adapter, an adapter of another base, or a name in use. The pipeline is then as before.
    """
    file = inspect_adapter(path)
    name = _default_name(path) if name is None else name
    components = adapter_components(pipeline)
    if not re.fullmatch(r"[\w-]+", name, re.ASCII):
        raise ValueError(f'adapter name "{name}" must be made of letters, digits, "-" and "_"')
    _check_scale(scale)
    names = loaded_adapters(pipeline)
    if name in names:
        raise ValueError(
            f'an adapter "{name}" is already loaded (loaded: {", ".join(names)}): pass another name, '
            f'or call unload_adapters(pipeline, "{name}") first'
        )
    if file.kind == "folded":
        _check_folded(file, components)
    elif absent := [prefix for prefix in nora.inner_prefixes(file.path) if prefix not in components]:
        raise ValueError(f"adapter {file.path} belongs to another base: this pipeline has no {', '.join(absent)}")
    active = {prefix: _active_adapters(module) for prefix, module in components.items()}
    try:
        if file.kind == "folded":
            pipeline.load_lora_weights(file.path.parent, weight_name=file.path.name, adapter_name=name)
        else:
            prefixes = nora.inner_prefixes(file.path)
            nora.load_inner(file.path, {prefix: components[prefix] for prefix in prefixes}, adapter_name=name)
    except BaseException:
        unload_adapters(pipeline, name)
        _activate(components, active)
        raise
    _activate(components, {prefix: [*names, name] for prefix, names in active.items()})
    set_adapter_scale(pipeline, name, scale)
    words = file.path.parent / EMBEDDINGS
    if words.is_file():
        load_new_word(pipeline, words)
    return name


def loaded_adapters(pipeline: StableDiffusionXLPipeline) -> list[str]:
    """Names of the adapters on any part of the pipeline, in the order they were loaded."""
    components = adapter_components(pipeline).values()
    return list(dict.fromkeys(name for module in components for name in getattr(module, "peft_config", None) or {}))


def set_adapter_scale(pipeline: StableDiffusionXLPipeline, name: str, scale: float) -> None:
    """Scale one adapter's update in every part, whatever the other adapters' scales are."""
    _check_scale(scale)
    if name not in loaded_adapters(pipeline):
        raise ValueError(f'no adapter "{name}" is loaded (loaded: {", ".join(loaded_adapters(pipeline)) or "none"})')
    for module in adapter_components(pipeline).values():
        for layer in _tuner_layers(module):
            layer.set_scale(name, float(scale))


def unload_adapters(pipeline: StableDiffusionXLPipeline, name: str | None = None) -> None:
    """Take one adapter, or all of them, off the pipeline; with the last one gone, the base's own layers are back."""
    if any(layer.merged for module in adapter_components(pipeline).values() for layer in _tuner_layers(module)):
        pipeline.unfuse_lora(components=list(COMPONENT_NAMES))
    if name is not None:
        pipeline.delete_adapters(name)
    if name is None or not loaded_adapters(pipeline):
        pipeline.unload_lora_weights()
        remove_new_words(pipeline)


def _check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale} must be a finite number; 1 is the adapter as trained")


def _default_name(path: str | Path) -> str:
    """From the run folder's name, or the file's; prefixed so that it is no part of any parameter's name.

    transformers looks for an adapter's name inside parameter names when it loads one, and "out" is inside "out_proj".
    """
    path = Path(path).resolve()
    stem = path.stem if path.is_file() else path.name
    if path.name in (FOLDED_WEIGHTS, INNER_WEIGHTS):
        stem = path.parent.name
    return "adapter_" + (re.sub(r"[^A-Za-z0-9_-]+", "_", stem) or "0")


def _tuner_layers(module: nn.Module) -> list[BaseTunerLayer]:
    return [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]


def _active_adapters(module: nn.Module) -> list[str]:
    return list(dict.fromkeys(name for layer in _tuner_layers(module) for name in layer.active_adapters))


def _activate(components: dict[str, nn.Module], names: dict[str, list[str]]) -> None:
    for prefix, module in components.items():
        for layer in _tuner_layers(module):
            layer.set_adapter(names[prefix], inference_mode=True)
