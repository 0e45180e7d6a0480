"""New words of a base's text encoders: learned embeddings beside an adapter (pivotal tuning)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from methods.components import ENCODERS
from storage.text import spell


def token_names(word: str, count: int) -> list[str]:
    """The tokens that a word becomes, such as <v0> and <v1>: lower case, as CLIP's tokenizer reads everything."""
    stem = re.sub(r"[^a-z0-9]", "", word.lower()) or "s"
    return [f"<{stem}{number}>" for number in range(count)]


class NewWord(NamedTuple):
    tokens: list[str]
    adapter: str | None  # the name of the one that brought it, with which it goes


def add_new_word(
    pipeline: StableDiffusionXLPipeline,
    word: str,
    embeddings: Mapping[str, torch.Tensor],
    adapter: str | None = None,
) -> None:
    """Make ``word`` in a prompt stand for new tokens with the given embeddings; see `spell_out`.

    Args:
        embeddings: clip_l and clip_g -> (tokens, d) of each text encoder.
        adapter: for `remove_new_words`.

    Raises:
        ValueError: as `check_new_word`; nothing is added then.
    """
    check_new_word(pipeline, word, embeddings)
    for key, text_encoder, tokenizer in _text_parts(pipeline):
        vectors = list(embeddings[key])
        names = token_names(word, len(vectors))
        pipeline.load_textual_inversion(vectors, token=names, text_encoder=text_encoder, tokenizer=tokenizer)
        tokenizer.new_words = _new_words(tokenizer) | {word: NewWord(names, adapter)}


def check_new_word(
    pipeline: StableDiffusionXLPipeline,
    word: str,
    embeddings: Mapping[str, torch.Tensor],
    in_place_of: str | None = None,
) -> None:
    """Refuse a word that can't be added.

    Args:
        in_place_of: an adapter whose own words are about to go.

    Raises:
        ValueError: if the base knows the tokens already, or has text encoders of another width.
    """
    for key, text_encoder, tokenizer in _text_parts(pipeline):
        vectors = embeddings[key]
        width = text_encoder.get_input_embeddings().weight.shape[1]
        if vectors.ndim != 2 or vectors.shape[1] != width:
            raise ValueError(f"the new word {word!r} has {key} of width {vectors.shape[-1]}, and this base has {width}")
        going = {token for new in _new_words(tokenizer).values() if new.adapter == in_place_of for token in new.tokens}
        taken = set(tokenizer.get_vocab()) - (going if in_place_of is not None else set())
        if known := sorted(set(token_names(word, len(vectors))) & taken):
            raise ValueError(f"the base's vocabulary has {known[0]} already: another adapter has the word {word!r} too")


def remove_new_words(pipeline: StableDiffusionXLPipeline, adapter: str | None = None) -> None:
    """Take away the word that an adapter brought, or every word that `add_new_word` added."""
    for _, text_encoder, tokenizer in _text_parts(pipeline):
        for word, new in list(_new_words(tokenizer).items()):
            if adapter in (None, new.adapter):
                pipeline.unload_textual_inversion(new.tokens, text_encoder=text_encoder, tokenizer=tokenizer)
                del tokenizer.new_words[word]


def has_new_word(pipeline: StableDiffusionXLPipeline, adapter: str) -> bool:
    return any(new.adapter == adapter for new in _new_words(pipeline.tokenizer).values())


def spellings(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """New word -> the tokens that it stands for."""
    return {word: "".join(new.tokens) for word, new in _new_words(tokenizer).items()}


def spell_out(pipeline: StableDiffusionXLPipeline, prompt: str) -> str:
    """The prompt with its new words as the tokens that they stand for."""
    return spell(prompt, spellings(pipeline.tokenizer))


def _new_words(tokenizer: PreTrainedTokenizerBase | None) -> dict[str, NewWord]:
    return getattr(tokenizer, "new_words", {})


def _text_parts(pipeline: StableDiffusionXLPipeline) -> list[tuple[str, PreTrainedModel, PreTrainedTokenizerBase]]:
    return [(key, *(getattr(pipeline, part) for part in parts)) for key, parts in ENCODERS.items()]


def read_new_word(path: Path) -> tuple[str, dict[str, torch.Tensor]]:
    """The word of a file that a run wrote, and its embeddings.

    Raises:
        ValueError: if it is no such file, or damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            word = (file.metadata() or {}).get("word")
            embeddings = {key: file.get_tensor(key) for key in ENCODERS}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read as learned embeddings: {error}") from error
    if not word:
        raise ValueError(f"{path} does not say which word it is for: load it with load_textual_inversion")
    if not all(bool(vectors.isfinite().all()) for vectors in embeddings.values()):
        raise ValueError(f"{path} has embeddings of {word!r} that are not finite: the file is damaged")
    return word, embeddings
