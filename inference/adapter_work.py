"""What the commands of `inference.adapters` do: adapters opened against their base, worked on, written, compared."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import StableDiffusionXLPipeline
from peft.utils import CONFIG_NAME
from safetensors import safe_open
from torch import nn

from inference.adapter_files import inspect_adapter, read_run_record, recorded_base
from inference.base import check_base, load_outline, load_pipeline
from inference.base_statistics import base_statistics
from inference.nora_factors import nora_configs, write_inner
from inference.outline import sdxl_outline
from inference.pipelines import DTYPES
from methods.adapter_file import AdapterFile
from methods.arithmetic import Layers, added_layers, compressed, largest_difference
from methods.basis_cache import basis_cache
from methods.components import COMPONENT_NAMES
from methods.formats.layers import base_layers, path_spellings
from methods.reading import Updates, read_adapter, read_file
from methods.saving import write_adapter
from nora.files import BaseStatistics
from runs.tools_header import minimal_header, run_header
from storage.files import read_json, replacing, replacing_folder
from storage.tensors import read_safetensors_header

# Relative error of a layer's ΔW that is read back: of numbers as they were, or rounded to half precision.
TOLERANCES = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
Form = Literal["diffusers", "kohya", "peft"]


@dataclass(frozen=True)
class Source:
    """Adapters of one base, read."""

    files: list[AdapterFile]
    updates: list[Updates]
    components: Mapping[str, nn.Module]
    statistics: BaseStatistics | None  # of the base, where it has weights
    pipeline: StableDiffusionXLPipeline | None  # likewise

    @property
    def form(self) -> Form:
        """The format of the first adapter, or what comes nearest to it."""
        forms: dict[str, Form] = {"kohya": "kohya", "peft": "peft"}
        return forms.get(self.files[0].kind, "diffusers")


@basis_cache()
def open_adapters(paths: Sequence[str], base: str | None, for_inner: bool = False) -> Source:
    """Read adapters against their base: its weights where they act on what is trained, else its shapes alone.

    Args:
        base: None: what the first recorded one names; else SDXL.
        for_inner: its weights are needed for what is written.

    Raises:
        ValueError: for a base or an adapter that can't be read, or whose base isn't known and is needed.
    """
    files = [inspect_adapter(path) for path in paths]
    pipeline = None
    needing = next((file.path for file in files if needs_weights(file)), files[0].path if for_inner else None)
    if needing is not None:
        pipeline = load_pipeline(base or recorded_base(needing), torch.float32, "cpu")
        components = _parts(pipeline)
    elif base is not None:
        components = _shapes(base)
    else:
        components = _recorded_shapes(paths)
    statistics = base_statistics(pipeline) if pipeline else None
    return Source(files, [read_file(file, components, statistics) for file in files], components, statistics, pipeline)


def _parts(pipeline: StableDiffusionXLPipeline) -> dict[str, nn.Module]:
    return {name: getattr(pipeline, name) for name in COMPONENT_NAMES}


def _shapes(base: str) -> Mapping[str, nn.Module]:
    """A base's models, without weights where that can be: a single file says no more than its tensors' shapes."""
    check_base(base)
    if (outline := load_outline(base)) is not None:
        return _parts(outline)
    sdxl, (_, shapes) = sdxl_outline(), read_safetensors_header(Path(base), "base")
    first = shapes.get("model.diffusion_model.input_blocks.0.0.weight", (0,))
    is_sdxl = first[0] == sdxl["unet"].get_submodule("conv_in").out_channels
    return sdxl if is_sdxl else _parts(load_pipeline(base, torch.float32, "cpu"))


def _recorded_shapes(paths: Sequence[str]) -> Mapping[str, nn.Module]:
    """Of the first recorded base that is here; else SDXL's."""
    for path in paths:
        try:
            return _shapes(recorded_base(path))
        except ValueError:
            continue
    return sdxl_outline()


def needs_weights(file: AdapterFile) -> bool:
    """Whether an adapter is an update of a base's own numbers, as DoRA's magnitudes and NoRA's inner factors are."""
    if file.kind == "inner":
        return True
    for folder in file.parts.values():
        config = read_json(folder / CONFIG_NAME)
        start = str(config.get("init_lora_weights", True)).lower()
        if config.get("peft_type") != "LORA" or config.get("use_dora") or start.startswith(("pissa", "olora")):
            return True
    if file.kind == "peft":
        return False
    _, shapes = read_safetensors_header(file.path, "adapter")
    return any("dora_scale" in key or "magnitude" in key for key in shapes)


# --- between ----------------------------------------------------------------------------------------------------------


def compress(updates: Layers, rank: int | None, energy: float | None) -> Updates:
    """Each layer at the nearest smaller rank; says what is kept."""
    small: Updates = {}
    kept = whole = 0.0
    for component, layers in updates.items():
        for path, update in layers.items():
            found = compressed(update, rank, energy)
            small.setdefault(component, {})[path] = found.update
            kept, whole = kept + found.kept, whole + found.whole
    ranks = [update.rank for layers in small.values() for update in layers.values()]
    before = max(update.rank for layers in updates.values() for update in layers.values())
    span = str(ranks[0]) if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"
    print(f"rank {before} -> {span} in {len(ranks)} layers; energy kept: {kept / whole if whole else 1:.4%}")
    return small


def sum_of(several: Sequence[Layers], weights: Sequence[float]) -> Updates:
    """``Σ w_i ΔW_i``, exactly."""
    return added_layers(list(zip(weights, several)))


# --- written ----------------------------------------------------------------------------------------------------------


def write_and_check(source: Source, updates: Layers, path: Path, form: str, dtype_name: str) -> None:
    """Write an adapter, read it back, and only then put it in its place; says how far it is from what it should be.

    Raises:
        ValueError: if the file is further off than its dtype rounds; nothing is written then.
    """
    write_checked(source.components, updates, path, form, dtype_name, header_of(source, path.stem), source.statistics)
    say_new_words(source.files)


def write_checked(
    components: Mapping[str, nn.Module],
    updates: Layers,
    path: Path,
    form: str,
    dtype_name: str,
    header: Mapping[str, str],
    statistics: BaseStatistics | None = None,
) -> None:
    """`write_and_check` of updates from elsewhere."""
    dtype = DTYPES[dtype_name]
    if not any(updates.values()):
        raise ValueError("the adapter changes no layer: there is nothing to write")
    with placed(path, folder=form == "peft") as fresh:
        write_adapter(fresh, form, updates, components, header, dtype)
        report(path, read_adapter(fresh, components, statistics), updates, TOLERANCES[dtype])


def say_new_words(files: Sequence[AdapterFile]) -> None:
    """Words that an adapter's run taught are in a file of their own."""
    for file in files:
        if file.new_word is not None:
            print(f"{file.path} has new words beside it, which are not in what was written: copy {file.new_word} too")


def report(path: Path, found: Layers, expected: Layers, tolerance: float) -> None:
    """Say the largest difference between what was read back and what it should be.

    Raises:
        ValueError: if it is beyond the tolerance.
    """
    error, layer = largest_difference(found, expected)
    if not error <= tolerance:
        raise ValueError(f"{path} read back differs by {error:.1e} at {layer}, more than {tolerance:g}: it is not kept")
    print(
        f"{path}: {sum(map(len, expected.values()))} layers; read back, the largest relative difference is {error:.1e}"
    )


@contextmanager
def placed(path: Path, folder: bool) -> Iterator[Path]:
    """A place beside the output that becomes it unless the body fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (replacing_folder if folder else replacing)(path) as fresh:
        yield fresh


def header_of(source: Source, name: str) -> dict[str, str]:
    """Of a kohya file: what the adapters' own headers or runs say, as far as it holds of what is made of them."""
    minimal = minimal_header(name)
    own = {key: minimal[key] for key in ("ss_output_name", "modelspec.title")}
    first, *others = [minimal | _carried(file, name) for file in source.files]
    if not others:
        return first | own
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    triggers = [header.get("modelspec.trigger_phrase") for header in (first, *others)]
    if any(triggers):
        shared["modelspec.trigger_phrase"] = ", ".join(dict.fromkeys(filter(None, triggers)))
    merged = [file.metadata.get("modelspec.title") or file.path.stem for file in source.files]
    return minimal | shared | own | {"modelspec.merged_from": ", ".join(merged)}


def _carried(file: AdapterFile, name: str) -> dict[str, str]:
    """An adapter's own header, or what its run would have written into it."""
    record = read_run_record(file.path)
    try:
        prompts = [one for one in [record["config"].get("instance_prompt")] if one]
        told = run_header(name, record, prompts)
    except (KeyError, TypeError, AttributeError):  # no record, or another program's
        told = {}
    stale = ("sshs_", "modelspec.hash", "ss_network_dim", "ss_network_alpha")
    carried = {
        key: value
        for key, value in file.metadata.items()
        if key.startswith(("ss_", "modelspec.")) and not key.startswith(stale)
    }
    return told | carried


def write_inner_of(source: Source, path: Path) -> None:
    """The inner factors of a NoRA of this base, from a file that has them only in a product.

    Raises:
        ValueError: if the adapter is none of this base's NoRA.
    """
    assert source.pipeline is not None
    file, updates = source.files[0], source.updates[0]
    if file.kind == "inner":
        raise ValueError(f"adapter {file.path} is inner-only already: copy it")
    configs = nora_configs(file, updates)
    tolerance = max(1e-4, TOLERANCES[_dtype(file)])
    with placed(path, folder=False) as fresh:
        _, shares = write_inner(fresh, updates, source.pipeline, configs)
        (component, name), missed = max(shares.items(), key=lambda one: one[1])
        if not missed <= tolerance:
            raise ValueError(
                f"adapter {file.path} can't be made inner-only: {missed:.1%} of its update in {component}.{name} lies "
                "outside what this base's NoRA can hold, so it is of another base, of another method, or of a run with "
                "a statistic of its own"
            )
        report(path, read_adapter(fresh, source.components, source.statistics), updates, tolerance)


def _dtype(file: AdapterFile) -> torch.dtype:
    """The least precise of a file's numbers."""
    files = [part / "adapter_model.safetensors" for part in file.parts.values()] or [file.path]
    found = set()
    for one in files:
        with safe_open(one, "pt") as opened:
            found |= {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118 (no mapping)
    kinds = {"BF16": torch.bfloat16, "F16": torch.float16}
    return next((dtype for name, dtype in kinds.items() if name in found), torch.float32)


# --- the base ---------------------------------------------------------------------------------------------------------


def stored_dtype(base: str) -> torch.dtype:
    """What a base on this disk is stored in; fp32 where that isn't known."""
    path = Path(base)
    files = [path] if path.is_file() else sorted((path / "unet").glob("*.safetensors"))
    if not files:
        return torch.float32
    with safe_open(files[0], "pt") as opened:
        kinds = {opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118 (no mapping)
    return {("F16",): torch.float16, ("BF16",): torch.bfloat16}.get(tuple(kinds), torch.float32)


@torch.no_grad()
@basis_cache()
def merge_into_base(parts: Sequence[tuple[str, float]], base: str | None, folder: Path, dtype_name: str | None) -> None:
    """Write the base with ``W + Σ w_i ΔW_i`` as a diffusers folder, and compare what it holds with that sum."""
    files = [inspect_adapter(path) for path, _ in parts]
    base = base or recorded_base(parts[0][0])
    dtype = DTYPES[dtype_name] if dtype_name else stored_dtype(base)
    pipeline = load_pipeline(base, torch.float32 if any(map(needs_weights, files)) else dtype, "cpu")
    components: dict[str, Any] = _parts(pipeline)
    statistics = base_statistics(pipeline)
    read = [read_file(file, components, statistics) for file in files]
    total = sum_of(read, [weight for _, weight in parts])
    expected: dict[str, dict[str, torch.Tensor]] = {}
    for component, layers in total.items():
        modules = base_layers(components[component])
        for path, update in layers.items():
            module, merged = modules[path], update.weight()
            merged += module.weight.float()
            module.weight.data = merged.to(dtype)
            expected.setdefault(component, {})[f"{path}.weight"] = module.weight.data
            if update.bias is not None:
                module.bias.data = (module.bias.float() + update.bias).to(dtype)
                expected[component][f"{path}.bias"] = module.bias.data
            if not bool(module.weight.isfinite().all()):
                raise ValueError(f"{component}.{path} is too large for {dtype}: take --dtype fp32")
    pipeline.to(dtype)
    with placed(folder, folder=True) as fresh:
        pipeline.save_pretrained(fresh)
        error = _largest_change(fresh, expected)
        if error != 0:
            raise ValueError(f"{folder} read back differs by {error:.1e} from the merged weights: it is not kept")
        record = {"base": base, "adapters": dict(parts)}
        (fresh / "merged.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    say_new_words(files)
    count = sum(map(len, expected.values()))
    print(f"{folder}: {count} tensors merged; read back, the largest difference is {error:g}")


def _largest_change(folder: Path, expected: Mapping[str, Mapping[str, torch.Tensor]]) -> float:
    """Largest |difference| of saved tensors from these; infinite where one is not there."""
    worst = 0.0
    for component, tensors in expected.items():
        spelled = {one: name for name in tensors for one in path_spellings(component, name)}
        missing = set(tensors)
        for file in sorted((folder / component).glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (no mapping)
                    if (name := spelled.get(key)) in missing:
                        missing.discard(name)
                        difference = opened.get_tensor(key).float() - tensors[name].float()
                        worst = max(worst, float(difference.abs().max()))
        if missing:
            return float("inf")
    return worst
