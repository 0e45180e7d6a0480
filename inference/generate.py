"""Draw prompts × seeds × scales from SDXL and adapters into a folder; the library is `inference.sampling`.

python -m inference.generate --adapter out/cat --prompt "[V] photo of a cat in the jungle" --num_images 4
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from inference.manifest import (
    MANIFEST,
    image_names,
    image_record,
    read_manifest,
    text_digest,
    write_image,
    write_manifest,
    written_record,
)
from settings.command_line import parse_config, quiet_libraries, run_command
from settings.sampling import GenerateConfig
from storage.files import check_writable_target

# Names that were here before the library had a module of its own; importing them imports PyTorch.
MOVED = ("GeneratedImage", "PromptEmbeds", "Refiner", "encode_prompts", "generate_images")


def __getattr__(name: str) -> Any:
    if name in MOVED:
        return getattr(import_module("inference.sampling"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def run(config: GenerateConfig) -> Path:
    """Draw, save and list the images; returns the folder. Everything is checked before the pipeline is loaded."""
    prompts, seeds, folder = config.all_prompts(), config.all_seeds(), config.output_folder()
    adapters = config.weighted_adapters()
    config.check_ranges(prompts, seeds)

    # PyTorch and diffusers take seconds to import: wrong flags have been refused by now
    quiet_libraries()
    from inference.adapter_facts import warn_of_missing_words
    from inference.load import load_adapter, set_adapter_scale
    from inference.pipelines import check_hardware, choose_base, merge_and_offload, pipeline_for, refiner_for
    from inference.sampling import generate_images, warn_of_truncated_prompts

    check_hardware(config)
    for path in adapters:
        warn_of_missing_words(path, prompts)
    config = choose_base(config, next(iter(adapters), None))
    check_writable_target(folder, "--output", folder=True)
    listed = {record["file"]: record for record in read_manifest(folder)}

    pipeline = pipeline_for(config)
    # named by number, because folders of two runs may have one name
    names = {
        load_adapter(pipeline, path, weight * config.scales[0], f"adapter_{number}"): path
        for number, (path, weight) in enumerate(adapters.items())
    }
    refiner = refiner_for(config, pipeline)
    for one in (pipeline, *([refiner.pipeline] if refiner else [])):
        merge_and_offload(config, one)
    warn_of_truncated_prompts(pipeline, prompts)
    stems, records = image_names(prompts), []
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for scale in config.scales:
            if not config.fuse:
                for name, path in names.items():
                    set_adapter_scale(pipeline, name, adapters[path] * scale)
            suffix = f"-scale{repr(scale).removesuffix('.0')}" if len(config.scales) > 1 else ""
            for drawn in generate_images(pipeline, prompts, seeds, refiner=refiner, **config.sampling_options()):
                name = f"{stems[drawn.prompt]}-seed{drawn.seed}{suffix}.png"
                record = image_record(config, pipeline, drawn, name, adapters, scale) | {"fuse": config.fuse}
                if (folder / name).exists() and record not in (listed.get(name), written_record(folder / name)):
                    # another picture has the name, of this command or of the user's: it stays
                    record["file"] = f"{Path(name).stem}-{text_digest(json.dumps(record))}.png"
                write_image(folder, record, drawn.image)
                records.append(record)
    finally:
        write_manifest(folder, records)  # also when interrupted: the images drawn so far are listed
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(
        GenerateConfig, argv, prog="python -m inference.generate", description="Sample images from SDXL and an adapter."
    )

    def command() -> None:
        folder = run(config)
        print(f"{folder}: {len(list(folder.glob('*.png')))} images, listed in {MANIFEST}")

    run_command(command)


if __name__ == "__main__":
    main()
