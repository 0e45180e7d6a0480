"""Records of flags: frozen, checked when they are made, with limits and help on the field (pydantic)."""

from __future__ import annotations

import math
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from storage.text import check_text, expand_home

Self = TypeVar("Self", bound="Record")


class Record(BaseModel):
    """One concern's flags; a field's name is the flag's, its description the help text.

    Raises:
        ValueError: for a value outside its field's limits, with flag, value and limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    def __init__(self, **flags: Any) -> None:
        try:
            super().__init__(**flags)
        except ValidationError as error:
            raise ValueError(sentence(error)) from None
        for name, value in self:
            if isinstance(value, str) and not value.strip():
                raise ValueError(f"--{name} is empty: it must say something")
            check_texts(name, value)

    def replace(self: Self, **flags: Any) -> Self:
        """A copy with other values, checked like a new one."""
        return type(self)(**dict(self) | flags)


def check_texts(name: str, value: Any) -> None:
    """Raise ValueError for a flag's text, or list of texts, that no record could hold."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str):
            check_text(text, f"--{name}")


def option(default: Any, text: str) -> Any:
    """A flag's default and help text."""
    return Field(default=default, description=text)


def within(
    least: float | None = None, most: float | None = None, above: float | None = None, below: float | None = None
) -> AfterValidator:
    """Limits of a number, said in one phrase; NaN and infinity are never meant."""
    if most is not None:
        words = f"must be from {least:g} to {most:.15g}"
    elif below is not None:
        words = f"must be at least {least:g} and below {below:g}"
    elif least is not None:
        words = f"must be at least {least:g}"
    else:
        words = f"must be above {above:g}"

    def check(value: float) -> float:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError("must be a finite number")
        if (
            (least is not None and value < least)
            or (most is not None and value > most)
            or (above is not None and value <= above)
            or (below is not None and value >= below)
        ):
            raise ValueError(words)
        return value

    return AfterValidator(check)


MOST = 10**6  # steps, epochs and repeats: every step's picture is decided before the first
Count = Annotated[int, within(least=1)]
Steps = Annotated[int, within(least=1, most=MOST)]
AtLeast0 = Annotated[int, within(least=0)]
NotNegative = Annotated[float, within(least=0)]
Positive = Annotated[float, within(above=0)]
Fraction = Annotated[float, within(least=0, most=1)]
BelowOne = Annotated[float, within(least=0, below=1)]
FilePath = Annotated[str, AfterValidator(expand_home)]  # of a file or a folder; a Hub id has no ~


def sentence(error: ValidationError) -> str:
    """The first thing that is wrong, as flag, value and limit."""
    first = error.errors()[0]
    name, value = first["loc"][0], first["input"]
    if first["type"] == "missing":
        return f"--{name} is missing"
    if first["type"] == "extra_forbidden":
        return f"--{name} is no flag"
    if first["type"] == "literal_error":
        return f"--{name} {value} is not known: choose {first['ctx']['expected']}"
    return f"--{name} {value} {first['msg'].removeprefix('Value error, ')}"
