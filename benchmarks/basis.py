"""How long NoRA's frozen factors of a whole SDXL take before the first step: computed, and from the cache on disk.

    python -m benchmarks.basis --base full --outer_rank 128
    python -m benchmarks.basis --base full --exact

Weights are random, of the base's real shapes, one layer at a time, so that nothing is downloaded and 3 GB suffice.
"""

from __future__ import annotations

import inference  # noqa: F401 -- before the libraries, because it quietens what they print on import

# isort: split
import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn

from benchmarks.sdxl_shape import SHAPES, build_sdxl_shape
from methods.components import TARGETS
from nora import BasisCache, NoraConfig, use_basis_cache
from nora.basis import build_basis
from nora.parallel import in_parallel


def layer_shapes(base: str) -> list[tuple[int, int]]:
    """(out, in) of every adapted layer of the UNet and both text encoders."""
    with init_empty_weights():
        pipeline = build_sdxl_shape(base)
    return [
        (module.out_features, module.in_features)
        for component, targets in TARGETS.items()
        for name, module in getattr(pipeline, component).named_modules()
        if isinstance(module, nn.Linear) and name.endswith(tuple(targets))
    ]


def all_bases(layers: Sequence[nn.Linear], config: NoraConfig) -> float:
    """Seconds for the bases of all layers."""
    start = time.perf_counter()

    def build(layer: nn.Linear) -> int:
        ranks = config.layer_ranks("layer", (layer.out_features, layer.in_features))
        statistic = torch.ones(layer.in_features)
        return build_basis("layer", layer, config, ranks.outer_r, statistic).A.shape[0]

    in_parallel(build, layers)
    return time.perf_counter() - start


def measure(base: str, outer_rank: int, basis: str = "iterated") -> tuple[int, float, float, float]:
    """Layers, seconds for all of them, seconds from the cache on disk, and its GB."""
    config = NoraConfig(r=1, outer_r=outer_rank, target_modules=["x"], outer_init="awsvd", basis=basis)
    generator = torch.Generator().manual_seed(0)
    layers = []
    for m, n in layer_shapes(base):
        layer = nn.Linear(n, m, bias=False, dtype=torch.half)
        layer.weight.data = (torch.randn(m, n, generator=generator) / n**0.5).half()
        layers.append(layer.requires_grad_(False))
    with tempfile.TemporaryDirectory() as folder, use_basis_cache(BasisCache(Path(folder))):
        cold, cached = all_bases(layers, config), all_bases(layers, config)
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
    return len(layers), cold, cached, size / 1e9


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", choices=list(SHAPES), default="full")
    parser.add_argument("--outer_rank", type=int, default=128)
    parser.add_argument("--exact", action="store_true", help="The exact decomposition instead of subspace iteration.")
    args = parser.parse_args(argv)
    basis = "exact" if args.exact else "iterated"
    layers, cold, cached, size = measure(args.base, args.outer_rank, basis)
    print(f"{layers} layers, {torch.get_num_threads()} threads, {basis}: {cold:.1f} s, then {cached:.1f} s")
    print(f"cache on disk: {size:.2f} GB")


if __name__ == "__main__":
    main()
