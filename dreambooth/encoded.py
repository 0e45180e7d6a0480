"""Encoded pictures and prompts: what `dreambooth.encode` makes and `dreambooth.draws` samples from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class EncodedPicture:
    """Scaled latents of one picture's V crops, kept as distributions: a new sample is drawn from them at every step."""

    mean: torch.Tensor  # (V, 4, h, w) fp32
    std: torch.Tensor  # (V, 4, h, w) fp32
    time_ids: torch.Tensor  # (V, 6)
    prompt: int  # row of the prompt in EncodedPrompts
    repeats: int = 1
    mask: torch.Tensor | None = None  # (V, 1, h, w), from 0 to 1: where the loss counts

    @property
    def shape(self) -> tuple[int, int]:
        """(h, w) of the latents."""
        return tuple(self.mean.shape[-2:])


class EncodedPrompts(NamedTuple):
    """SDXL's text conditioning of P prompts."""

    prompt_embeds: torch.Tensor  # (P, tokens, d1 + d2)
    pooled_prompt_embeds: torch.Tensor  # (P, d2)

    def rows(self, rows: torch.Tensor) -> EncodedPrompts:
        """The given prompts, one for each sample of a batch."""
        return EncodedPrompts(*(embeds[rows] for embeds in self))
