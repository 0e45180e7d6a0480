"""What a trained matrix is made of: its own numbers ("dense"), or coefficients over random bases ("nola").

NOLA (arXiv 2310.02556): ``M = c M₀ + Σ_i α_i M_i`` with frozen random M₀, M_i, of which α alone is trained. Bases and
offset are regenerated from a seed and never stored. Deviations from its authors' code, each for a reason: the offset
comes from the seed too, because there it comes from the global generator and a file of coefficients can't restore
it; the stream is NumPy's legacy one, frozen across machines, not the device's; no generator but a local one is touched,
because reseeding the global one inside a forward pass alters every other draw; all layers of one shape share their
bases; and the bases have the 1/√k of the training code, which the README's example leaves out.
"""

from __future__ import annotations

import hashlib
import math
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

GENERATORS = ("dense", "nola")


class Bases(nn.Module):
    """Offset (size,) and bases (k, size), float32; a module only so that it can be referred to weakly."""

    def __init__(self, offset: torch.Tensor, bases: torch.Tensor) -> None:
        super().__init__()
        self.offset, self.bases = offset, bases


# One for each (name, rows, columns, k, seed, device) that a layer uses.
_shared: WeakValueDictionary[tuple, Bases] = WeakValueDictionary()


def shared_bases(name: str, shape: tuple[int, int], count: int, seed: int, device: torch.device) -> Bases:
    """The bases of all matrices of one name and shape: offset U(-1, 1), then ``count`` bases U(-1, 1) / √count.

    k rows columns 4 bytes in memory: 512 coefficients of an (8, 1280) factor take 21 MB, once for all its layers.
    """
    key = (name, shape, count, seed, str(device))
    found = _shared.get(key)
    if found is None:
        digest = hashlib.blake2b(f"{seed}:{name}:{shape[0]}x{shape[1]}:{count}".encode(), digest_size=4).digest()
        draws = np.random.RandomState(int.from_bytes(digest, "little"))
        size = shape[0] * shape[1]
        offset = torch.from_numpy(draws.uniform(-1, 1, size)).float()
        bases = torch.empty(count, size)
        for i in range(count):  # one at a time: NumPy draws in float64
            bases[i] = torch.from_numpy(draws.uniform(-1, 1, size) / math.sqrt(count))
        _shared[key] = found = Bases(offset.to(device), bases.to(device))
    return found


class Generated(nn.Module):
    """A linear layer whose weight (out, in) is ``c M₀ + Σ_i α_i M_i``; c is `offset_scale`, α `coefficients` (k,).

    Args:
        name: of the matrix in its cell: two of one shape have different bases.
        seed: of the bases.
    """

    offset_scale: torch.Tensor

    def __init__(self, name: str, in_features: int, out_features: int, count: int, seed: int) -> None:
        super().__init__()
        self.name, self.in_features, self.out_features, self.seed = name, in_features, out_features, seed
        self.coefficients = nn.Parameter(torch.zeros(count))
        self.register_buffer("offset_scale", torch.zeros(()))
        self.__dict__["_bases"] = None  # fetched on the device where the layer goes

    def _fetch(self) -> None:
        device = self.coefficients.device
        shape, count = (self.out_features, self.in_features), len(self.coefficients)
        found = None if device.type == "meta" else shared_bases(self.name, shape, count, self.seed, device)
        # no buffer: DDP would broadcast it in every pass, and each layer's would be moved by itself
        self.__dict__["_bases"] = found

    def _apply(self, fn, recurse=True):
        scale = self.offset_scale
        super()._apply(fn, recurse)
        if not scale.is_meta:
            self.offset_scale = scale.to(self.offset_scale.device)  # exact, whatever the model is cast to
        self._fetch()
        return self

    def __deepcopy__(self, memo):
        copied = Generated(self.name, self.in_features, self.out_features, len(self.coefficients), self.seed)
        copied.coefficients = nn.Parameter(self.coefficients.detach().clone(), self.coefficients.requires_grad)
        copied.offset_scale = self.offset_scale.clone()
        copied.train(self.training)
        copied._fetch()
        return copied

    def __getstate__(self):
        return {name: value for name, value in self.__dict__.items() if name != "_bases"}

    def __setstate__(self, state):
        super().__setstate__(state)
        self._fetch()

    @property
    def weight(self) -> torch.Tensor:
        """(out, in), in float32 or the coefficients' wider dtype."""
        coefficients = self.coefficients
        wide = torch.promote_types(coefficients.dtype, torch.float32)
        if self._bases is None:
            self._fetch()
        with torch.autocast(coefficients.device.type, enabled=False):
            offset, bases = self._bases.offset.to(wide), self._bases.bases.to(wide)
            flat = torch.addmv(offset * self.offset_scale, bases.T, coefficients.to(wide))
        return flat.view(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def trained_module(name: str, shape: tuple[int, int], generator: str, count: int, seed: int) -> nn.Module:
    """A linear layer (without bias) with a weight of this shape (out, in), whose parameters are what is trained."""
    if generator == "dense":
        return nn.Linear(shape[1], shape[0], bias=False)
    return Generated(name, shape[1], shape[0], count, seed)


def module_dtype(module: nn.Module) -> torch.dtype:
    """Of what is trained."""
    return next(module.parameters()).dtype
