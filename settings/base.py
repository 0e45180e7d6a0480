"""Which base is trained on."""

from __future__ import annotations

from settings.record import FilePath, Record, option

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

    def download_options(self) -> dict[str, str]:
        """Keyword arguments of ``from_pretrained`` for the base."""
        options = {"revision": self.revision, "variant": self.variant, "cache_dir": self.cache_dir}
        return {name: value for name, value in options.items() if value is not None}
