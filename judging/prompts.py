"""Words for scores: what an instance prompt is of, what is asked for of it, and how anyone would say that."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from storage.text import load_yaml

PROTOCOLS = Path(__file__).parent / "protocols"
# Of other things than the subject, in words that small bases know too.
UNRELATED_PROMPTS = (
    "a photo of a teapot on the grass",
    "a photo of a fox in the snow",
    "a photo of a hamburger on a red background",
    "a photo of an elephant in the desert",
    "a photo of a house at night",
    "a photo of a car on the beach",
    "a photo of a tree in the snow",
    "a photo of a bicycle in the jungle",
    "a photo of an owl at night",
    "a photo of a guitar on a blue background",
)
CLASS_PROMPTS = ("a photo of a {}", "a photo of a {} on the beach", "a photo of a {} in the snow")
FIRST_SEED = 1000
ARTICLES = ("a", "an", "the", "my")
_IDENTIFIER = re.compile(r"\[\w+\]")
_ARTICLE = rf"(?:{'|'.join(ARTICLES)}) "
_MEDIUM = "(?:photo|photograph|picture|image|portrait|drawing|sketch|painting|illustration|rendering)s? of "
# "a", "close-up", "photo of", "my", "[V] dog"; an article further on begins another thing, such as what is on a picture
_INSTANCE_PROMPT = re.compile(
    rf"(?:(?:{_ARTICLE})?(?P<manner>(?:(?!{_ARTICLE})\S+ )*?){_MEDIUM})?(?:{_ARTICLE})?(?P<subject>.*)", re.IGNORECASE
)
_VOWEL_SOUND = re.compile(r"(?!eu|one\b)[aeio]|u(?![a-z][aeiou])|hour|heir|honest", re.IGNORECASE)


@dataclass(frozen=True)
class Protocol:
    """Templates with {} for the subject, and how many pictures are drawn of each."""

    prompts: list[str]
    images_per_prompt: int
    class_name: str | None = None

    @property
    def seeds(self) -> list[int]:
        """Of each prompt's pictures: far from those that trainings begin with."""
        return list(range(FIRST_SEED, FIRST_SEED + self.images_per_prompt))

    @classmethod
    def read(cls, name: str, subject: str | None, live: bool) -> Protocol:
        """A protocol that comes with this package, or a YAML file of the same form.

        Raises:
            ValueError: if there is none of that name, if the file has another form, or an unknown subject.
        """
        path = PROTOCOLS / f"{name}.yaml" if re.fullmatch(r"\w+", name) else Path(name)
        if not path.is_file():
            known = ", ".join(sorted(file.stem for file in PROTOCOLS.glob("*.yaml")))
            raise ValueError(f"--protocol {name} does not exist: choose one of {known}, or name a file")
        content = load_yaml(path, "--protocol")
        try:
            objects, animals = dict(content.get("objects") or {}), dict(content.get("live_subjects") or {})
            kind = "live_subject_prompts" if live or subject in animals else "object_prompts"
            prompts = [*content["both_prompts"], *content.get(kind, [])]
            images_per_prompt = int(str(content["images_per_prompt"]))
            if images_per_prompt < 1:
                raise ValueError(f"images_per_prompt is {images_per_prompt}, and a whole number from 1 is needed")
            if not all(isinstance(name, str) for name in (objects | animals).values()):
                raise ValueError("every subject needs its class in words")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"--protocol {path} must have both_prompts and images_per_prompt: {error!r}") from error
        if not all(isinstance(prompt, str) and prompt.count("{}") == 1 for prompt in prompts):
            raise ValueError(f"--protocol {path}: every prompt must be text with one {{}} for the subject")
        if live and subject:
            raise ValueError(f"--live_subject: --protocol_subject {subject} says it already, leave it out")
        if live and "live_subject_prompts" not in content:
            raise ValueError(f"--live_subject: --protocol {name} has no prompts for animals, leave it out")
        if subject and subject not in objects | animals:
            known = ", ".join(sorted(objects | animals)) or "none"
            raise ValueError(f"--protocol_subject {subject} is not in --protocol {name}, which has: {known}")
        return cls(prompts, images_per_prompt, (objects | animals).get(subject))


def subject_of_prompt(instance_prompt: str) -> str:
    """The subject in words: "a photo of a [V] robot" is of "[V] robot", and so is "[V] photo of a robot"."""
    found = _INSTANCE_PROMPT.fullmatch(" ".join(instance_prompt.split()))
    manner, subject = (found["manner"] or "").split(), found["subject"]
    if any(map(_IDENTIFIER.fullmatch, [*manner, *subject.split()])):
        manner = [word for word in manner if _IDENTIFIER.fullmatch(word)]
    # without brackets the name may be any word, as in "sks photo of a dog": none is left out
    return " ".join([*manner, subject])


def class_of(words: str) -> str:
    """What a subject is: "[V] dog" is a "dog".

    Raises:
        ValueError: if nothing tells the name from the class.
    """
    plain = " ".join(word for word in words.split() if not _IDENTIFIER.fullmatch(word))
    if plain in (words, ""):
        reason = "no word stands in brackets, as [V] does" if plain else "it is a name alone"
        raise ValueError(f'the class of "{words}" is not known, because {reason}: add --class_name')
    return plain


def with_article(template: str, words: str) -> str:
    """The template with the subject in it; "a [V] owl", but "an owl"."""
    fitting = re.sub(r"\ban? \{\}", lambda found: f"{_agreeing(found[0].split()[0], words)} {{}}", template, flags=re.I)
    return fitting.replace("{}", words)


def without_identifier(prompt: str) -> str:
    """The prompt as anyone would say it, for CLIP: "a [V] robot" is a robot, and so is "[V] robot"."""
    words = prompt.split()
    said: list[str] = []
    for word, following in zip(words, [*words[1:], ""]):
        if not _IDENTIFIER.fullmatch(word):
            said.append(word)
            continue
        article = said.pop() if said and said[-1].lower() in ARTICLES else "a"
        if following and following.lower() not in ARTICLES:
            said.append(_agreeing(article, following))
    return " ".join(said)


def _agreeing(article: str, words: str) -> str:
    """ "a" or "an", as the words sound; another article as it is."""
    if article.lower() not in ("a", "an"):
        return article
    return article[0] + ("n" if _VOWEL_SOUND.match(words) else "")
