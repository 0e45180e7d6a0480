"""Which base is trained on."""

from __future__ import annotations

from typing import Literal

from settings.record import AtLeast0, FilePath, Record, option

PREDICTION_TYPE_HELP = (
    "What the base's UNet predicts. auto: as the keys v_pred and ztsnr of a single file say, or the configuration of "
    "its scheduler."
)
ZERO_SNR_HELP = (
    "Whether the last timestep is noise alone (arXiv 2305.08891), as most bases that predict velocity were trained. "
    "auto: as the base says; a single file without keys says no."
)
BASE_CONFIG_HELP = (
    "Configurations and tokenizers of a base in a single file: a diffusers folder or a Hub id. Default: SDXL's, from "
    "the Hub."
)
CLIP_SKIP_HELP = (
    "Layers of both text encoders that prompts skip, in diffusers' meaning: 0 is SDXL's own last but one (A1111's 2), "
    "1 the one before (A1111's 3). Negative and empty prompts skip none."
)
WHICH_BASE = "SDXL: a diffusers folder, a Hub id or a .safetensors file."


class BaseOptions(Record):
    """The base"""

    pretrained_model_name_or_path: FilePath = option(..., WHICH_BASE)
    pretrained_vae_model_name_or_path: FilePath | None = option(
        None, "Another autoencoder: a folder or a Hub id, such as madebyollin/sdxl-vae-fp16-fix."
    )
    revision: str | None = option(None, "Revision of a base on the Hub; not applied to another autoencoder.")
    variant: str | None = option(None, "Variant of the base's files, such as fp16; not applied to another autoencoder.")
    cache_dir: FilePath | None = option(None, "Where downloads are kept.")
    base_config: FilePath | None = option(None, BASE_CONFIG_HELP)
    prediction_type: Literal["auto", "epsilon", "v_prediction"] = option("auto", PREDICTION_TYPE_HELP)
    zero_terminal_snr: Literal["auto", "on", "off"] = option("auto", ZERO_SNR_HELP)
    clip_skip: AtLeast0 = option(0, CLIP_SKIP_HELP)

    def download_options(self) -> dict[str, str]:
        """Keyword arguments of ``from_pretrained`` for the base, and of a single file's configuration."""
        names = ("revision", "variant", "cache_dir", "base_config")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def loading_options(self) -> dict[str, str]:
        """The same, and what the base predicts: keyword arguments of `inference.base.load_pipeline`."""
        predicts = {"prediction_type": self.prediction_type, "zero_terminal_snr": self.zero_terminal_snr}
        return self.download_options() | predicts
