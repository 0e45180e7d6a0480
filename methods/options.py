"""What a method and an option of it are; the options that several methods share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

TRUE, FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")


@dataclass(frozen=True)
class Option:
    """One option of a method: its default, meaning and limits.

    Args:
        field: what it sets in the method's configuration; None: what the method's class makes of it.
        flag: the trainer's flag that says the same.
        kind: of its values; None: that of its default.
        shown: the default in words, where it depends on other things.
        before: what a run did whose record is older than the option, where that is not the default.
    """

    name: str
    default: Any
    help: str
    field: str | None = None
    flag: str | None = None
    kind: type | None = None
    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    at_most: float | None = None
    shown: str | None = None
    before: Any = None

    @property
    def type(self) -> type:
        return self.kind or type(self.default)

    def parse(self, text: str, where: str) -> Any:
        """The value that a text says.

        Raises:
            ValueError: if it says none of the option's kind, or one outside its limits.
        """
        if text.lower() in ("none", "null") and self.default is None:
            return None
        kind = self.type
        try:
            if kind is bool:
                value: Any = {**dict.fromkeys(TRUE, True), **dict.fromkeys(FALSE, False)}[text.lower()]
            else:
                value = kind(text)
        except (ValueError, KeyError) as error:
            words = {int: "a whole number", float: "a number", bool: "true or false"}[kind]
            raise ValueError(f"{where} must be {words}") from error
        self.check(value, where)
        return value

    def check(self, value: Any, where: str) -> None:
        """Raise ValueError for a value outside the limits."""
        if value is None:
            return
        if self.choices and value not in self.choices:
            raise ValueError(f"{where} is not known: choose one of {', '.join(self.choices)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{where} must be a finite number")
        least, most, above, below = self.at_least, self.at_most, self.above, self.below
        wrong = (
            (least is not None and value < least)
            or (most is not None and value > most)
            or (above is not None and value <= above)
            or (below is not None and value >= below)
        )
        if wrong:
            lower = (
                f"above {above:g}"
                if above is not None
                else f"from {least:g}"
                if most is not None
                else f"at least {least:g}"
            )
            upper = f" to {most:g}" if most is not None else f" and below {below:g}" if below is not None else ""
            raise ValueError(f"{where} must be {lower}{upper}")


@dataclass(frozen=True)
class Method:
    """One method: what it is, where it is from, and what the trainer may ask of it.

    Args:
        formula: the adapted layer, or its update.
        config: the class of `peft`, or ``module:Class``, that configures it.
        fixed: fields of the configuration with one value.
        adapter: the class that differs from `methods.adapter:Adapter`.
        low_rank: the update is a pair of factors, so that a LoRA file can say it exactly.
        rates: learning rates that its source uses; None: LoRA's own, the trainer's default.
        limits: what it can't do, a sentence each.
        no_text_encoders: why it doesn't train them; None: it does.
        not_decayed: parts of the names of parameters that weight decay would pull away from the base.
        start: how it starts at the base.
        vectors: it trains vectors too, which some optimizers don't take.
        plans_ahead: what a step does depends on how many the run has.
        ranks_by_layer: layers may have ranks of their own (PEFT's rank_pattern).
    """

    name: str
    title: str
    source: str
    formula: str
    config: str
    options: tuple[Option, ...]
    start: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    adapter: str = "methods.adapter:Adapter"
    low_rank: bool = True
    rates: str | None = None
    limits: tuple[str, ...] = ()
    no_text_encoders: str | None = None
    not_decayed: tuple[str, ...] = ()
    vectors: bool = False
    plans_ahead: bool = False
    ranks_by_layer: bool = False

    def option(self, name: str) -> Option | None:
        return next((option for option in self.options if option.name == name), None)

    def flagged(self, flag: str) -> Option | None:
        return next((option for option in self.options if option.flag == flag), None)

    @property
    def option_names(self) -> str:
        return ", ".join(option.name for option in self.options)


def rank(default: int, help: str = "Rank of the update.") -> Option:
    return Option("rank", default, help, "r", "rank", at_least=1)


def alpha(field: str = "lora_alpha", scale: str = "alpha / rank", shown: str = "the rank") -> Option:
    return Option("alpha", None, f"The scale is {scale}.", field, "lora_alpha", float, above=0, shown=shown)


def dropout(field: str = "lora_dropout", where: str = "before the adapters") -> Option:
    return Option("dropout", 0.0, f"Dropout {where}.", field, "lora_dropout", at_least=0, below=1)


def lr_ratio(default: float | None = None) -> Option:
    help = "B learns this much faster than A (LoRA+, arXiv 2402.12354)."
    return Option("lr_ratio", default, help, None, "loraplus_lr_ratio", float, above=0)
