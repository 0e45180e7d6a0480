"""Look into adapter files, convert, resize and merge them, and extract one out of two bases.

python -m inference.adapters inspect out/cat
python -m inference.adapters convert out/cat --to kohya --output cat.safetensors
python -m inference.adapters resize big.safetensors --energy 0.95 --output small.safetensors
python -m inference.adapters merge out/cat out/style --weights 1 0.6 --output both.safetensors
python -m inference.adapters merge out/cat --into out/base-with-cat
python -m inference.adapters extract --base BASE --tuned TUNED --rank 32 --output difference.safetensors

Whatever is written is read back and compared before it takes its place.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from settings.adapters import (
    COMMANDS,
    ConvertConfig,
    ExtractConfig,
    InspectConfig,
    MergeConfig,
    ResizeConfig,
)
from settings.command_line import exit_with, parse_config, quiet_libraries, run_command
from storage.files import check_kept, check_writable_target


def check_output(
    path: str, inputs: Sequence[tuple[str, str]], *, folder: bool, overwrite: bool, flag: str = "--output"
) -> None:
    """Raise ValueError where nothing can be written, or something is there that --overwrite doesn't give away."""
    check_kept([(kind, one) for kind, one in inputs if Path(one).exists()], [path])
    if os.path.lexists(path) and not overwrite:
        raise ValueError(f"{flag} {path} is there: add --overwrite to replace it, or name another place")
    check_writable_target(path, flag, folder=folder)


def adapters(config: ConvertConfig | ResizeConfig | MergeConfig) -> list[tuple[str, str]]:
    """The inputs that a message may name."""
    return [("adapter", path) for path in config.adapter]


def inspect(config: InspectConfig) -> None:
    quiet_libraries()
    from inference.adapter_facts import adapter_facts, facts_text

    found = [adapter_facts(Path(path)) for path in config.adapter]
    if config.json:
        print(json.dumps(found, indent=1, ensure_ascii=False))
    else:
        print("\n\n".join(map(facts_text, found)))


def convert(config: ConvertConfig) -> None:
    check_output(config.output, adapters(config), folder=config.to == "peft", overwrite=config.overwrite)
    quiet_libraries()  # which takes seconds: what can be refused has been
    from inference import adapter_work as work

    source = work.open_adapters(config.adapter, config.base, for_inner=config.to == "inner")
    if config.to == "inner":
        work.write_inner_of(source, Path(config.output))
    else:
        work.write_and_check(source, source.updates[0], Path(config.output), config.to, config.written_dtype)


def resize(config: ResizeConfig) -> None:
    check_output(config.output, adapters(config), folder=config.to == "peft", overwrite=config.overwrite)
    quiet_libraries()  # which takes seconds: what can be refused has been
    from inference import adapter_work as work

    source = work.open_adapters(config.adapter, config.base)
    config.to = config.to or source.form
    check_writable_target(config.output, "--output", folder=config.to == "peft")
    updates = work.compress(source.updates[0], config.rank, config.energy)
    work.write_and_check(source, updates, Path(config.output), config.to, config.written_dtype)


def merge(config: MergeConfig) -> None:
    place, flag = (config.output, "--output") if config.output else (str(config.into), "--into")
    folder = config.into is not None or config.to == "peft"
    inputs = adapters(config) + ([("--base", config.base)] if config.base else [])
    check_output(place, inputs, folder=folder, overwrite=config.overwrite, flag=flag)
    quiet_libraries()  # which takes seconds: what can be refused has been
    from inference import adapter_work as work

    if config.into is not None:
        work.merge_into_base(config.parts, config.base, Path(config.into), config.dtype)
        return
    source = work.open_adapters(config.adapter, config.base)
    config.to = config.to or source.form
    check_writable_target(place, flag, folder=config.to == "peft")
    updates = work.sum_of(source.updates, [weight for _, weight in config.parts])
    if config.rank is not None or config.energy is not None:
        updates = work.compress(updates, config.rank, config.energy)
    work.write_and_check(source, updates, Path(place), config.to, config.written_dtype)


def extract(config: ExtractConfig) -> None:
    inputs = [("--base", config.base), ("--tuned", config.tuned)]
    check_output(config.output, inputs, folder=config.to == "peft", overwrite=config.overwrite)
    quiet_libraries()
    from inference import adapter_extract

    adapter_extract.extract(config)


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    name = argv[0] if argv else ""
    if name in ("-h", "--help"):
        print(__doc__)
        print("commands, each with its own --help:")
        for command, config_class in COMMANDS.items():
            print(f"  {command:8} {config_class.__doc__}")
        sys.exit(0)
    if name not in COMMANDS:
        exit_with(f"{name or 'no command'}: choose one of {', '.join(COMMANDS)} (see --help)")
    config_class, rest = COMMANDS[name], argv[1:]
    if name != "extract" and (named := list(takewhile(lambda one: not one.startswith("-"), rest))):
        rest = ["--adapter", *named, *rest[len(named) :]]
    config = parse_config(
        config_class, rest, prog=f"python -m inference.adapters {name}", description=config_class.__doc__
    )
    command: Any = {"inspect": inspect, "convert": convert, "resize": resize, "merge": merge, "extract": extract}[name]
    run_command(lambda: command(config))


if __name__ == "__main__":
    main()
