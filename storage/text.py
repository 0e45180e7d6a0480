"""Text of a user's, as they wrote it."""

from __future__ import annotations

from collections.abc import Mapping


def spell(text: str, words: Mapping[str, str]) -> str:
    """The text with each word replaced by what it stands for, such as "[V]" by the tokens that a run taught."""
    for word, tokens in words.items():
        text = text.replace(word, tokens)
    return text
