"""Which parts of an SDXL pipeline carry adapters, and how their layers are spelled in adapter files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

FOLDED_WEIGHTS = "pytorch_lora_weights.safetensors"
INNER_WEIGHTS = "nora_inner_weights.safetensors"
EMBEDDINGS = "learned_embeds.safetensors"
RUN_RECORD = "run.json"
BEST = "best"  # folder of the best adapter inside a run's, where the run was scored
BEST_SCORES = "scores.json"  # in it: the step, and what it reached

COMPONENT_NAMES = ("unet", "text_encoder", "text_encoder_2")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
# Keys of learned embeddings, as diffusers' advanced DreamBooth script writes them -> text encoder and tokenizer.
ENCODERS = {"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}
# The attention layers, which every method adapts by default, by the ends of their paths.
TARGETS: dict[str, tuple[str, ...]] = {
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
    **dict.fromkeys(TEXT_ENCODERS, ("q_proj", "k_proj", "v_proj", "out_proj")),
}
_FEED_FORWARD: dict[str, tuple[str, ...]] = {
    "unet": ("ff.net.0.proj", "ff.net.2"),
    **dict.fromkeys(TEXT_ENCODERS, ("fc1", "fc2")),
}
_OTHER_LINEAR: dict[str, tuple[str, ...]] = {
    "unet": ("proj_in", "proj_out", "time_emb_proj", "linear_1", "linear_2"),
    "text_encoder": (),
    "text_encoder_2": ("text_projection",),
}
TARGET_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "attention": TARGETS,
    "attention-mlp": {name: (*ends, *_FEED_FORWARD[name]) for name, ends in TARGETS.items()},
    "all-linear": {name: (*ends, *_FEED_FORWARD[name], *_OTHER_LINEAR[name]) for name, ends in TARGETS.items()},
}


def adapter_components(pipeline: Any | Mapping[str, nn.Module | None]) -> dict[str, nn.Module]:
    """The modules that can carry an adapter, by the prefix of their keys in diffusers' LoRA files.

    A layer's key is `{prefix}.{module path}.lora_A.weight`. The file format says `text_encoder.text_model.encoder…`,
    but transformers 5 dropped the `text_model` level inside `CLIPTextModel` and kept it inside
    `CLIPTextModelWithProjection`; the prefix makes up for the level wherever the module lacks it.

    Args:
        pipeline: an SDXL pipeline, or a mapping with any of the keys unet, text_encoder, text_encoder_2.
            Parts that are absent or None are left out.
    """
    if isinstance(pipeline, Mapping):
        modules = {name: pipeline.get(name) for name in COMPONENT_NAMES}
    else:
        modules = {name: getattr(pipeline, name, None) for name in COMPONENT_NAMES}
    components = {}
    for name, module in modules.items():
        if module is None:
            continue
        lacks_level = name.startswith("text_encoder") and not hasattr(module, "text_model")
        components[f"{name}.text_model" if lacks_level else name] = module
    return components
