"""From flags to what the loop needs: pictures found and inspected, then encoded with their prompts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from torch import nn
from tqdm.auto import tqdm

from dreambooth.buckets import read_buckets
from dreambooth.data import Concept, Example, content_hash, find_examples, read_concepts, source_flag
from dreambooth.draws import CLASS, INSTANCE, Batch
from dreambooth.encode import (
    DEFAULT_VARIANTS,
    CropSettings,
    EncodedPicture,
    EncodedPrompts,
    Inspected,
    Tokens,
    check_masks,
    check_prompts,
    cut_picture,
    encode_pictures,
    encode_prompts,
    encode_prompts_cached,
    inspect_picture,
    tokenize,
)
from dreambooth.encoded_cache import EncodedCache
from dreambooth.passes import GENERIC_PROMPTS
from dreambooth.prior import class_images, missing_seeds
from runs.record import module_fingerprint
from settings.training import TEXT_ENCODERS, TrainConfig
from storage.files import check_writable_target
from storage.pictures import find_images

ENCODED = "encoded"  # folder of the cache inside --output_dir
PROMPTS_AT_ONCE = 64  # a few hundred MB in SDXL's second text encoder


@dataclass(frozen=True)
class Pictures:
    """Everything that a run trains on, opened once and found sound."""

    concepts: list[Concept]
    instance: list[Inspected]
    classes: list[Inspected]  # those that are there; others may still have to be drawn
    held_out: list[Inspected]  # for the validation loss
    settings: CropSettings

    @property
    def instance_prompts(self) -> list[str]:
        """Of the subjects; two concepts may share one."""
        return list(dict.fromkeys(concept.instance_prompt for concept in self.concepts))

    def epoch_steps(self, config: TrainConfig, num_processes: int) -> int:
        """Optimiser steps in which every picture is seen once, repeats counted."""
        samples = sum(picture.example.repeats for picture in self.instance)
        per_step = config.train_batch_size * config.gradient_accumulation_steps * num_processes
        return math.ceil(samples / per_step)

    def hash(self) -> str:
        """Of all pictures, masks and prompts; a resumed run must have the same."""
        pictures = [*self.instance, *self.classes]
        return content_hash(
            [concept.class_prompt for concept in self.concepts],
            *((one.digest, one.mask_digest, one.example.prompt, one.example.repeats) for one in pictures),
        )

    def report(self, config: TrainConfig) -> str:
        """What would be trained on, for --dry_run."""
        shapes = Counter(cut_picture(picture, self.settings).shape for picture in self.instance)
        small = [one.example.name for one in self.instance if min(one.size) < min(min(s) for s in shapes)]
        captions = Counter(picture.example.prompt for picture in self.instance)
        steps = self.epoch_steps(config, 1)
        lines = [
            f"{len(self.instance)} instance pictures of {len(self.concepts)} subject(s), {len(captions)} prompt(s):",
            *(f"  {count} x {prompt}" for prompt, count in captions.most_common(10)),
            "shapes (height x width): " + ", ".join(f"{h}x{w}: {n}" for (h, w), n in sorted(shapes.items())),
            f"an epoch is {steps} steps on one process; the run is "
            + (f"{config.max_train_steps} steps" if config.max_train_steps else f"{config.num_train_epochs} epochs"),
        ]
        if small:
            lines.append(f"smaller than what is trained on, so they are enlarged: {', '.join(small)}")
        if config.token_abstraction not in " ".join(captions):
            lines.append(f"no prompt has {config.token_abstraction}: the subject has no word of its own")
        if config.with_prior_preservation and not config.prior_teacher:
            for concept in self.concepts:
                missing = missing_seeds(concept.class_data_dir, concept.class_prompt, config.num_class_images)
                lines.append(f"class images of {concept.class_prompt!r}: {len(missing)} have to be drawn")
        return "\n".join(lines)


@dataclass(frozen=True)
class Encoded:
    """What the frozen models made of pictures and prompts, once."""

    streams: dict[int, list[EncodedPicture]]  # INSTANCE and, with class images, CLASS
    held_out: list[EncodedPicture]
    prompts: EncodedPrompts  # by row
    unconditional: EncodedPrompts  # one row: the empty prompt, or SDXL's zeros
    class_rows: torch.Tensor  # (P,): the row of each row's class prompt
    tokens: list[Tokens]  # of the prompts, per text encoder, for encoding anew where these are trained
    calibration_tokens: list[Tokens]
    teaching: torch.Tensor  # (P,) bool: prompts that what is trained of the text encoders learns from
    encoders: str  # fingerprint of the autoencoder and the text encoders

    def teaches_text(self, batch: Batch, num_instances: int) -> bool:
        """Whether the text encoders must learn from a batch: one of its instance pictures has a prompt that teaches."""
        prompts = batch.prompts[:num_instances][~batch.uncaptioned[:num_instances]]
        return bool(self.teaching[prompts.cpu()].any())

    @property
    def largest_shape(self) -> tuple[int, int]:
        """(h, w) of the largest latents that are trained on."""
        return max((picture.shape for picture in self.streams[INSTANCE]), key=math.prod)

    @property
    def prompt_length(self) -> int:
        """Tokens of a prompt as the UNet gets it, padding counted."""
        return self.prompts.prompt_embeds.shape[1]


class PromptTable:
    """Rows of the prompts of a run: a prompt of two subjects has two, because their classes may differ."""

    def __init__(self, concepts: Sequence[Concept], pictures: Sequence[Inspected]) -> None:
        keys = [(picture.example.concept, picture.example.prompt) for picture in pictures]
        keys += [(number, one.class_prompt) for number, one in enumerate(concepts) if one.class_prompt]
        self.rows = {key: row for row, key in enumerate(dict.fromkeys(keys))}
        self.texts = [text for _, text in self.rows]
        self.class_rows = torch.tensor(
            [self.rows.get((concept, concepts[concept].class_prompt), row) for (concept, _), row in self.rows.items()]
        )

    def of(self, pictures: Sequence[Inspected]) -> list[int]:
        return [self.rows[picture.example.concept, picture.example.prompt] for picture in pictures]


def read_pictures(config: TrainConfig, granularity: int) -> Pictures:
    """Find, open and check every picture that is there.

    Args:
        granularity: pixels that the base needs a side to be a multiple of.

    Raises:
        ValueError: naming the flag, folder or file that is wrong.
    """
    concepts = read_concepts(config)
    check_folders(config, concepts)
    varies = config.random_flip or not config.center_crop
    settings = CropSettings(
        buckets=read_buckets(config.aspect_ratio_buckets, config.resolution, granularity),
        center_crop=config.center_crop,
        random_flip=config.random_flip,
        variants=config.cache_variants or (DEFAULT_VARIANTS if varies else 1),
        interpolation=config.image_interpolation_mode,
        alpha_mask=config.alpha_mask,
        seed=config.seed,
    )
    held_out = []
    if config.validation_data_dir is not None:
        paths = find_images(config.validation_data_dir, "validation_data_dir")
        held_out = [Example(path, str(path), concepts[0].instance_prompt) for path in paths]
    instance = [inspect_picture(example) for example in find_examples(config, concepts)]
    check_masks(instance, settings)
    prompts = {picture.example.prompt for picture in instance}
    if config.train_text_encoder_ti and not any(config.token_abstraction in prompt for prompt in prompts):
        raise ValueError(
            f"--token_abstraction {config.token_abstraction} is in no prompt, such as {min(prompts)!r}: its new tokens "
            "would learn nothing; write it into --instance_prompt or the captions"
        )
    return Pictures(
        concepts,
        instance,
        read_class_pictures(config, concepts),
        [inspect_picture(example) for example in held_out],
        settings,
    )


def check_folders(config: TrainConfig, concepts: Sequence[Concept]) -> None:
    """Refuse folders that would be written to while they hold something else.

    Raises:
        ValueError: naming the two flags.
    """
    if config.encoded_cache_dir is not None:
        check_writable_target(config.encoded_cache_dir, "--encoded_cache_dir", folder=True)
    taken = {Path(config.output_dir).resolve(): "output_dir"}
    for name in ("instance_data_dir", "class_data_dir"):  # subjects may share a folder of either kind, not mix them
        folders = {}
        for number, concept in enumerate(concepts):
            if path := getattr(concept, name):
                folders[Path(path).resolve()] = source_flag(config, number, name)
        for path in folders.keys() & taken.keys():
            raise ValueError(f"--{folders[path]} and --{taken[path]} are the same folder {path}: name another one")
        taken |= folders


def read_class_pictures(config: TrainConfig, concepts: Sequence[Concept]) -> list[Inspected]:
    """The class images that are there, at most as many as are wanted of each subject's class."""
    if not config.with_prior_preservation or config.prior_teacher:
        return []
    for concept in concepts:
        check_writable_target(concept.class_data_dir, "--class_data_dir", folder=True)
    return [
        inspect_picture(Example(path, str(path), concept.class_prompt, number))
        for number, concept in enumerate(concepts)
        for path in class_images(concept.class_data_dir, concept.class_prompt)[: config.num_class_images]
    ]


def encode_run(
    config: TrainConfig,
    accelerator: Accelerator,
    pipeline: StableDiffusionXLPipeline,
    pictures: Pictures,
    draw_class_images: Callable[[Concept, list[int]], None],
    spell_out: Callable[[str], str],
    lock: Callable[[Path], None] = lambda folder: None,
) -> tuple[Encoded, Pictures]:
    """Encode pictures and prompts, or read what an earlier run encoded; class images are drawn first.

    Args:
        draw_class_images: draws a subject's class images with the given seeds into its folder.
        spell_out: puts the tokens of a new word into a prompt.
        lock: makes the run's folder and holds it, once nothing more is to be refused.

    Returns:
        what was encoded, and the pictures with all class images.

    Raises:
        ValueError: for a prompt that is too long; nothing is written then.
    """
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
    prompts = PromptTable(pictures.concepts, [*pictures.instance, *pictures.held_out]).texts
    for tokenizer in tokenizers:
        check_prompts(tokenizer, map(spell_out, [*prompts, *config.validation_prompt]))
    if accelerator.is_main_process:
        lock(Path(config.output_dir))
    accelerator.wait_for_everyone()
    if config.with_prior_preservation and not config.prior_teacher:
        for concept in pictures.concepts:
            seeds = missing_seeds(concept.class_data_dir, concept.class_prompt, config.num_class_images)
            accelerator.wait_for_everyone()  # all have looked before the first writes
            draw_class_images(concept, seeds[accelerator.process_index :: accelerator.num_processes])
            accelerator.wait_for_everyone()
        pictures = replace(pictures, classes=read_class_pictures(config, pictures.concepts))
    cache = EncodedCache(config.encoded_cache_dir or Path(config.output_dir) / ENCODED)
    table = PromptTable(pictures.concepts, [*pictures.instance, *pictures.classes, *pictures.held_out])
    texts = [spell_out(text) for text in table.texts]
    text_encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    tokens = tokenize(tokenizers, texts)
    shared = {"cache": cache, "wait": accelerator.wait_for_everyone}
    fingerprint = "+".join(module_fingerprint(text_encoder) for text_encoder in text_encoders)
    prompts, unconditional = (
        encode_prompts_cached(text_encoders, fingerprint, some, is_main_process=accelerator.is_main_process, **shared)
        for some in (tokens, tokenize(tokenizers, [""]))
    )
    if pipeline.config.force_zeros_for_empty_prompt:  # SDXL's own way of saying nothing
        unconditional = EncodedPrompts(*map(torch.zeros_like, unconditional))

    vae_fingerprint = module_fingerprint(pipeline.vae)
    cuts = [cut_picture(picture, pictures.settings) for picture in pictures.instance]
    # A step's samples have one shape, so class images are there in every shape that instance pictures have.
    # They are many, so one crop each will do.
    class_cuts = [
        cut_picture(picture, replace(pictures.settings, variants=1), bucket=shape)
        for picture in pictures.classes
        for shape in dict.fromkeys(cut.shape for cut in cuts)
    ]
    held_out_cuts = [cut_picture(picture, replace(pictures.settings, variants=1)) for picture in pictures.held_out]

    def encode(some):
        return encode_pictures(
            pipeline.vae,
            vae_fingerprint,
            some,
            table.of([cut.picture for cut in some]),
            pictures.settings,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            num_workers=config.dataloader_num_workers,
            progress=lambda total: tqdm(
                range(total), desc="encoding", unit="picture", disable=not accelerator.is_main_process
            ),
            **shared,
        )

    streams = {INSTANCE: encode(cuts)}
    if class_cuts:
        streams[CLASS] = encode(class_cuts)
    encoded = Encoded(
        streams,
        encode(held_out_cuts) if held_out_cuts else streams[INSTANCE],
        prompts,
        unconditional,
        table.class_rows,
        tokens,
        tokenize(tokenizers, [*texts, *GENERIC_PROMPTS]),
        torch.tensor([not config.train_text_encoder_ti or config.token_abstraction in text for text in table.texts]),
        content_hash(vae_fingerprint, fingerprint),
    )
    return encoded, pictures


# --- inside the loop --------------------------------------------------------------------------------------------------


def with_class_prompts(batch: Batch, encoded: Encoded, prior_loss_weight: float) -> Batch:
    """The batch, and the same pictures and noise once more with their class's prompt."""
    rows = encoded.class_rows.to(batch.prompts.device)[batch.prompts]
    again = batch._replace(
        prompts=rows,
        weight=torch.full_like(batch.weight, prior_loss_weight),
        uncaptioned=torch.zeros_like(batch.uncaptioned),
    )
    return Batch(*(torch.cat(pair) for pair in zip(batch, again)))


def embed_prompts(
    config: TrainConfig,
    models: Mapping[str, nn.Module],
    encoded: Encoded,
    batch: Batch,
    settled: EncodedPrompts | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt embeddings (B, tokens, d) and pooled ones (B, d2) of the batch's prompts.

    Args:
        settled: all prompts as text encoders make them that learned, and no longer do.
    """
    if config.trains_text and settled is None:
        prompts = encode_prompts([models[name] for name in TEXT_ENCODERS], encoded.tokens, batch.prompts)
    else:
        prompts = (settled or encoded.prompts).rows(batch.prompts)
    nothing = batch.uncaptioned
    prompt_embeds, pooled = prompts
    if nothing.any():
        prompt_embeds = torch.where(nothing[:, None, None], encoded.unconditional.prompt_embeds, prompt_embeds)
        pooled = torch.where(nothing[:, None], encoded.unconditional.pooled_prompt_embeds, pooled)
    return prompt_embeds, pooled


@torch.no_grad()
def current_prompts(config: TrainConfig, models: Mapping[str, nn.Module], encoded: Encoded) -> EncodedPrompts:
    """All prompts of the run as the text encoders make them now, without dropout."""
    if not config.trains_text:
        return encoded.prompts
    text_encoders = [models[name] for name in TEXT_ENCODERS]
    training = [model.training for model in text_encoders]
    for model in text_encoders:
        model.eval()
    rows = torch.arange(len(encoded.prompts.prompt_embeds), device=encoded.prompts.prompt_embeds.device)
    parts = [encode_prompts(text_encoders, encoded.tokens, some) for some in rows.split(PROMPTS_AT_ONCE)]
    for model, was in zip(text_encoders, training):
        model.train(was)
    return EncodedPrompts(*map(torch.cat, zip(*parts)))
