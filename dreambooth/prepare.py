"""From flags to what the loop needs: pictures found and inspected, then encoded with their prompts."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from tqdm.auto import tqdm

from dreambooth.buckets import read_buckets
from dreambooth.data import Concept, Example, content_hash, find_examples, held_out_examples, read_concepts, source_flag
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
    configuration,
    cut_picture,
    encode_pictures,
    encode_prompts_cached,
    inspect_picture,
    tokenize,
)
from dreambooth.encoded_cache import EncodedCache
from dreambooth.passes import GENERIC_PROMPTS
from dreambooth.prior import class_images, missing_seeds
from methods.base_passes import GenericPrompts, encode_generic_prompts
from settings.learning import LoopOptions
from settings.pictures import DataOptions, PriorOptions
from settings.training import is_first_process
from storage.files import check_writable_target
from storage.tensors import module_fingerprint
from storage.text import counted, has_word, spell

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

    def epoch_steps(self, samples_per_step: int) -> int:
        """Optimiser steps in which every picture is seen once, repeats counted."""
        return math.ceil(sum(picture.example.repeats for picture in self.instance) / samples_per_step)

    def hash(self) -> str:
        """Of all pictures, masks and prompts; a resumed run must have the same."""
        pictures = [*self.instance, *self.classes]
        return content_hash(
            [concept.class_prompt for concept in self.concepts],
            *((one.digest, one.mask_digest, one.example.prompt, one.example.repeats) for one in pictures),
        )

    def report(self, loop: LoopOptions, prior: PriorOptions, word: str) -> str:
        """What would be trained on, for --dry_run.

        Args:
            word: that stands for the subject, such as "[V]".
        """
        shapes = Counter(cut_picture(picture, self.settings).shape for picture in self.instance)
        small = [one.example.name for one in self.instance if min(one.size) < min(min(s) for s in shapes)]
        captions = Counter(picture.example.prompt for picture in self.instance)
        steps = self.epoch_steps(loop.samples_per_step(1))
        lines = [
            f"{counted(len(self.instance), 'instance picture')} of {counted(len(self.concepts), 'subject')}, "
            f"{counted(len(captions), 'prompt')}:",
            *(f"  {count} x {prompt}" for prompt, count in captions.most_common(10)),
            "shapes (height x width): " + ", ".join(f"{h}x{w}: {n}" for (h, w), n in sorted(shapes.items())),
            f"an epoch is {counted(steps, 'step')} on one process; the run is "
            + (
                counted(loop.max_train_steps, "step")
                if loop.max_train_steps
                else counted(loop.num_train_epochs, "epoch")
            ),
        ]
        if small:
            lines.append(f"smaller than what is trained on, so they are enlarged: {', '.join(small)}")
        if not self._names_subject(captions, word):
            lines.append(f"no prompt has {word} or a word that the class's has not: the subject has no word of its own")
        if prior.draws_class_images:
            for concept in self.concepts:
                missing = missing_seeds(concept.class_data_dir, concept.class_prompt, prior.num_class_images)
                lines.append(f"class images of {concept.class_prompt!r}: {len(missing)} have to be drawn")
        return "\n".join(lines)

    def _names_subject(self, prompts: Iterable[str], word: str) -> bool:
        """Whether prompts may have a word for the subject alone; any may be one, such as sks, that no class's has."""
        classes = {one for concept in self.concepts for one in (concept.class_prompt or "").lower().split()}
        used = " ".join(prompts)
        return not classes or has_word(used, word) or bool(set(used.lower().split()) - classes)


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
    generic: GenericPrompts | None  # where something is measured of the base alone
    teaching: torch.Tensor  # (P,) bool: prompts that what is trained of the text encoders learns from
    encoders: str  # fingerprint of the autoencoder and the text encoders
    clip_skip: int = 0  # layers that prompts skip, the empty one apart

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


def read_pictures(
    data: DataOptions,
    prior: PriorOptions,
    granularity: int,
    *,
    seed: int = 0,
    cache_dir: str | None = None,
    held_out_dir: str | None = None,
    new_word: str | None = None,
) -> Pictures:
    """Find, open and check every picture that is there.

    Args:
        granularity: pixels that the base needs a side to be a multiple of; ``data.resolution`` is known.
        seed: of the crops.
        cache_dir: where a dataset of the Hub is kept.
        held_out_dir: pictures for the validation loss.
        new_word: what new tokens will stand for; a prompt must have it.

    Raises:
        ValueError: naming the flag, folder or file that is wrong.
    """
    concepts = read_concepts(data, prior)
    settings = CropSettings(
        buckets=read_buckets(data.aspect_ratio_buckets, data.resolution, granularity),
        center_crop=data.center_crop,
        random_flip=data.random_flip,
        variants=data.cache_variants or (DEFAULT_VARIANTS if data.varies else 1),
        interpolation=data.image_interpolation_mode,
        alpha_mask=data.alpha_mask,
        seed=seed,
    )
    examples, held_out = find_examples(data, cache_dir, concepts), []
    if held_out_dir is not None:
        masks = {"caption_column": data.caption_column, "mask_data_dir": data.mask_data_dir}
        held_out = held_out_examples(held_out_dir, concepts[0].instance_prompt, trained=examples, **masks)
        if data.mask_data_dir and not any(example.mask for example in held_out) and is_first_process():
            print(
                f"warning: --mask_data_dir has no mask of a picture of --validation_data_dir {held_out_dir}: the "
                "validation loss counts everywhere",
                file=sys.stderr,
            )
    instance = [inspect_picture(example) for example in examples]
    held_out = [inspect_picture(example) for example in held_out]
    check_masks(instance, settings, held_out)
    prompts = {picture.example.prompt for picture in instance}
    if new_word is not None and not any(has_word(prompt, new_word) for prompt in prompts):
        raise ValueError(
            f"--token_abstraction {new_word} is in no prompt, such as {min(prompts)!r}: its new tokens would learn "
            "nothing; write it into --instance_prompt or the captions"
        )
    classes = read_class_pictures(prior, concepts)
    return Pictures(concepts, instance, classes, held_out, settings)


def check_folders(output_dir: str, data: DataOptions, prior: PriorOptions, held_out_dir: str | None = None) -> None:
    """Refuse folders that would be written to while they hold something else.

    Args:
        held_out_dir: pictures for the validation loss.

    Raises:
        ValueError: naming the two flags.
    """
    if data.encoded_cache_dir is not None:
        check_writable_target(data.encoded_cache_dir, "--encoded_cache_dir", folder=True)
    taken = {Path(output_dir).resolve(): "output_dir"}
    concepts = read_concepts(data, prior)
    for name in ("instance_data_dir", "class_data_dir"):  # subjects may share a folder of either kind, not mix them
        folders = {}
        for number, concept in enumerate(concepts):
            if path := getattr(concept, name):
                folders[Path(path).resolve()] = source_flag(data.concepts_list, number, name)
        for path in folders.keys() & taken.keys():
            raise ValueError(f"--{folders[path]} and --{taken[path]} are the same folder {path}: name another one")
        taken |= folders
    only_read = {"mask_data_dir": data.mask_data_dir, "validation_data_dir": held_out_dir}
    written = {path: name for path, name in taken.items() if "instance_data_dir" not in name}
    for name, folder in only_read.items():
        if folder is not None and (path := Path(folder).resolve()) in written:
            raise ValueError(f"--{name} and --{written[path]} are the same folder {path}: name another one")


def read_class_pictures(prior: PriorOptions, concepts: Sequence[Concept]) -> list[Inspected]:
    """The class images that are there, at most as many as are wanted of each subject's class."""
    if not prior.draws_class_images:
        return []
    for concept in concepts:
        check_writable_target(concept.class_data_dir, "--class_data_dir", folder=True)
    return [
        inspect_picture(Example(path, str(path), concept.class_prompt, number))
        for number, concept in enumerate(concepts)
        for path in class_images(concept.class_data_dir, concept.class_prompt)[: prior.num_class_images]
    ]


def check_prompt_lengths(
    pipeline: StableDiffusionXLPipeline, pictures: Pictures, others: Sequence[str], words: Mapping[str, str]
) -> None:
    """Refuse a prompt that is longer than the text encoders read.

    Args:
        others: prompts that are drawn, not trained on.
        words: new words -> the tokens that they stand for.
    """
    prompts = PromptTable(pictures.concepts, [*pictures.instance, *pictures.held_out]).texts
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2):
        check_prompts(tokenizer, (spell(prompt, words) for prompt in [*prompts, *others]))


def encode_run(
    pipeline: StableDiffusionXLPipeline,
    pictures: Pictures,
    accelerator: Accelerator,
    *,
    cache_dir: Path,
    clip_skip: int = 0,
    num_workers: int = 0,
    words: Mapping[str, str] | None = None,
    measures_base: bool = False,
) -> Encoded:
    """Encode pictures and prompts, or read what an earlier run encoded.

    Args:
        pictures: with all class images.
        cache_dir: where the encodings are kept.
        clip_skip: layers that prompts skip, as for `dreambooth.encode.encode_prompts`; the empty one skips none.
        words: new words -> the tokens that they stand for; only prompts with one teach the text encoders then.
        measures_base: the method measures something of the base alone, see `methods.base_passes`.
    """
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2]
    table = PromptTable(pictures.concepts, [*pictures.instance, *pictures.classes, *pictures.held_out])
    texts = [spell(text, words or {}) for text in table.texts]
    # what is measured before training is the same with and without held-out pictures
    trained = PromptTable(pictures.concepts, [*pictures.instance, *pictures.classes]).texts
    text_encoders = [pipeline.text_encoder, pipeline.text_encoder_2]
    tokens = tokenize(tokenizers, texts)
    shared = {"cache": EncodedCache(cache_dir), "wait": accelerator.wait_for_everyone}
    fingerprint = "+".join(module_fingerprint(text_encoder) for text_encoder in text_encoders)
    main = accelerator.is_main_process
    encode_cached = partial(encode_prompts_cached, text_encoders, fingerprint, is_main_process=main, **shared)
    prompts = encode_cached(tokens, clip_skip=clip_skip)
    unconditional = encode_cached(tokenize(tokenizers, [""]))
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
            num_workers=num_workers,
            progress=lambda total: tqdm(
                range(total), desc="encoding", unit="picture", disable=not accelerator.is_main_process
            ),
            **shared,
        )

    streams = {INSTANCE: encode(cuts)}
    if class_cuts:
        streams[CLASS] = encode(class_cuts)
    return Encoded(
        streams,
        encode(held_out_cuts) if held_out_cuts else streams[INSTANCE],
        prompts,
        unconditional,
        table.class_rows,
        tokens,
        tokenize(tokenizers, [*(spell(text, words or {}) for text in trained), *GENERIC_PROMPTS]),
        encode_generic_prompts(pipeline) if measures_base else None,
        torch.tensor([not words or any(has_word(text, word) for word in words) for text in table.texts]),
        content_hash(vae_fingerprint, fingerprint, *map(configuration, [pipeline.vae, *text_encoders])),
        clip_skip,
    )
