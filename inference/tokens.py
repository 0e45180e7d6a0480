"""New words of a base's text encoders: learned embeddings beside an adapter (pivotal tuning)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import StableDiffusionXLPipeline
from safetensors import SafetensorError, safe_open

# Keys of the file, as diffusers' advanced DreamBooth script writes them -> text encoder and tokenizer.
ENCODERS = {"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}


def token_names(word: str, count: int) -> list[str]:
    """The tokens that a word becomes, such as <v0> and <v1>: lower case, as CLIP's tokenizer reads everything."""
    stem = re.sub(r"[^a-z0-9]", "", word.lower()) or "s"
    return [f"<{stem}{number}>" for number in range(count)]


def add_new_word(pipeline: StableDiffusionXLPipeline, word: str, embeddings: Mapping[str, torch.Tensor]) -> None:
    """Make ``word`` in a prompt stand for new tokens with the given embeddings; see `spell_out`.

    Args:
        embeddings: clip_l and clip_g -> (tokens, d) of each text encoder.

    Raises:
        ValueError: if the base knows the tokens already, or has text encoders of another width.
    """
    for key, (encoder, tokenizer) in ENCODERS.items():
        text_encoder, tokenizer = getattr(pipeline, encoder), getattr(pipeline, tokenizer)
        vectors = embeddings[key]
        width = text_encoder.get_input_embeddings().weight.shape[1]
        if vectors.shape[1] != width:
            raise ValueError(f"the new word {word!r} has {key} of width {vectors.shape[1]}, and this base has {width}")
        names = token_names(word, len(vectors))
        if known := sorted(set(names) & set(tokenizer.get_vocab())):
            raise ValueError(f"the base's vocabulary has {known[0]} already: another adapter has the word {word!r} too")
        pipeline.load_textual_inversion(list(vectors), token=names, text_encoder=text_encoder, tokenizer=tokenizer)
        tokenizer.new_words = getattr(tokenizer, "new_words", {}) | {word: "".join(names)}


def remove_new_words(pipeline: StableDiffusionXLPipeline) -> None:
    """Take away every word that `add_new_word` added."""
    for encoder, tokenizer in ENCODERS.values():
        text_encoder, tokenizer = getattr(pipeline, encoder), getattr(pipeline, tokenizer)
        if getattr(tokenizer, "new_words", None):
            pipeline.unload_textual_inversion(text_encoder=text_encoder, tokenizer=tokenizer)
            tokenizer.new_words = {}


def spell_out(pipeline: StableDiffusionXLPipeline, prompt: str) -> str:
    """The prompt with its new words as the tokens that they stand for."""
    for word, tokens in getattr(pipeline.tokenizer, "new_words", {}).items():
        prompt = prompt.replace(word, tokens)
    return prompt


def load_new_word(pipeline: StableDiffusionXLPipeline, path: Path) -> str:
    """Add the word of a file that a run wrote; returns the word.

    Raises:
        ValueError: if it is no such file, or doesn't fit the base.
    """
    try:
        with safe_open(path, framework="pt") as file:
            word = (file.metadata() or {}).get("word")
            embeddings = {key: file.get_tensor(key) for key in ENCODERS}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} can't be read as learned embeddings: {error}") from error
    if not word:
        raise ValueError(f"{path} does not say which word it is for: load it with load_textual_inversion")
    add_new_word(pipeline, word, embeddings)
    return word
