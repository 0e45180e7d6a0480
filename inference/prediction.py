"""What a base's UNet predicts, noise or velocity, and whether its schedule ends in noise alone."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import NamedTuple

from diffusers import EDMEulerScheduler, EulerDiscreteScheduler, SchedulerMixin

from inference.single_file import read_markers

GUIDANCE_RESCALE = 0.7  # phi of arXiv 2305.08891, section 3.4, where the last timestep is noise alone


class Prediction(NamedTuple):
    """What a scheduler's configuration says of the UNet."""

    kind: str  # epsilon or v_prediction; diffusers knows others, which nothing here trains
    zero_snr: bool

    @property
    def said(self) -> str:
        kind = {"epsilon": "noise (epsilon)", "v_prediction": "velocity (v_prediction)"}.get(self.kind, self.kind)
        return f"{kind}, with zero terminal SNR" if self.zero_snr else kind

    def flags(self) -> dict[str, str]:
        """As the flags that say the same."""
        return {"prediction_type": self.kind, "zero_terminal_snr": "on" if self.zero_snr else "off"}


def prediction_of(scheduler: SchedulerMixin) -> Prediction:
    config = scheduler.config
    return Prediction(config.get("prediction_type", "epsilon"), bool(config.get("rescale_betas_zero_snr")))


def asked_prediction(base: str | Path, prediction_type: str, zero_terminal_snr: str) -> tuple[str, str]:
    """The two flags with what the keys of a single file say in the place of auto.

    A file without keys says nothing, and a folder has its scheduler's configuration.
    """
    markers = read_markers(Path(base)) if Path(base).is_file() else None
    if markers is None:
        return prediction_type, zero_terminal_snr
    if prediction_type == "auto":
        prediction_type = "v_prediction" if markers.velocity else "epsilon"
    if zero_terminal_snr == "auto":
        zero_terminal_snr = "on" if markers.zero_snr and prediction_type == "v_prediction" else "off"
    return prediction_type, zero_terminal_snr


def prediction_line(scheduler: SchedulerMixin, base: str | Path, prediction_type: str) -> str:
    """One sentence: what the base predicts, and what says so."""
    predicts, keys = prediction_of(scheduler), Path(base).is_file() and read_markers(Path(base)) is not None
    source = "as keys of the file say" if keys else "as its scheduler's configuration says"
    if prediction_type != "auto":
        source = "as --prediction_type says"
        if predicts.kind == "v_prediction" and not predicts.zero_snr and Path(base).is_file():
            source += "; add --zero_terminal_snr on if it was trained so, as most such bases were"
    return f"base: predicts {predicts.said}, {source}"


def settle_scheduler(
    scheduler: SchedulerMixin, base: str | Path, prediction_type: str = "auto", zero_terminal_snr: str = "auto"
) -> SchedulerMixin:
    """The base's scheduler, for what its UNet predicts.

    Where the last timestep is noise alone, the spacing is trailing, so that drawing begins at it (arXiv 2305.08891).

    Args:
        prediction_type: auto, epsilon or v_prediction.
        zero_terminal_snr: auto, on or off.

    Raises:
        ValueError: for zero terminal SNR without velocity, and for a base of EDM's with flags.
    """
    prediction_type, zero_terminal_snr = asked_prediction(base, prediction_type, zero_terminal_snr)
    own = prediction_of(scheduler)
    kind = own.kind if prediction_type == "auto" else prediction_type
    zero = zero_terminal_snr == "on" or (zero_terminal_snr == "auto" and own.zero_snr and kind != "epsilon")
    if zero and kind != "v_prediction":
        raise ValueError(
            f"--zero_terminal_snr on with a base that predicts {kind}: noise alone tells nothing of noise; leave it "
            "out, or say --prediction_type v_prediction if that is what it was trained for"
        )
    if prediction_type == zero_terminal_snr == "auto" and not zero:
        return scheduler
    if isinstance(scheduler, EDMEulerScheduler):
        raise ValueError(f"base {base} was trained in EDM's way: leave --prediction_type and --zero_terminal_snr out")
    cls = type(scheduler) if not zero or knows_zero_snr(type(scheduler)) else EulerDiscreteScheduler
    options = {"prediction_type": kind, "rescale_betas_zero_snr": zero}
    return cls.from_config(scheduler.config, **options, **({"timestep_spacing": "trailing"} if zero else {}))


def knows_zero_snr(scheduler: type[SchedulerMixin]) -> bool:
    """Whether a class of schedulers can end in noise alone."""
    return "rescale_betas_zero_snr" in inspect.signature(scheduler.__init__).parameters


def guidance_rescale_for(scheduler: SchedulerMixin) -> float:
    """Of a base, where nobody says another one."""
    return GUIDANCE_RESCALE if prediction_of(scheduler).zero_snr else 0.0
