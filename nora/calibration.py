"""Per-channel activation statistics for AwSVD, gathered before injection as PEFT's ``preprocess_corda`` does."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn

from .basis import attach_statistic, oriented_weight
from .config import NoraConfig
from .functional import where_float64_is
from .layer import check_unmerged
from .model import check_targets, find_targets

_token_mask: ContextVar[torch.Tensor | None] = ContextVar("token_mask", default=None)


@contextmanager
def calibration_mask(mask: torch.Tensor | None) -> Iterator[None]:
    """Inside, calibration counts only the tokens where ``mask`` (batch, tokens) is true or non-zero.

    For text encoders, whose padding would otherwise outvote the prompt::

        def run_model():
            for batch in prompts:
                with calibration_mask(batch.attention_mask):
                    text_encoder(batch.input_ids)

    Every target that fires inside must see (batch, tokens, n) inputs, or (batch, n), which have no padding. None counts
    every token.
    """
    token = _token_mask.set(mask)
    try:
        yield
    finally:
        _token_mask.reset(token)


def preprocess_nora(
    model: nn.Module,
    config: NoraConfig,
    run_model: Callable[[], object] | None = None,
    *,
    stats: Mapping[str, torch.Tensor] | None = None,
    hooked_model: nn.Module | None = None,
) -> dict[str, torch.Tensor]:
    """Measure what AwSVD's S is made of (NoRA Eq. 3) at every targeted module, for the injection that follows.

    ``mean |x_j|`` (awsvd_stat="mean_abs") or ``√mean x_j²`` ("rms") over every token of every forward pass, summed in
    float64. An input that several modules share (to_q, to_k, to_v) is measured once. Under ``torch.distributed`` the
    sums of all processes are added, so all get the same statistic.

    The result stays with the modules, out of their state dict and out of the config: `get_peft_model` and
    ``model.add_adapter`` find it there.

    Args:
        model: the model that will be adapted; put it in eval mode yourself.
        config: says which modules, and which statistic.
        run_model: runs the forward passes; gradients are off while it does. See `calibration_mask` for padding.
        stats: statistics from before, module name -> (n,), instead of running anything.
        hooked_model: the model that ``run_model`` calls, if it isn't ``model`` itself but a copy with the same names.

    Returns:
        module name -> statistic (n,), float32 or as given in float16; empty if the config needs none (svd, random,
        awsvd_stat="weight").

    Raises:
        ValueError: if a targeted module never fires, is missing from ``stats`` or has another width there, if the ranks
            don't fit a module, if neither or both of ``run_model`` and ``stats`` are given, if the config was injected
            before without calibration, or if adapters are merged into a targeted module.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if config.outer_init_was_chosen and config.outer_init == "svd":
        raise ValueError(
            'outer_init was None and became "svd" when this config was injected into a model that was not calibrated, '
            "so calibrating now would do nothing: make a new config"
        )
    config.saved = False  # whatever file the config came from, this starts afresh
    if not config.needs_statistics:
        return {}
    if (run_model is None) == (stats is None):
        given = "neither" if stats is None else "both"
        raise ValueError(f"preprocess_nora got {given} of run_model and stats: pass one of them")
    check_targets(model, config)
    targets = find_targets(model, config)
    for name in targets:
        check_unmerged(model.get_submodule(name), name, "calibrating")
    if run_model is not None:
        sums = _sum_channels(targets, model if hooked_model is None else hooked_model, config.awsvd_stat, run_model)
        sums.reduce({name: oriented_weight(layer).shape[1] for name, layer in targets.items()})
        measured = sums.means(targets)
    elif stats is not None:
        measured = _checked(stats, targets)
    for name, layer in targets.items():
        attach_statistic(layer, config.awsvd_stat, measured[name])
    return measured


def measure_statistics(
    model: nn.Module, config: NoraConfig, run_model: Callable[[], object]
) -> dict[str, torch.Tensor]:
    """The statistics alone, by this process alone: nothing is attached to the model, nothing added over processes.

    Args and errors are those of `preprocess_nora`; adapters that are on the model are measured with it.
    """
    targets = find_targets(model, config)
    return _sum_channels(targets, model, config.awsvd_stat, run_model).means(targets)


class _ChannelSums:
    """Running sums over tokens of |x| or x² per input channel, one set per module, each distinct input summed once."""

    def __init__(self, squared: bool) -> None:
        self.squared = squared
        self.sums: dict[str, torch.Tensor] = {}  # module name -> (n,) float64
        self.counts: dict[str, int] = {}  # module name -> tokens
        # id -> (input, its version, its mask, sum, tokens), gone as soon as the model drops the tensor
        self._recent: dict[int, tuple] = {}

    def hook(self, name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["input" if "input" in kwargs else "x"]
        total, count = self._input_sum(name, x.detach(), x)
        self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + count

    def _input_sum(self, name: str, values: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, int]:
        mask, key = _token_mask.get(), id(x)
        if key in self._recent:
            seen, version, seen_mask, total, count = self._recent[key]
            if seen() is x and version == x._version and seen_mask is mask:
                return total, count
        if mask is not None and values.shape[:-1] != mask.shape[:1]:
            if mask.shape != values.shape[:-1]:
                raise ValueError(
                    f"calibration_mask has shape {tuple(mask.shape)} but the input of {name} is {tuple(values.shape)}: "
                    "the mask must be (batch, tokens) of that input, or leave that module out of target_modules"
                )
            values = values[mask.to(values.device).bool()]
        tokens = values.reshape(-1, values.shape[-1])  # (tokens, n)
        tokens = tokens.float()  # half precision would overflow in x²
        tokens = tokens.square() if self.squared else tokens.abs()
        total, count = where_float64_is(tokens).sum(dim=0, dtype=torch.float64), tokens.shape[0]
        self._recent[key] = (weakref.ref(x, lambda _: self._recent.pop(key, None)), x._version, mask, total, count)
        return total, count

    def reduce(self, widths: dict[str, int]) -> None:
        """Add up over processes. Sums add exactly, so one all_reduce does it."""
        if not (dist.is_available() and dist.is_initialized()):
            return
        device = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
        flat = [self.sums.get(name, torch.zeros(n)).double().to(device) for name, n in widths.items()]
        counts = torch.tensor([self.counts.get(name, 0) for name in widths], dtype=torch.float64, device=device)
        packed = torch.cat([*flat, counts])
        dist.all_reduce(packed)
        *flat, counts = packed.cpu().split([*widths.values(), len(widths)])
        self.sums = dict(zip(widths, flat))
        self.counts = {name: int(count) for name, count in zip(widths, counts)}

    def means(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Module name -> statistic (n,) float32.

        Raises:
            ValueError: if a module saw no input, or numbers that are not finite.
        """
        silent = [name for name in names if not self.counts.get(name)]
        if silent:
            raise ValueError(
                f"{len(silent)} of {len(names)} targeted modules saw no input in calibration: {', '.join(silent[:5])}: "
                "make run_model reach them, or leave them out of target_modules"
            )
        measured = {}
        for name in names:
            mean = self.sums[name].cpu() / self.counts[name]
            measured[name] = (mean.sqrt() if self.squared else mean).float()
            if not bool(torch.isfinite(measured[name]).all()):
                raise ValueError(f"{name} saw NaN or infinity in calibration: check the base's dtype and the inputs")
        return measured


def _sum_channels(
    targets: dict[str, nn.Module], hooked_model: nn.Module, kind: str, run_model: Callable[[], object]
) -> _ChannelSums:
    sums = _ChannelSums(squared=kind == "rms")
    handles = []
    try:
        for name in targets:
            module = hooked_model.get_submodule(name)

            def hook(module, args, kwargs, name=name):
                sums.hook(name, module, args, kwargs)

            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        with torch.no_grad():
            run_model()
    finally:
        for handle in handles:
            handle.remove()
    return sums


def _checked(stats: Mapping[str, torch.Tensor], targets: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    measured = {}
    for name, layer in targets.items():
        if name not in stats:
            raise ValueError(f"stats has no entry for the targeted module {name}: calibrate with the same config")
        n = oriented_weight(layer).shape[1]
        if tuple(stats[name].shape) != (n,):
            raise ValueError(
                f"stats has shape {tuple(stats[name].shape)} for {name}, which has {n} input channels: these "
                "statistics belong to another model"
            )
        given = stats[name].detach().cpu()
        # in float16 it is canonical: normalising it twice could round some channels the other way
        measured[name] = given if given.dtype == torch.float16 else given.float()
    return measured
