"""Puts NORA among PEFT's own methods, so that every PEFT call that takes a config or reads a saved one knows it.

PEFT 0.21 offers `register_peft_method`, but it refuses names that are not in the `PeftType` enum, and the enum has no
hook to extend it: a member is made by hand. A plain string would not do: transformers reads ``peft_type.value``.

A field such as ``LoraConfig.use_nora``, which a proposal for PEFT has for normalised LoRA, another method, is no clash.
"""

from __future__ import annotations

from importlib.metadata import version

from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "NORA"


def ensure_peft_type() -> None:
    """Add ``PeftType.NORA`` unless it is there already."""
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_ = member._value_ = NAME
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    if hasattr(PeftType, "_hashable_values_"):  # Python 3.13 looks values up here
        PeftType._hashable_values_.append(NAME)  # type: ignore[attr-defined]


def register(config_cls: type[PeftConfig], model_cls: type[BaseTuner]) -> None:
    """Register the method. Importing the package twice is harmless.

    Raises:
        ImportError: if the installed PEFT has a method of that name that isn't this one.
    """
    registered = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType[NAME])
    if registered is None:
        register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=model_cls, prefix=model_cls.prefix)
    elif (registered.__module__, registered.__qualname__) != (model_cls.__module__, model_cls.__qualname__):
        theirs = f"{registered.__module__}.{registered.__qualname__}"
        raise ImportError(
            f"peft {version('peft')} has a method {NAME} of its own ({theirs}), and neither it nor this package reads "
            "what the other saves: install an earlier peft, such as 0.21.2, or use PEFT's own without importing nora"
        )
