"""The inner-only file: two small matrices per layer, and what is needed to find their basis again.

One safetensors file. Tensors, for each component prefix ("unet", "text_encoder", …) and module:

    {prefix}.{module}.lora_A.weight   A' (r', r)
    {prefix}.{module}.lora_B.weight   B' (r, r')
    {prefix}.{module}.core.weight, .wide_A.weight, .wide_B.weight    what other cells train (`cells.CELLS`)
    {prefix}.{module}.lora_A.coefficients, .lora_A.offset_scale      of a generated matrix (`generators`)
    {prefix}.{module}.start           float32, all matrices flat; what a residual subtracts
    {prefix}.{module}.awsvd_stats     float16 statistic (n,), in units of its mean; one per distinct input

where it was measured for this adapter. A statistic of the base alone can be measured anew and is left out; then all is
packed, with the fingerprints, into a few stacked tensors (version 2; see `packing`).

Header: `format_version`; `nora_config`, JSON of prefix -> config; `fingerprints`, JSON of "{prefix}.{module}" ->
sketches of W, A and B; `awsvd_stats_aliases`, JSON of "{prefix}.{module}" -> the module that holds its statistic;
`base_statistic`, the name of the passes that measure it, and `layout`, where it was left out. Any further metadata is
the caller's.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, cast

import torch
from peft import PeftModel, inject_adapter_in_model
from safetensors import SafetensorError, safe_open
from torch import nn

from .basis import Basis, check_base, is_on_output, layer_shape, oriented_weight, rebuild_basis
from .cells import FILE_NAMES
from .config import LayerRanks, NoraConfig, plain_config
from .functional import FINGERPRINT_SHAPE
from .layer import NoraLinear, Origin, check_unmerged, trained_modules
from .model import check_in_memory, check_layer, find_targets, nora_layers, own_name, ready_bases
from .nested import RightFactor, right_product
from .packing import pack, unpack
from .parallel import over_layers
from .safetensors_file import write_safetensors

FORMAT_VERSION = 2  # 1: with all statistics
_HEADER_KEYS = ("format_version", "nora_config", "fingerprints", "awsvd_stats_aliases")
_BASE_STATISTIC = "base_statistic"
_LAYOUT = "layout"
_FINGERPRINT = "fingerprint"
_STATS_SUFFIX = ".awsvd_stats"
# (name of the passes, prefix, component, its config) -> module -> statistic (n,) of the base alone
BaseStatistics = Callable[[str, str, nn.Module, NoraConfig], Mapping[str, torch.Tensor]]
_START_SUFFIX = ".start"
_TRAINED_KEY = re.compile(rf"(.+)\.({'|'.join(FILE_NAMES.values())})\.(weight|coefficients|offset_scale)")


class InnerFile(NamedTuple):
    """A parsed file. Keys are "{prefix}.{module}"; `trained` has further "lora_A.weight" and the like."""

    configs: dict[str, NoraConfig]
    trained: dict[str, dict[str, torch.Tensor]]
    starts: dict[str, torch.Tensor]
    statistics: dict[str, torch.Tensor]
    fingerprints: dict[str, torch.Tensor]
    base_statistic: str | None


def save_inner(
    path: str | os.PathLike,
    components: Mapping[str, nn.Module],
    adapter_name: str = "default",
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    base_statistic: str | None = None,
) -> None:
    """Write the trained inner factors of the components, atomically.

    Args:
        path: the file.
        components: key prefix -> model with the NoRA adapter inside, e.g. ``{"unet": unet}``.
        adapter_name: which adapter.
        metadata: further header entries, string to string.
        dtype: of A' and B' in the file; None keeps theirs.
        base_statistic: AwSVD's statistics were measured by the passes of this name, which depend on the base alone:
            leave them out. None: they are in the file.

    Raises:
        ValueError: if a component lacks the adapter, still waits for its basis, or also trains modules_to_save, which
            this file doesn't hold; or if ``metadata`` uses a key of the format.
    """
    reserved = sorted(set(metadata or {}) & {*_HEADER_KEYS, _BASE_STATISTIC, _LAYOUT})
    if reserved:
        raise ValueError(f"metadata uses {reserved}, which the file format itself writes: rename them")
    tensors: dict[str, torch.Tensor] = {}
    configs, fingerprints, aliases = {}, {}, {}
    owners: dict[bytes, str] = {}  # content of a statistic -> the module that stores it
    for prefix, model in components.items():
        layers = nora_layers(model, adapter_name)
        if not layers:
            raise ValueError(f"component {prefix!r} has no NoRA adapter {adapter_name!r}: inject it first")
        config = cast(dict, model.peft_config)[adapter_name]
        if config.modules_to_save:
            raise ValueError(
                f"component {prefix!r} also trains modules_to_save={config.modules_to_save}, which an inner-only file "
                "doesn't hold: use PEFT's save_pretrained"
            )
        configs[prefix] = plain_config(config)
        for name, layer in layers.items():
            key = f"{prefix}.{name}"
            for trained, module in layer.trained(adapter_name).items():
                for entry, tensor in module.state_dict().items():
                    learns = entry in ("weight", "coefficients")
                    kept = tensor.to(dtype) if learns and dtype is not None else tensor
                    tensors[f"{key}.{FILE_NAMES[trained]}.{entry}"] = kept
            if layer.start(adapter_name) is not None:
                tensors[key + _START_SUFFIX] = layer.nora_start[adapter_name]
            basis = layer.basis(adapter_name)
            assert basis.fingerprint is not None  # only a basis on the meta device has none
            fingerprints[key] = basis.fingerprint
            if basis.statistic is None or base_statistic is not None:
                continue
            owner = owners.setdefault(basis.statistic.cpu().numpy().tobytes(), key)
            if owner == key:
                tensors[key + _STATS_SUFFIX] = basis.statistic
            else:
                aliases[key] = owner
    header = {
        "format_version": "1",
        "nora_config": json.dumps(configs),
        "fingerprints": _json({key: _rounded(one) for key, one in fingerprints.items()}),
        "awsvd_stats_aliases": _json(aliases),
    }
    if base_statistic is not None:
        modules: dict[str, dict[str, torch.Tensor]] = {key: {_FINGERPRINT: one} for key, one in fingerprints.items()}
        for name, tensor in tensors.items():
            key = max((key for key in _parents(name) if key in modules), key=len)
            modules[key][name.removeprefix(f"{key}.")] = tensor
        tensors, layout = pack(modules)
        packed = {"format_version": "2", _LAYOUT: _json(layout), _BASE_STATISTIC: base_statistic}
        header |= {"fingerprints": "{}", **packed}
    write_safetensors(Path(path), tensors, {"format": "pt", **(metadata or {}), **header})


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _rounded(fingerprint: torch.Tensor) -> list[list[float]]:
    return [[float(f"{x:.6g}") for x in row] for row in fingerprint.tolist()]


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def inner_prefixes(path: str | os.PathLike) -> list[str]:
    """The component prefixes that an inner-only file holds, such as ["unet", "text_encoder"].

    Raises:
        ValueError: if it isn't such a file.
    """
    with _open(path) as file:
        return list(_configs(path, file.metadata() or {}))


def load_inner(
    path: str | os.PathLike,
    components: Mapping[str, nn.Module],
    adapter_name: str = "default",
    base_statistics: BaseStatistics | None = None,
) -> None:
    """Inject the adapters of an inner-only file into the components and give them their trained inner factors.

    The outer factors are recomputed from the base weights (or read from the disk cache) and must match the file's
    fingerprints. Every check comes before the first module is changed, and a failure leaves the components untouched.

    Args:
        path: a file that `save_inner` wrote.
        components: key prefix -> base model, for exactly the prefixes in the file (see `inner_prefixes`).
        adapter_name: name for the adapter; must be new to every component.
        base_statistics: called with (the name of the passes, prefix, component, config) for the statistics of the base
            alone, module name -> (n,), where the file leaves them out.

    Raises:
        ValueError: if it isn't such a file, or one of a later format; if components, modules, keys or shapes don't
            agree; if a base weight or an outer pair isn't the one that the adapter was trained with.
    """
    for prefix, model in components.items():
        if isinstance(model, PeftModel):
            raise ValueError(f"component {prefix!r} is a PeftModel: pass the model inside, model.get_base_model()")
        if adapter_name in getattr(model, "peft_config", {}):
            raise ValueError(f"component {prefix!r} already has an adapter {adapter_name!r}: choose another name")
    inner = parse_inner(path)
    bases = _checked_bases(path, inner, components, base_statistics)
    for prefix, model in components.items():
        with ready_bases(bases[prefix]):
            add_adapter = getattr(model, "add_adapter", None)
            if add_adapter is not None:  # so that diffusers and transformers know of the adapter
                add_adapter(inner.configs[prefix], adapter_name=adapter_name)
            else:
                inject_adapter_in_model(inner.configs[prefix], model, adapter_name)
        for name, layer in nora_layers(model, adapter_name).items():
            _set_inner(layer, adapter_name, inner, f"{prefix}.{name}")


@torch.no_grad()
def read_inner(
    path: str | os.PathLike, components: Mapping[str, nn.Module], base_statistics: BaseStatistics | None = None
) -> dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """Prefix -> module -> (``A' A`` (r', n), ``s B B'`` (m, r')) in float32 on the CPU; nothing is injected.

    Args:
        path: a file that `save_inner` wrote.
        components: as for `load_inner`; adapters that are on them already make no difference.
        base_statistics: as for `load_inner`.

    Raises:
        ValueError: as `load_inner`.
    """
    inner = parse_inner(path)
    folded: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    for prefix, bases in _checked_bases(path, inner, components, base_statistics).items():
        folded[prefix] = {}
        for name, layer in find_targets(components[prefix], inner.configs[prefix]).items():
            key, W = f"{prefix}.{name}", oriented_weight(layer)
            config, basis = inner.configs[prefix], bases[name].to(W.dtype)  # as a live layer holds them
            ranks, found = config.layer_ranks(name, (W.shape[0], W.shape[1])), inner.trained[key]
            if (
                set(found) == {"lora_A.weight", "lora_B.weight"}
                and (config.structure, config.position) == ("serial", "a")
                and key not in inner.starts
            ):
                pair = found["lora_A.weight"], found["lora_B.weight"]
                folded[prefix][name] = _fold(W, basis.A, basis.B, basis.right, *pair, ranks.scaling)
                continue
            bare = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
            bare.weight = nn.Parameter(W, requires_grad=False)
            alone = NoraLinear(bare, name)
            alone.update_layer("default", Origin(config, name), ranks, True)
            alone.set_basis("default", basis)
            _set_inner(alone, "default", inner, key)
            folded[prefix][name] = alone.fold("default")
    return folded


def _fold(
    W: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor | None,
    right: RightFactor | None,
    inner_A: torch.Tensor,
    inner_B: torch.Tensor,
    scaling: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The plain LoRA, on the CPU; W meets the few columns of ``R B'`` or rows of ``A' L`` alone."""
    A = A.cpu()
    if B is not None:
        return inner_A.float() @ A.float(), scaling * (B.cpu().float() @ inner_B.float())
    assert right is not None
    columns = right_product(inner_B.float(), A, RightFactor(*(diagonal.cpu() for diagonal in right)), scaling)
    rows = inner_A.float() @ A.float()
    return (rows @ W.cpu().float(), columns) if is_on_output(A, W.shape[1]) else (rows, W.cpu().float() @ columns)


def _checked_bases(
    path: str | os.PathLike,
    inner: InnerFile,
    components: Mapping[str, nn.Module],
    base_statistics: BaseStatistics | None,
) -> dict[str, dict[str, Basis]]:
    """Prefix -> module -> the basis that its inner factors were trained in, after every check."""
    given, held = set(components), set(inner.configs)
    if given != held:
        raise ValueError(
            f"{path} holds {sorted(held)} but the components given are {sorted(given)}: pass exactly those"
        )
    measured = [prefix for prefix, one in inner.configs.items() if inner.base_statistic and one.needs_statistics]
    if measured and base_statistics is None:
        raise ValueError(
            f"{path} leaves out the statistics of its base, which the passes {inner.base_statistic!r} measure: "
            "pass base_statistics, load it with inference.load, or load a LoRA that fold_nora made of the adapter"
        )
    targets = {prefix: _matching_targets(path, prefix, model, inner) for prefix, model in components.items()}
    for prefix, layers in targets.items():  # cheap, so before the first decomposition
        for name, layer in layers.items():
            key = f"{prefix}.{name}"
            check_base(key, layer, inner.fingerprints[key])
    for prefix in measured:
        assert inner.base_statistic is not None and base_statistics is not None
        found = base_statistics(inner.base_statistic, prefix, components[prefix], inner.configs[prefix])
        inner.statistics.update({f"{prefix}.{name}": one for name, one in found.items()})

    def rebuilt(place: tuple[str, str]) -> Basis:
        prefix, name = place
        key, layer = f"{prefix}.{name}", targets[prefix][name]
        names = own_name(components[prefix], name), name
        config, expected, statistic = inner.configs[prefix], inner.fingerprints[key], inner.statistics.get(key)
        outer_r = config.layer_ranks(name, layer_shape(layer)).outer_r
        basis = rebuild_basis(key, names, layer, config, outer_r, statistic, expected, base_checked=True)
        return basis.to(oriented_weight(layer).dtype)

    places = [(prefix, name) for prefix, layers in targets.items() for name in layers]
    bases: dict[str, dict[str, Basis]] = {prefix: {} for prefix in targets}
    for (prefix, name), basis in zip(places, over_layers(rebuilt, places)):
        bases[prefix][name] = basis.at(oriented_weight(targets[prefix][name]).device)
    return bases


@torch.no_grad()
def _set_inner(layer: NoraLinear, adapter_name: str, inner: InnerFile, key: str) -> None:
    for name, module in layer.trained(adapter_name).items():
        for entry, tensor in module.state_dict().items():
            tensor.copy_(inner.trained[key][f"{FILE_NAMES[name]}.{entry}"])
    if key in inner.starts:
        layer.nora_start[adapter_name] = inner.starts[key].to(layer.base_weight.device)


def _matching_targets(path, prefix: str, model: nn.Module, inner: InnerFile) -> dict[str, nn.Module]:
    """The component's target layers, after checking that the file has exactly these, with the right shapes."""
    config = inner.configs[prefix]
    layers = find_targets(model, config)
    stored = {key for key in inner.trained if key.startswith(f"{prefix}.") and _prefix_of(key, inner.configs) == prefix}
    wanted = {f"{prefix}.{name}" for name in layers}
    if stored - wanted:
        raise ValueError(
            f"{path} has weights for {min(stored - wanted)} ({len(stored - wanted)} in all), which the given base "
            "doesn't have as a target: load the base that the adapter was trained on"
        )
    if wanted - stored:
        raise ValueError(
            f"{path} lacks the weights of {min(wanted - stored)} ({len(wanted - stored)} in all), which its config "
            "targets in the given base: load the base that the adapter was trained on, or save the adapter again"
        )
    shapes: dict[tuple, dict[str, tuple[int, ...]]] = {}
    for name, layer in layers.items():
        key = f"{prefix}.{name}"
        check_unmerged(model.get_submodule(name), key, "loading another")
        check_in_memory(model, name, layer)
        if any(parameter.is_meta for parameter in layer.parameters()):
            raise ValueError(
                f"{key} has no weight (meta device), and the outer factors come from it: load the base first"
            )
        check_layer(key, layer, config)
        m, n = oriented_weight(layer).shape
        ranks = config.layer_ranks(name, (m, n))
        if (kind := (ranks, m, n)) not in shapes:
            shapes[kind] = _trained_shapes(config, ranks, (m, n))
        wanted_shapes = shapes[kind]
        found = {entry: tuple(tensor.shape) for entry, tensor in inner.trained[key].items()}
        for entry in sorted(set(wanted_shapes) - set(found)):
            raise ValueError(f"{path} lacks the key {key}.{entry}: the file is damaged")
        if config.has_residual and key not in inner.starts:
            raise ValueError(f"{path} lacks the key {key}{_START_SUFFIX}: the file is damaged")
        if found != wanted_shapes:
            raise ValueError(
                f"{path} has {_listed(found)} for {key}, and its config asks for {_listed(wanted_shapes)}: the base "
                "or the file is another one"
            )
        if config.needs_statistics and inner.base_statistic is None:
            statistic = inner.statistics.get(key)
            if statistic is None:
                raise ValueError(
                    f"{path} lacks the AwSVD statistic of {key}: save the adapter again, or load a LoRA that "
                    "fold_nora made of it"
                )
            if tuple(statistic.shape) != (n,):
                raise ValueError(
                    f"{path} belongs to another base: {key} has {n} input channels in the given one and "
                    f"{statistic.shape[0]} in the file; load the base that the adapter was trained on"
                )
    return layers


def _listed(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return f"{', '.join(sorted(shapes))} of shapes {', '.join(str(shapes[entry]) for entry in sorted(shapes))}"


def _trained_shapes(config: NoraConfig, ranks: LayerRanks, shape: tuple[int, int]) -> dict[str, tuple[int, ...]]:
    """Entry -> shape of what a layer trains."""
    with torch.device("meta"):
        modules = trained_modules(config, ranks, shape)
    return {
        f"{FILE_NAMES[name]}.{entry}": tuple(tensor.shape)
        for name, module in modules.items()
        for entry, tensor in module.state_dict().items()
    }


def _prefix_of(key: str, configs: Mapping[str, NoraConfig]) -> str:
    """The longest prefix that the key starts with: "text_encoder_2.text_model" before "text_encoder_2"."""
    matching = [prefix for prefix in configs if key.startswith(f"{prefix}.")]
    return max(matching, key=len) if matching else ""


def _open(path: str | os.PathLike):
    if not Path(path).is_file():
        raise ValueError(f"{path} is not a file: pass the inner-only adapter that save_inner wrote")
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}): it may be cut off, copy it again"
        ) from error


def _configs(path: str | os.PathLike, header: Mapping[str, str]) -> dict[str, NoraConfig]:
    missing = [key for key in _HEADER_KEYS if key not in header]
    if missing:
        raise ValueError(
            f"{path} is not an inner-only NoRA file, its header lacks {', '.join(missing)}: a folded or LoRA file is "
            "loaded with load_lora_weights"
        )
    version = header["format_version"]
    if not version.isdecimal() or int(version) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version}, this code reads up to {FORMAT_VERSION}: update the code"
        )
    try:
        return {prefix: NoraConfig(**values) for prefix, values in json.loads(header["nora_config"]).items()}
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} has a nora_config that can't be read ({error}): save the adapter again") from error


def parse_inner(path: str | os.PathLike) -> InnerFile:
    """The file by module, whatever its version.

    Raises:
        ValueError: if it isn't such a file, or a damaged one.
    """
    with _open(path) as file:
        header = file.metadata() or {}
        configs = _configs(path, header)
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    fingerprints: dict[str, torch.Tensor] = {}
    if _LAYOUT in header:
        try:
            modules = unpack(tensors, json.loads(header[_LAYOUT]))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} has a layout that can't be read ({error}): the file is damaged") from error
        fingerprints = {key: entries.pop(_FINGERPRINT) for key, entries in modules.items() if _FINGERPRINT in entries}
        tensors = {f"{key}.{entry}": tensor for key, entries in modules.items() for entry, tensor in entries.items()}
    trained: dict[str, dict[str, torch.Tensor]] = {}
    starts: dict[str, torch.Tensor] = {}
    statistics: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        if (match := _TRAINED_KEY.fullmatch(key)) is not None:
            trained.setdefault(match[1], {})[f"{match[2]}.{match[3]}"] = tensor
        elif key.endswith(_STATS_SUFFIX):
            statistics[key.removesuffix(_STATS_SUFFIX)] = tensor
        elif key.endswith(_START_SUFFIX):
            starts[key.removesuffix(_START_SUFFIX)] = tensor
        else:
            raise ValueError(f"{path} has an unexpected key {key}: it was not written by save_inner")
    for key, entries in trained.items():
        for one, other in (("lora_A.weight", "lora_B.weight"), ("lora_B.weight", "lora_A.weight")):
            if one in entries and other not in entries:
                raise ValueError(f"{path} lacks the key {key}.{other}: the file is damaged")
    foreign = sorted(key for key in trained if not _prefix_of(key, configs))
    if foreign:
        raise ValueError(
            f"{path} has an unexpected key {foreign[0]}.{min(trained[foreign[0]])}: no config has that prefix"
        )
    try:
        fingerprints |= {k: torch.tensor(v) for k, v in json.loads(header["fingerprints"]).items()}
        aliases = dict(json.loads(header["awsvd_stats_aliases"]))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} has fingerprints that can't be read ({error}): save the adapter again") from error
    if odd := sorted(key for key, one in fingerprints.items() if tuple(one.shape) != FINGERPRINT_SHAPE):
        raise ValueError(f"{path} has a fingerprint of another shape for {odd[0]}: the file is damaged")
    unchecked = sorted(set(trained) - set(fingerprints))
    if unchecked:
        raise ValueError(f"{path} has no fingerprint for {unchecked[0]}, so its basis can't be checked: save it again")
    for key, owner in aliases.items():
        if owner not in statistics:
            raise ValueError(f"{path} lacks the key {owner}{_STATS_SUFFIX}, which {key} refers to: the file is damaged")
    statistics |= {key: statistics[owner] for key, owner in aliases.items()}
    return InnerFile(configs, trained, starts, statistics, fingerprints, header.get(_BASE_STATISTIC))
