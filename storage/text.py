"""Text of a user's, as they wrote it."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml


def read_text(path: str | Path, what: str = "file") -> str:
    """A UTF-8 file, with or without the mark that some editors put first; lines end at ``\\n``.

    Args:
        what: messages call it.

    Raises:
        ValueError: if it is no UTF-8, or UTF-16, whose Latin letters read as UTF-8 with NULs between them.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{what} {path} is not UTF-8 text: save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{what} {path} holds NULs, as UTF-16 does: save it as UTF-8")
    return text.replace("\r\n", "\n")


def check_text(text: str, what: str) -> str:
    """The text, which can be written into every record.

    Raises:
        ValueError: if it has a NUL, or half a character: a name or an argument that is not UTF-8.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown = text.encode(errors="backslashreplace").decode()
        raise ValueError(f"{what} {shown} is not UTF-8: write it in UTF-8, or rename the file") from error
    if "\0" in text:
        raise ValueError(f"{what} {text!r} has a NUL: leave it out")
    return text


def expand_home(path: str) -> str:
    """``~/x`` and ``~name/x`` as the home folders that they stand for, which a shell leaves alone after a ``=``.

    Raises:
        ValueError: if there is no such home.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        raise ValueError("names a home folder that is not known here: write the whole path, or ./~ for a name")
    return expanded


def home_path(text: str) -> Path:
    """The path that an argument says, for argparse."""
    return Path(expand_home(text))


def counted(number: int, noun: str) -> str:
    """1 step, 1,000 steps."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def first_line(error: BaseException) -> str:
    """What a library's error says first; its kind where it says nothing."""
    return (str(error).strip() or repr(error)).split("\n")[0]


# --- JSON and YAML ----------------------------------------------------------------------------------------------------


def parse_json(text: str) -> Any:
    """What a JSON text holds.

    Raises:
        JSONDecodeError: if it is none.
        ValueError: if a name is there twice, or half a character.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError(r"it has half a character, such as \ud83d alone") from error
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name} is there twice")
        found[name] = value
    return found


# PyYAML ends lines at these, as YAML 1.1 did; to everybody else they are letters. Nobody's text has the stand-ins.
_HIDDEN = str.maketrans("\x85\u2028\u2029", "\U0010ff85\U0010ff28\U0010ff29")
_SHOWN = {stand_in: letter for letter, stand_in in _HIDDEN.items()}

_TAGS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "str", "seq", "map")}
_IMPLICIT = {"tag:yaml.org,2002:null", "tag:yaml.org,2002:merge"}


class _PlainLoader(yaml.SafeLoader):
    """YAML of texts, lists and mappings: ``no`` is "no" and ``010`` is "010"; only null, ``~`` and nothing are None.

    What a text means is for the flag's own type to say. No key is there twice.
    """

    # YAML 1.1 takes 010 for 8, 1:30 for 90 and no for False
    yaml_implicit_resolvers = {
        first: [one for one in resolvers if one[0] in _IMPLICIT]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _TAGS
    }

    def construct_scalar(self, node: yaml.ScalarNode) -> str:
        text = super().construct_scalar(node).translate(_SHOWN)
        try:
            return check_text(text, "the text")
        except ValueError as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{name} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load_yaml(path: str | Path, what: str = "file") -> Any:
    """What a YAML file holds: texts, lists, mappings and None. JSON is read as JSON.

    Args:
        what: messages call it.

    Raises:
        OSError: if the file can't be read.
        ValueError: if it is neither, with the place.
    """
    text = read_text(path, what)
    try:
        try:
            return parse_json(text)  # YAML reads \ud83d\ude00 as two halves, and takes no tab before a line
        except json.JSONDecodeError:
            return yaml.load(text.translate(_HIDDEN), _PlainLoader)
    except (yaml.YAMLError, ValueError) as error:
        kind = "neither JSON nor YAML" if text.lstrip()[:1] in ("{", "[") else "not YAML"
        raise ValueError(f"{what} {path} is {kind}: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{what} {path} is nested too deeply") from error


# --- words ------------------------------------------------------------------------------------------------------------


def spell(text: str, words: Mapping[str, str]) -> str:
    """The text with each word replaced by what it stands for, such as "[V]" by the tokens that a run taught.

    Whole words: "sks" is not in "desks". All at once: what one word stands for is not looked through for another.
    """
    found = {unicodedata.normalize("NFC", word): tokens for word, tokens in words.items()}
    if not found:
        return text
    composed = unicodedata.normalize("NFC", text)  # as CLIP's tokenizers do
    spelled, count = _whole_words(found).subn(lambda match: found[match[0]], composed)
    return spelled if count else text


def has_word(text: str, word: str) -> bool:
    """Whether `spell` would find the word."""
    return bool(_whole_words([unicodedata.normalize("NFC", word)]).search(unicodedata.normalize("NFC", text)))


def _whole_words(words: Iterable[str]) -> re.Pattern[str]:
    # a word that ends in a bracket needs no end of a word behind it
    patterns = [
        (r"(?<!\w)" if re.match(r"\w", word) else "")
        + re.escape(word)
        + (r"(?!\w)" if re.search(r"\w\Z", word) else "")
        for word in sorted(words, key=len, reverse=True)
    ]
    return re.compile("|".join(patterns))
