"""What can be refused before the base is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from dreambooth.prepare import Pictures, read_pictures
from inference.base import base_geometry, check_base
from settings.training import TrainConfig
from storage.files import check_writable_target
from trainer.optimizer import check_optimizer


def preflight(config: TrainConfig) -> tuple[TrainConfig, Pictures]:
    """The flags with what follows from them and from the base's configuration, and the pictures; writes nothing.

    Raises:
        ValueError: for anything wrong with the flags, the pictures or the base's configuration.
    """
    config = config.resolved()
    config.check()
    check_optimizer(config)
    check_base(config.pretrained_model_name_or_path)
    check_writable_target(Path(config.output_dir), "--output_dir", folder=True)
    resolution, granularity = base_geometry(config.pretrained_model_name_or_path, **config.download_options())
    config = replace(config, resolution=config.resolution or resolution)
    return config, read_pictures(config, granularity)
