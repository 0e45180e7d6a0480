"""What a key of an adapter file says by its ending, and what a file is that holds no adapter for SDXL."""

from __future__ import annotations

import re
from collections.abc import Collection

# Ending -> which tensor of a layer it is. The longest that fits is meant.
PARTS = {
    # PEFT; kohya; diffusers from 2023 on, before and after its layers had a name
    **dict.fromkeys((".lora_A.weight", ".lora_down.weight", ".lora.down.weight", "_lora.down.weight"), "down"),
    **dict.fromkeys((".lora_B.weight", ".lora_up.weight", ".lora.up.weight", "_lora.up.weight"), "up"),
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_B.bias": "up_bias",
    ".alpha": "alpha",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".dora_scale": "dora_scale",
    **{f".{name}": name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")},
    **{f".{name}": name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")},
    ".lokr_t2": "lokr_t2",
    ".diff": "diff",
    ".diff_b": "diff_b",
}
# Ending -> a kind of adapter that such files can hold and that is not read from them.
REFUSED = {
    **dict.fromkeys((".oft_blocks", ".oft_diag", ".rescale"), "OFT or BOFT"),
    **dict.fromkeys((".a1.weight", ".a2.weight", ".b1.weight", ".b2.weight", ".bm.weight"), "GLoRA"),
    **dict.fromkeys((".w_norm", ".b_norm"), "changes of norm layers"),
    ".on_input": "(IA)³",
    ".set_weight": "replaced weights",
}


def _ending(endings: Collection[str]) -> re.Pattern[str]:
    ordered = sorted(endings, key=len, reverse=True)
    return re.compile(rf"(?P<layer>.+?)(?P<ending>{'|'.join(map(re.escape, ordered))})")


_PART, _REFUSED = _ending(PARTS), _ending(REFUSED)


def split_key(key: str) -> tuple[str, str] | None:
    """(layer's name, which of its tensors), or None for a key of another form."""
    match = _PART.fullmatch(key)
    return (match["layer"], PARTS[match["ending"]]) if match else None


def refused_kind(key: str) -> str | None:
    """The kind of adapter that a key is of, where that kind is not read from such files."""
    match = _REFUSED.fullmatch(key)
    return REFUSED[match["ending"]] if match else None


_OTHER = "and this base is an SDXL"
_FOREIGN = (  # a pattern that one key of the file matches -> what the file is
    (
        r"base_model\.model\..*",
        "the weights of a PEFT folder without the adapter_config.json that says how they act: put it beside the file",
    ),
    (r".*(single_transformer_blocks|double_blocks|single_blocks).*", f"an adapter of Flux, {_OTHER}"),
    (r".*(joint_blocks|norm1_context).*|(lora_)?transformer[._].*", f"an adapter of SD3 or its like, {_OTHER}"),
    (r"lora_te_.*", f"an adapter of Stable Diffusion 1 or 2, {_OTHER}"),
    (
        r".*((up|down)_blocks[._]3|output_blocks[._](9|1\d)[._]).*",
        f"an adapter of Stable Diffusion 1 or 2, {_OTHER}",
    ),
    (r"bundle_emb\..*|clip_[lg]|emb_params|string_to_param.*", "a textual inversion (load_textual_inversion)"),
    (r".*(lllite_|control_model\.|controlnet).*", "a ControlNet"),
    (r"model\.diffusion_model\..*|conditioner\.embedders\..*", "a whole model (--base)"),
    (r"first_stage_model\..*|(en|de)coder\.(conv_in|down|up|mid).*|(post_)?quant_conv\..*", "an autoencoder (--vae)"),
)


def what_it_is(keys: Collection[str]) -> str | None:
    """What a file is, told by its keys, if it is no adapter for SDXL."""
    for pattern, kind in _FOREIGN:
        if any(re.fullmatch(pattern, key) for key in keys):
            return kind
    return None
