"""The statistics of a pipeline's base, for inner-only files that leave them out."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionXLPipeline
from torch import nn

from methods.base_passes import (
    LABEL,
    encode_generic_prompts,
    generic_tokens,
    run_generic_prompts,
    run_own_pictures,
    text_identity,
    unet_identity,
)
from methods.base_statistic import base_statistic
from methods.components import TEXT_ENCODERS
from nora import NoraConfig
from nora.files import BaseStatistics


def base_statistics(pipeline: StableDiffusionXLPipeline) -> BaseStatistics:
    """For `nora.read_inner`: from the user's cache, or measured by the pipeline's parts, with their adapters off."""

    def of_component(label: str, prefix: str, model: nn.Module, config: NoraConfig) -> dict[str, torch.Tensor]:
        if label != LABEL:
            raise ValueError(
                f"the file's basis comes from the passes {label!r}, and this code has {LABEL!r}: update the code, or "
                "load the run's folded file"
            )
        component = prefix.removesuffix(".text_model")

        def passes() -> None:
            if component == "unet":
                run_own_pictures(model, encode_generic_prompts(pipeline), pipeline.scheduler)
            else:  # nothing may be encoded here: what is measured hears all
                run_generic_prompts(model, generic_tokens(pipeline)[TEXT_ENCODERS.index(component)])

        identity = unet_identity(text_identity(pipeline), pipeline.scheduler) if component == "unet" else ""
        return base_statistic(model, config, label, identity, passes)

    return of_component
