"""What the frozen autoencoder and text encoders make of pictures and prompts, computed once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from .data import prepare_image

Tokens = Mapping[str, torch.Tensor]  # input_ids and attention_mask, each (P, tokens)


@dataclass(frozen=True)
class EncodedImages:
    """Scaled latents of N pictures, kept as distributions: a new sample is drawn from them at every step."""

    mean: torch.Tensor  # (N, variants, 4, h, w) fp32
    std: torch.Tensor  # (N, variants, 4, h, w) fp32
    time_ids: torch.Tensor  # (N, 6)

    @property
    def variants(self) -> int:
        """1, or 2 where each picture is also there mirrored."""
        return self.mean.shape[1]

    def __len__(self) -> int:
        return self.mean.shape[0]


class EncodedPrompts(NamedTuple):
    """SDXL's text conditioning of P prompts."""

    prompt_embeds: torch.Tensor  # (P, tokens, d1 + d2)
    pooled_prompt_embeds: torch.Tensor  # (P, d2)

    def each(self, count: int) -> EncodedPrompts:
        """Every prompt ``count`` times, in order: [a, a, b, b] for two prompts and a count of 2."""
        return EncodedPrompts(*(embeds.repeat_interleave(count, dim=0) for embeds in self))


@torch.no_grad()
def encode_images(
    vae: AutoencoderKL, pictures: Iterable[Image.Image], resolution: int, mirrored: bool
) -> EncodedImages:
    """Encode one picture at a time, in fp32: SDXL's autoencoder overflows in fp16.

    Args:
        pictures: upright RGB, of any size.
        resolution: side of the square that is cut out of each, pixels.
        mirrored: encode each picture's mirror image as a second variant.
    """
    vae = vae.float().eval()
    means, stds, time_ids = [], [], []
    for picture in pictures:
        image = prepare_image(picture, resolution)
        pixels = torch.stack([image.pixels, image.pixels.flip(-1)] if mirrored else [image.pixels])  # (V, 3, H, W)
        posterior = vae.encode(pixels.to(vae.device)).latent_dist
        means.append((posterior.mean * vae.config.scaling_factor).cpu())  # (V, 4, h, w)
        stds.append((posterior.std * vae.config.scaling_factor).cpu())
        time_ids.append(image.time_ids)
    return EncodedImages(torch.stack(means), torch.stack(stds), torch.stack(time_ids))


def check_prompts(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> None:
    """Refuse a prompt that is longer than what the text encoders read: its end would be lost without a word.

    Raises:
        ValueError: with the prompt, its length and the limit.
    """
    for prompt in prompts:
        length, limit = len(tokenizer(prompt).input_ids), tokenizer.model_max_length
        if length > limit:
            raise ValueError(f'the prompt "{prompt}" has {length} tokens and the base reads {limit}: shorten it')


def tokenize(tokenizers: Sequence[CLIPTokenizer], prompts: Sequence[str]) -> list[Tokens]:
    """Ids and masks of real tokens per tokenizer, each (P, tokens), padded or cut to what the text encoders read."""
    options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
    return [tokenizer(list(prompts), max_length=tokenizer.model_max_length, **options) for tokenizer in tokenizers]


def encode_prompts(
    text_encoders: Sequence[CLIPTextModel | CLIPTextModelWithProjection], tokens: Sequence[Tokens]
) -> EncodedPrompts:
    """Last but one hidden states of both encoders side by side, and the pooled projection of the second (SDXL, 2.1)."""
    states = []
    for text_encoder, encoded in zip(text_encoders, tokens):
        device = next(text_encoder.parameters()).device
        output = text_encoder(encoded["input_ids"].to(device), output_hidden_states=True)
        states.append(output.hidden_states[-2])  # (P, tokens, d)
    return EncodedPrompts(torch.cat(states, dim=-1), output.text_embeds)
