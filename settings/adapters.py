"""Flags of `python -m inference.adapters`, one dataclass for each of its commands. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from settings.record import FilePath
from settings.sampling import MAX_SCALE, settle_texts

BASE_HELP = "SDXL: a diffusers folder, a .safetensors file or a Hub id."
MOST_RANK = 4096


def _flag(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(kw_only=True)
class _AdapterConfig:
    adapter: list[FilePath] = field(
        metadata={
            "aliases": ["--adapters"],
            "action": "extend",
            "help": "Run folders, LoRA files of any kind, PEFT folders; also without the flag, before the others.",
        }
    )
    base: FilePath | None = _flag(
        None, f"{BASE_HELP} Default: the adapter's own; without a record of it SDXL's shapes, which LoRAs need alone."
    )

    def __post_init__(self) -> None:
        settle_texts(self)


@dataclass(kw_only=True)
class InspectConfig(_AdapterConfig):
    """What is in adapter files."""

    json: bool = _flag(False, "As JSON, a list with an entry an adapter.")


@dataclass(kw_only=True)
class _Written:
    to: Literal["diffusers", "kohya", "peft", "inner"] | None = _flag(
        None, "Format of what is written. Default: the adapter's own; of an inner-only one diffusers."
    )
    dtype: Literal["fp32", "fp16", "bf16"] | None = _flag(
        None, "Of the numbers that are written. Default: fp16 for kohya, else fp32."
    )
    overwrite: bool = _flag(False, "Replace what is at the place of the output.")

    def check_dtype(self) -> None:
        if self.to == "inner" and self.dtype not in (None, "fp32"):
            raise ValueError(f"--dtype {self.dtype} with --to inner: inner factors are written in fp32, leave it out")

    @property
    def written_dtype(self) -> str:
        return self.dtype or ("fp16" if self.to == "kohya" else "fp32")


@dataclass(kw_only=True)
class ConvertConfig(_AdapterConfig, _Written):
    """The same adapter in another format."""

    output: FilePath = field(metadata={"help": "The file; for peft the folder."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one(self.adapter, "convert")
        if self.to is None:
            raise ValueError("--to is missing: diffusers, kohya (which drawing programs read), peft or inner")
        self.check_dtype()


@dataclass(kw_only=True)
class _Sized:
    rank: int | None = _flag(None, "Rank of what is written, the same in each layer.")
    energy: float | None = _flag(None, "Or the smallest rank of each layer that keeps this share of ‖ΔW‖², below 1.")

    def check_size(self, needed: bool) -> None:
        """Raise ValueError unless one of the two says a size, or where one is needed."""
        if self.rank is not None and self.energy is not None:
            raise ValueError("--rank and --energy both say how small: leave one out")
        if needed and self.rank is None and self.energy is None:
            raise ValueError("--rank or --energy must say how small, such as --rank 8 or --energy 0.95")
        if self.rank is not None and not 1 <= self.rank <= MOST_RANK:
            raise ValueError(f"--rank {self.rank} must be from 1 to {MOST_RANK}")
        if self.energy is not None and not 0 < self.energy < 1:
            raise ValueError(f"--energy {self.energy:g} must be between 0 and 1, such as 0.95")


@dataclass(kw_only=True)
class ResizeConfig(_AdapterConfig, _Written, _Sized):
    """The nearest adapter of a smaller rank (by singular values)."""

    output: FilePath = field(metadata={"help": "The file; for peft the folder."})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_one(self.adapter, "resize")
        check_low_rank(self.to, "resize")
        self.check_size(needed=True)


@dataclass(kw_only=True)
class MergeConfig(_AdapterConfig, _Written, _Sized):
    """Several adapters as one, or in the base."""

    weights: list[float] | None = _flag(None, "A factor for each adapter. Default: 1 each.", action="extend")
    output: FilePath | None = _flag(None, "The file of the one adapter; for peft the folder.")
    into: FilePath | None = _flag(None, "Or the folder of the base with the adapters merged into its weights.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_low_rank(self.to, "merge")
        self.check_size(needed=False)
        if (self.output is None) == (self.into is None):
            raise ValueError("merge needs --output FILE for one adapter, or --into FOLDER for a base: give one of them")
        if self.into is not None and (self.to or self.rank or self.energy):
            raise ValueError("--to, --rank and --energy are about an adapter, and --into writes a base: leave them out")
        if self.weights is not None and len(self.weights) != len(self.adapter):
            raise ValueError(
                f"--weights has {len(self.weights)} numbers for {len(self.adapter)} adapters: give one each"
            )
        for weight in self.weights or ():
            if not (math.isfinite(weight) and 0 < abs(weight) <= MAX_SCALE):
                raise ValueError(f"--weights {weight:g} must be from -{MAX_SCALE} to {MAX_SCALE} and not 0")

    @property
    def parts(self) -> list[tuple[str, float]]:
        """(adapter, weight); an adapter may come twice."""
        return list(zip(self.adapter, self.weights or [1.0] * len(self.adapter)))


@dataclass(kw_only=True)
class ExtractConfig(_Written, _Sized):
    """An adapter out of the difference of two bases."""

    base: FilePath = field(metadata={"help": f"{BASE_HELP} What the adapter is for."})
    tuned: FilePath = field(metadata={"help": "The base as it was trained further, likewise."})
    output: FilePath = field(metadata={"help": "The file; for peft the folder."})
    targets: str = _flag(
        "all-linear", "Layers: attention, attention-mlp, all-linear, or a regular expression for whole module paths."
    )
    outer_rank: int | None = _flag(None, "With --to inner: NoRA's outer rank. Default: 8 x rank.")

    def __post_init__(self) -> None:
        settle_texts(self)
        self.to = self.to or "kohya"
        self.check_size(needed=True)
        if self.to == "inner" and self.rank is None:
            raise ValueError("--energy with --to inner: NoRA's layers have one rank, say it with --rank")
        if self.outer_rank is not None and self.to != "inner":
            raise ValueError("--outer_rank has no effect without --to inner: leave it out")
        self.check_dtype()


COMMANDS: dict[str, type[Any]] = {
    "inspect": InspectConfig,
    "convert": ConvertConfig,
    "resize": ResizeConfig,
    "merge": MergeConfig,
    "extract": ExtractConfig,
}


def check_one(adapters: list[str], command: str) -> None:
    if len(adapters) != 1:
        raise ValueError(f"{command} takes one adapter, and {len(adapters)} are named: {', '.join(adapters)}")


def check_low_rank(form: str | None, command: str) -> None:
    if form == "inner":
        raise ValueError(
            f"--to inner: what {command} makes is no NoRA of the base; diffusers, kohya and peft can hold it"
        )
