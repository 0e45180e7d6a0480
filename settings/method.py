"""What is trained, by which method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from methods.components import TARGET_SETS
from methods.registry import METHODS, find_method, resolve
from settings.record import BelowOne, Count, Fraction, NotNegative, Positive, Record, option

# Flags that are about every method; the others are options of some.
NOT_OPTIONS = ("method", "method_args", "use_dora", "targets", "rank_pattern")


class MethodOptions(Record):
    """Method

    The flags beside ``method_args`` are options of methods under the names that they had before; `settled` makes one
    of both.
    """

    method: str | None = option(
        None, f"What is trained: {', '.join(METHODS)}; help describes them. Default: nora (with --use_dora: dora)."
    )
    method_args: list[str] | None = option(
        None, "Options of the method as key=value; --method NAME --method_args help lists them."
    )
    targets: str = option(
        "attention",
        f"Which layers are adapted: {', '.join(TARGET_SETS)}, or a regular expression for whole module paths.",
    )
    rank_pattern: list[str] | None = option(
        None, "Ranks of some layers, as PATTERN=RANK: a regular expression that their path has, as down_blocks.2=8."
    )
    preset: Literal["default", "paper", "tiny"] | None = option(
        None, "Ranks and inner init of NoRA: default (8 x 16, 16), paper (64, 32, normal), tiny (8 x 8, 8)."
    )
    rank: Count | None = option(None, "Rank of the update. Default: 16 for NoRA (or the preset's), 4 for LoRA.")
    lora_alpha: Positive | None = option(None, "The update is scaled by alpha / rank. Default: by 1.")
    lora_dropout: BelowOne = option(0.0, "Dropout before the adapters.")
    use_dora: bool = option(False, "LoRA with a trained magnitude: --method dora.")
    loraplus_lr_ratio: Positive | None = option(None, "B learns this much faster than A (LoRA+, arXiv 2402.12354).")
    outer_rank: Count | None = option(None, "NoRA's outer rank. Default: 8 x rank, or what a layer can hold.")
    outer_init: Literal["awsvd", "svd", "random"] | None = option(None, "NoRA's frozen factors. Default: awsvd.")
    awsvd_gamma: float | None = option(None, "Exponent of the activations in AwSVD. Default: 0.5.")
    sigma_side: Literal["B", "A", "both"] | None = option(None, "Where the singular values go. Default: B.")
    inner_init: Literal["matched", "normal", "zero_uniform", "diag"] | None = option(
        None, "NoRA's trained factors. Default: the preset's, matched."
    )
    inner_std: Positive | None = option(None, "Standard deviation of --inner_init normal. Default: 0.01.")
    calibration_passes: Count | None = option(
        None, "UNet forward passes of 4 samples that measure AwSVD's statistics. Default: 32."
    )

    @property
    def name(self) -> str:
        """The method's name in the registry.

        Raises:
            ValueError: for --use_dora beside another method.
        """
        if self.use_dora and self.method not in (None, "lora", "dora"):
            raise ValueError(f"--use_dora is an option of LoRA: leave it out with --method {self.method}")
        if self.use_dora:
            return "dora"
        return find_method(self.method or "nora").name

    def arguments(self) -> dict[str, Any]:
        """Every option of the method with its value.

        Raises:
            ValueError: for one that the method doesn't have, and for a wrong value.
        """
        flags = {name: value for name, value in self if name not in NOT_OPTIONS}
        flags["lora_dropout"] = self.lora_dropout or None  # 0 is what diffusers' commands say without meaning it
        return resolve(self.name, self.method_args or (), flags)

    def ranks(self) -> dict[str, int]:
        """--rank_pattern's: pattern -> rank.

        Raises:
            ValueError: for one without a rank of at least 1, or given twice.
        """
        ranks: dict[str, int] = {}
        for given in self.rank_pattern or ():
            pattern, _, rank = given.rpartition("=")
            if not pattern or not rank.isdecimal() or int(rank) < 1:
                raise ValueError(f"--rank_pattern {given} must look like down_blocks.2=8, with a rank of at least 1")
            if pattern in ranks:
                raise ValueError(f"--rank_pattern {pattern} is given twice: leave one out")
            ranks[pattern] = int(rank)
        return ranks

    def settled(self) -> MethodOptions:
        """The same with every option said: as ``method_args``, and as the flag where there is one."""
        name, arguments = self.name, self.arguments()
        flags = {one.flag: arguments[one.name] for one in METHODS[name].options if one.flag is not None}
        said = [f"{key}={value}" for key, value in arguments.items()]
        return self.replace(method=name, method_args=said, use_dora=name == "dora", **flags)

    def as_recorded(self, recorded: Sequence[str]) -> MethodOptions:
        """The same, with options that a record is older than as its run had them.

        Args:
            recorded: its ``method_args``.
        """
        said = {argument.partition("=")[0] for argument in recorded}
        arguments = self.arguments()
        older = {one.name: one.before for one in METHODS[self.name].options if one.before and one.name not in said}
        if arguments.get("outer_init") != "awsvd":
            older.pop("statistic", None)  # which measured nothing
        return self.replace(method_args=[f"{key}={value}" for key, value in (arguments | older).items()])


class TextOptions(Record):
    """Text encoders"""

    train_text_encoder: bool = option(False, "Adapt the attention of both text encoders too.")
    text_encoder_lr: NotNegative = option(5e-6, "Their learning rate.")
    train_text_encoder_frac: Fraction = option(1.0, "They learn during this share of the steps.")
    train_text_encoder_ti: bool = option(False, "Learn new tokens for the abstraction (pivotal tuning).")
    token_abstraction: str = option("[V]", "The word in prompts and captions that the new tokens stand for.")
    num_new_tokens_per_abstraction: Count = option(2, "How many new tokens it becomes.")
    train_text_encoder_ti_frac: Fraction = option(0.5, "The new tokens learn during this share of the steps.")

    @property
    def new_word(self) -> str | None:
        """What new tokens stand for, where there are any."""
        return self.token_abstraction if self.train_text_encoder_ti else None

    @property
    def learns(self) -> bool:
        return self.train_text_encoder or self.train_text_encoder_ti

    @property
    def fraction_flag(self) -> str:
        """The flag that says for which share of the steps they learn."""
        return "train_text_encoder_ti_frac" if self.train_text_encoder_ti else "train_text_encoder_frac"

    @property
    def fraction(self) -> float:
        return self.train_text_encoder_ti_frac if self.train_text_encoder_ti else self.train_text_encoder_frac

    def steps(self, total_steps: int) -> int:
        """The first so many steps teach the text encoders.

        Raises:
            ValueError: if they would get none.
        """
        steps = round(total_steps * self.fraction)
        if self.learns and steps == 0:
            raise ValueError(
                f"--{self.fraction_flag} {self.fraction} of {total_steps} steps leave the text encoders none: raise it"
            )
        return steps
