"""AwSVD's statistic of a base alone, measured once: every subject's run on it, and every file, has the same.

Kept beside the outer factors in the user's cache (see `basis_cache`), 1.6 MB for SDXL.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from methods.adapter import without_adapters
from methods.basis_cache import configured_cache
from nora import NoraConfig, measure_statistics
from nora.functional import canonical_statistic
from storage.tensors import hash_tensors, write_safetensors

SAMPLES = 256
Result = TypeVar("Result")


def base_statistic(
    model: nn.Module, config: NoraConfig, label: str, identity: str, run_model: Callable[[], None]
) -> dict[str, torch.Tensor]:
    """Module name -> statistic (n,) in `canonical_statistic`'s form, from the cache or measured now.

    Args:
        model: adapters that are on it are off while it is measured.
        label: names the passes that ``run_model`` makes.
        identity: of what the passes depend on beside the model, such as the text encoders before a UNet.
    """
    cache = configured_cache()
    names = (label, identity, config.awsvd_stat, str(sorted(config.target_modules or ())))
    path = cache and Path(cache.folder) / f"statistic-{base_identity(model, *names)}.safetensors"
    if path:
        with contextlib.suppress(OSError, SafetensorError):
            return load_file(path)
    with base_in_float32(model):
        measured = measure_statistics(model, config, run_model)
    statistic = {name: canonical_statistic(one) for name, one in measured.items()}
    if path:
        with contextlib.suppress(OSError):  # a full disk must not stop who has it
            write_safetensors(path, statistic)
    return statistic


@contextmanager
def base_in_float32(model: nn.Module) -> Iterator[None]:
    """Inside, the model without its adapters computes in float32, a module's half-precision weights at a time.

    So the same base is measured alike on every device: in half precision the bases of files would not be found again.
    """
    training, kept = model.training, {}

    def widen(module: nn.Module, _: object) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.dtype in (torch.float16, torch.bfloat16):
                kept[parameter] = parameter.data
                parameter.data = parameter.data.float()

    def restore(module: nn.Module, *_: object) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter in kept:
                parameter.data = kept.pop(parameter)

    model.eval()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    handles = [module.register_forward_pre_hook(widen) for module in model.modules()]
    handles += [module.register_forward_hook(restore, always_call=True) for module in model.modules()]
    try:
        off = torch.autocast(next(model.parameters()).device.type, enabled=False)
        with without_adapters(model), torch.backends.cudnn.flags(allow_tf32=False), off:
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32
        for handle in handles:
            handle.remove()
        model.train(training)


def from_first_process(make: Callable[[], Result]) -> Result:
    """What the first process makes, in all of them, to the bit; every process calls it.

    Raises:
        Exception: in all of them, what was raised in the first.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return make()
    made: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            made[0] = make()
        except Exception as error:
            made[1] = error
    dist.broadcast_object_list(made)
    if made[1] is not None:
        raise made[1]
    return cast(Result, made[0])


def base_identity(model: nn.Module, *more: str) -> str:
    """Hash of at most SAMPLES entries, evenly spread, of each of the base's parameters, and of ``more``.

    Thousands of times faster than a hash of all, and enough for a cache: bases that differ, whether trained or merged,
    differ in nearly every entry. Adapters on the model make no difference.
    """
    digest = hashlib.sha256(repr(more).encode())
    samples = ((name, p.detach().flatten()[:: max(1, p.numel() // SAMPLES)]) for name, p in _base_parameters(model))
    return hash_tensors(digest, samples)


def _base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    adapters = {
        parameter
        for layer in model.modules()
        if isinstance(layer, BaseTunerLayer)
        for name, parameter in layer.named_parameters()
        if not name.startswith("base_layer.")
    }
    for name, parameter in model.named_parameters():
        if parameter not in adapters:
            yield name.replace(".base_layer.", "."), parameter
