"""Words for scores: what an instance prompt is of, what is asked for of it, and how anyone would say that."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import yaml

from storage.files import load_yaml

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
_IDENTIFIER = re.compile(r"\[\w+\]")
FIRST_SEED = 1000


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
        try:
            content = load_yaml(path)
            objects, animals = dict(content.get("objects") or {}), dict(content.get("live_subjects") or {})
            live = subject in animals if subject else live
            prompts = [*content["both_prompts"], *content.get("live_subject_prompts" if live else "object_prompts", [])]
            images_per_prompt = content["images_per_prompt"]
            if not isinstance(images_per_prompt, int) or images_per_prompt < 1:
                raise ValueError(f"images_per_prompt is {images_per_prompt}, and a whole number from 1 is needed")
            if not all(isinstance(name, str) for name in (objects | animals).values()):
                raise ValueError("every subject needs its class in words")
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"--protocol {path} must have both_prompts and images_per_prompt: {error!r}") from error
        if not all(isinstance(prompt, str) and prompt.count("{}") == 1 for prompt in prompts):
            raise ValueError(f"--protocol {path}: every prompt must be text with one {{}} for the subject")
        if subject and subject not in objects | animals:
            known = ", ".join(sorted(objects | animals)) or "none"
            raise ValueError(f"--protocol_subject {subject} is not in --protocol {name}, which has: {known}")
        return cls(prompts, images_per_prompt, (objects | animals).get(subject))


def subject_of_prompt(instance_prompt: str) -> str:
    """The subject in words: "a photo of [V] robot" is of "[V] robot"."""
    return re.sub(r"^an? (photo|picture|image|drawing) of (an? |the )?", "", instance_prompt.strip())


def class_of(words: str) -> str:
    plain = re.sub(r"^a ", "", without_identifier(words))
    if plain == words:
        raise ValueError(f'the class of "{words}" is not known, because no word stands in brackets, as [V] does')
    return plain


def with_article(template: str, words: str) -> str:
    """The template with the subject in it; "a [V] owl", but "an owl"."""
    prompt = template.replace("{}", words)
    return prompt.replace(f"a {words}", f"an {words}") if words[0].lower() in "aeio" else prompt


def without_identifier(prompt: str) -> str:
    """The prompt as anyone would say it, for CLIP: "a [V] robot" is a robot, and so is "[V] robot"."""
    words: list[str] = []
    for word in prompt.split():
        if not _IDENTIFIER.fullmatch(word):
            words.append(word)
        elif not words or words[-1].lower() not in ("a", "an", "the"):
            words.append("a")
    return " ".join(words).replace("a a ", "a ")
