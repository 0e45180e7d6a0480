"""What the frozen autoencoder and text encoders make of pictures and prompts, computed once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from dreambooth.buckets import nearest_bucket
from dreambooth.data import Crop, Example, content_hash, cover, crops
from dreambooth.draws import CROPS, generator_for
from dreambooth.encoded import EncodedPicture, EncodedPrompts
from dreambooth.encoded_cache import EncodedCache
from storage.decoding import MOST_PIXELS
from storage.pictures import open_image, open_mask

Tokens = Mapping[str, torch.Tensor]  # input_ids and attention_mask, each (P, tokens)
DEFAULT_VARIANTS = 4
PIXELS = 2  # raise it when `open_image` makes other pixels of a file: encodings of before are then made anew
# Of a model's configuration: what says nothing of what it computes.
_NOT_COMPUTED = ("transformers_version", "dtype", "torch_dtype", "architectures")
MASK_STRETCH = 0.02  # how much a mask's width / height may differ from its picture's: sides are whole pixels


@dataclass(frozen=True)
class CropSettings:
    """How pictures are cut into training samples."""

    buckets: Sequence[tuple[int, int]]  # height, width
    center_crop: bool = False
    random_flip: bool = False
    variants: int = DEFAULT_VARIANTS
    interpolation: str = "lanczos"
    alpha_mask: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Inspected:
    """A picture that was opened once and found sound; its pixels are read again when they are encoded."""

    example: Example
    digest: str  # of the file's bytes
    size: tuple[int, int]  # height, width, upright
    mask_digest: str | None = None  # of the mask file's bytes


@dataclass(frozen=True)
class Cut:
    """A picture and the crops of it to train on."""

    picture: Inspected
    crops: tuple[Crop, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of the crops, pixels."""
        return self.crops[0].height, self.crops[0].width


# --- pictures ---------------------------------------------------------------------------------------------------------


def inspect_picture(example: Example) -> Inspected:
    """Open a picture and its mask.

    Raises:
        ValueError: naming the one that can't be read.
    """
    data = example.read()
    image = open_image(data, example.name)
    mask_digest = None
    if example.mask is not None:
        mask, mask_digest = open_mask(example.mask), content_hash(example.mask.read_bytes())
        if abs(mask.width * image.height / (mask.height * image.width) - 1) > MASK_STRETCH:
            raise ValueError(
                f"mask {example.mask} is {mask.width} x {mask.height} and its picture {image.width} x {image.height}: "
                "give it the picture's shape"
            )
    return Inspected(example, content_hash(data), (image.height, image.width), mask_digest)


def check_masks(pictures: Sequence[Inspected], settings: CropSettings, held_out: Sequence[Inspected] = ()) -> None:
    """Refuse masks that leave nothing of a crop to train on, and transparency that is asked for and not there.

    Args:
        held_out: of which one crop each is measured.

    Raises:
        ValueError: naming the mask or the picture.
    """
    darkest = _darkest(pictures, settings)
    _darkest(held_out, replace(settings, variants=1))
    if settings.alpha_mask and darkest == 255:
        raise ValueError("--alpha_mask finds no picture that is transparent anywhere: leave it out")


def _darkest(pictures: Sequence[Inspected], settings: CropSettings) -> int:
    """The darkest pixel of the masks of all crops.

    Raises:
        ValueError: naming a mask that leaves nothing of a crop.
    """
    darkest = 255
    for picture in pictures:
        for crop in cut_picture(picture, settings).crops:
            mask = crop_mask(picture, crop, settings)
            low, high = (255, 255) if mask is None else mask.getextrema()
            darkest = min(darkest, low)
            if high == 0:
                name = picture.example.mask or picture.example.name
                raise ValueError(
                    f"{name} masks out all of the {crop.width} x {crop.height} pixels cut at {crop.left}, {crop.top}: "
                    "the loss would count nowhere; change the mask, or take the picture out"
                )
    return darkest


def cut_picture(picture: Inspected, settings: CropSettings, bucket: tuple[int, int] | None = None) -> Cut:
    """Choose a picture's crops: they depend on the seed and the picture alone.

    Args:
        bucket: (height, width) to cut for; None: the one whose shape is nearest.

    Raises:
        ValueError: for a picture so long and narrow that no memory holds it once its short side is large enough.
    """
    target = bucket or nearest_bucket(picture.size, settings.buckets)
    if math.prod(resized := cover(picture.size, target)) > MOST_PIXELS:
        (height, width), (new_height, new_width) = picture.size, resized
        raise ValueError(
            f"{picture.example.name} is {width} x {height}, which would be enlarged to {new_width} x {new_height}, and "
            f"up to {MOST_PIXELS / 1e6:.0f} megapixels are taken: cut it to a wider shape"
        )
    found = crops(
        picture.size,
        target,
        center_crop=settings.center_crop,
        random_flip=settings.random_flip,
        variants=settings.variants,
        generator=generator_for(settings.seed, CROPS, int(picture.digest[:8], 16)),
    )
    return Cut(picture, tuple(found))


class _CropPixels(Dataset):
    """Pixels of single crops, (3, H, W) in [-1, 1]; read in worker processes where there are any."""

    def __init__(self, wanted: Sequence[tuple[Cut, Crop]], interpolation: str) -> None:
        self.wanted, self.interpolation = wanted, interpolation

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, index: int) -> torch.Tensor:
        cut, crop = self.wanted[index]
        image = crop.of(open_image(cut.picture.example.read(), cut.picture.example.name), self.interpolation)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1


@torch.no_grad()
def encode_pictures(
    vae: AutoencoderKL,
    fingerprint: str,
    cuts: Sequence[Cut],
    prompts: Sequence[int],
    settings: CropSettings,
    cache: EncodedCache,
    *,
    process_index: int = 0,
    num_processes: int = 1,
    wait: Callable[[], None] = lambda: None,
    num_workers: int = 0,
    progress: Callable[[int], Iterator] = lambda total: range(total),
) -> list[EncodedPicture]:
    """Encode what the cache lacks, one crop at a time and in fp32, because SDXL's autoencoder overflows in fp16.

    Args:
        fingerprint: of the autoencoder's weights; part of every entry's key.
        prompts: row of each picture's prompt in the run's EncodedPrompts.
        process_index, num_processes, wait: processes share the work and then read each other's entries.
    """
    keys = {
        (cut.picture.digest, crop): content_hash(
            "picture", PIXELS, fingerprint, configuration(vae), cut.picture.digest, settings.interpolation, tuple(crop)
        )
        for cut in cuts
        for crop in cut.crops
    }
    wanted = {keys[cut.picture.digest, crop]: (cut, crop) for cut in cuts for crop in cut.crops}
    entries = {key: cache.read(key) for key in wanted}
    missing = [key for key, entry in entries.items() if entry is None]
    wait()  # all have looked before the first writes

    def encode(some: Sequence[str]) -> None:
        if not some:
            return
        vae.float().eval()
        pixels = DataLoader(
            _CropPixels([wanted[key] for key in some], settings.interpolation), batch_size=1, num_workers=num_workers
        )
        for _, key, crop_pixels in zip(progress(len(some)), some, pixels):  # the bar first: it sees its own end
            posterior = vae.encode(crop_pixels.to(vae.device)).latent_dist  # (1, 3, H, W) -> (1, 4, h, w)
            mean, std = scale_latents(vae, posterior.mean), posterior.std * vae.config.scaling_factor
            if not bool(torch.isfinite(mean).all()):
                raise ValueError(
                    f"the autoencoder makes NaN or infinity of {wanted[key][0].picture.example.name}: "
                    "name another one with --pretrained_vae_model_name_or_path"
                )
            latents_std = getattr(vae.config, "latents_std", None)
            if latents_std is not None:
                std = std / torch.tensor(latents_std, device=std.device).reshape(1, -1, 1, 1)
            entries[key] = {"mean": mean[0].cpu(), "std": std[0].cpu()}
            cache.write(key, entries[key])

    # Shares are of all entries: another run may fill the cache meanwhile, and each process then misses others. By key,
    # which is a hash, what is missing falls to all of them alike.
    encode([key for key in sorted(wanted)[process_index::num_processes] if entries[key] is None])
    wait()
    entries |= {key: cache.read(key) for key in missing if entries[key] is None}
    encode([key for key in missing if entries[key] is None])  # somebody cleared the cache
    encoded = []
    for cut, prompt in zip(cuts, prompts):
        variants = [entries[keys[cut.picture.digest, crop]] for crop in cut.crops]
        mean, std = (torch.stack([variant[name] for variant in variants]) for name in ("mean", "std"))
        masks = [latent_mask(cut, crop, settings, mean.shape[-2:]) for crop in cut.crops]
        encoded.append(
            EncodedPicture(
                mean,
                std,
                torch.stack([crop.time_ids(cut.picture.size) for crop in cut.crops]),
                prompt,
                cut.picture.example.repeats,
                None if masks[0] is None else torch.stack(masks),
            )
        )
    return encoded


def configuration(model: nn.Module) -> list[tuple[str, Any]]:
    """What a model computes beside its weights, for a hash: scaling factor, activations, which token is pooled."""
    config = model.config
    values = config if isinstance(config, Mapping) else config.to_dict()  # diffusers', transformers'
    return sorted((name, value) for name, value in values.items() if name[0] != "_" and name not in _NOT_COMPUTED)


def scale_latents(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents (B, 4, h, w) as the UNet sees them; some bases also shift them by a mean of each channel."""
    mean, std = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return latents * vae.config.scaling_factor
    mean, std = (torch.tensor(values, device=latents.device).reshape(1, -1, 1, 1) for values in (mean, std))
    return (latents - mean) * vae.config.scaling_factor / std


def crop_mask(picture: Inspected, crop: Crop, settings: CropSettings) -> Image.Image | None:
    """The mask file or the alpha channel, cut like the picture; None without either."""
    example, (height, width) = picture.example, picture.size
    if settings.alpha_mask:
        mask = open_image(example.read(), example.name, keep_alpha=True).getchannel("A")
    elif example.mask is not None:
        mask = open_mask(example.mask).resize((width, height), Image.Resampling.BOX)
    else:
        return None
    return crop.of(mask, "bilinear")


def latent_mask(cut: Cut, crop: Crop, settings: CropSettings, shape: torch.Size) -> torch.Tensor | None:
    """(1, h, w) from 0 to 1: the crop's mask averaged over each latent."""
    mask = crop_mask(cut.picture, crop, settings)
    if mask is None:
        return None
    return torch.from_numpy(np.array(mask.resize((shape[1], shape[0]), Image.Resampling.BOX))).float()[None] / 255


# --- prompts ----------------------------------------------------------------------------------------------------------


def check_prompts(tokenizer: CLIPTokenizer, prompts: Iterable[str]) -> None:
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
    text_encoders: Sequence[CLIPTextModel | CLIPTextModelWithProjection],
    tokens: Sequence[Tokens],
    rows: torch.Tensor | None = None,
    clip_skip: int = 0,
) -> EncodedPrompts:
    """Last but one hidden states of both encoders side by side, and the pooled projection of the second (SDXL, 2.1).

    Args:
        clip_skip: so many layers earlier, in both (as diffusers counts); the pooled projection stays.
        rows: (B,) which of the P prompts are wanted, each encoded once however often it is; None: all of them.
    """
    if rows is not None:
        unique, places = torch.unique(rows.cpu(), return_inverse=True)
        some = [{name: ids[unique] for name, ids in one.items()} for one in tokens]
        encoded = encode_prompts(text_encoders, some, clip_skip=clip_skip)
        return encoded.rows(places.to(encoded.prompt_embeds.device))
    states = []
    for text_encoder, encoded in zip(text_encoders, tokens):
        device = next(text_encoder.parameters()).device
        output = text_encoder(encoded["input_ids"].to(device), output_hidden_states=True)
        states.append(output.hidden_states[-2 - clip_skip])  # (P, tokens, d)
    return EncodedPrompts(torch.cat(states, dim=-1), output.text_embeds)


@torch.no_grad()
def encode_prompts_cached(
    text_encoders: Sequence[CLIPTextModel | CLIPTextModelWithProjection],
    fingerprint: str,
    tokens: Sequence[Tokens],
    cache: EncodedCache,
    *,
    clip_skip: int = 0,
    is_main_process: bool = True,
    wait: Callable[[], None] = lambda: None,
) -> EncodedPrompts:
    """`encode_prompts` of every prompt, read from the cache where it is there.

    Prompts are encoded one by one, so that an entry does not depend on the prompts that it was encoded beside.
    """
    count = len(tokens[0]["input_ids"])
    made_by = [fingerprint, *map(configuration, text_encoders)]
    made_by += [["clip_skip", clip_skip]] if clip_skip else []  # entries of before had none
    keys = [
        content_hash("prompt", *made_by, *(one["input_ids"][row].tolist() for one in tokens)) for row in range(count)
    ]
    device = next(text_encoders[0].parameters()).device

    def entry(row: int, key: str) -> dict[str, torch.Tensor]:
        found = cache.read(key)
        if found is None:
            some = [{"input_ids": part["input_ids"][row : row + 1]} for part in tokens]
            one = encode_prompts(text_encoders, some, clip_skip=clip_skip)
            found = {name: embeds[0].cpu() for name, embeds in one._asdict().items()}
            cache.write(key, found)
        return found

    if is_main_process:
        for row, key in enumerate(keys):
            entry(row, key)
    wait()
    # a process whose disk is not the main one's encodes them itself
    entries = [entry(row, key) for row, key in enumerate(keys)]
    return EncodedPrompts(*(torch.stack([one[name] for one in entries]).to(device) for name in EncodedPrompts._fields))
