"""What the commands share: a typed config as the command line, and errors as one sentence."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import diffusers
import torch
import transformers
import yaml
from transformers import HfArgumentParser

from storage.files import load_yaml

Config = TypeVar("Config")
USER_ERROR = 2  # the exit status of argparse for a wrong command line, used for every mistake of the user


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage block of twenty flags."""
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(USER_ERROR)


def parse_config(config_class: type[Config], argv: Sequence[str] | None = None, **parser_options) -> Config:
    """Build `config_class` from the command line; unknown or malformed flags exit with status 2.

    ``--config run.yaml`` holds flags by name; what the command line says wins over it. Abbreviated flags are refused,
    because a flag added later would change what an old command means.
    """
    parser = _Parser(config_class, allow_abbrev=False, **parser_options)
    parser.add_argument("--config", metavar="YAML", help="File of flags, by name; the command line wins over it.")
    argv = _join_negative_numbers(sys.argv[1:] if argv is None else argv)
    file, _ = _config_option().parse_known_args(argv)
    if file.config is not None:
        try:
            one_value = {field.name for field in fields(config_class) if "list[" not in str(field.type)}
            argv = [*read_config_file(file.config, one_value, _given(config_class, argv)), *argv]
        except OSError as error:
            _exit_with(f"--config {file.config} can't be read: {error.strerror}")
        except ValueError as error:
            _exit_with(str(error))
    options = vars(parser.parse_args(argv))
    del options["config"]
    return config_class(**options)


def _config_option() -> argparse.ArgumentParser:
    parser = _Parser([], add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


def _given(config_class: type[Any], argv: Sequence[str]) -> set[str]:
    """The flags that a command line gives, under all of their names."""
    words = {_flag_name(argument.partition("=")[0]) for argument in argv if argument.startswith("--")}
    names = [{field.name, *map(_flag_name, field.metadata.get("aliases", ()))} for field in fields(config_class)]
    return {name for several in names if several & words for name in several}


def _flag_name(spelled: str) -> str:
    return spelled.lstrip("-").replace("-", "_")


def read_config_file(path: str | Path, one_value: Collection[str] = (), overruled: Collection[str] = ()) -> list[str]:
    """A YAML mapping of flag names to values, as the arguments that say the same.

    Args:
        one_value: flags that take no list.
        overruled: flags to leave out: argparse would add the command line's list to the file's.

    Raises:
        ValueError: if the file is no such mapping.
    """
    try:
        values = load_yaml(Path(path))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path} is not YAML: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"--config {path} must map flag names to values, such as learning_rate: 1e-4")
    arguments = []
    for name, value in values.items():
        if isinstance(value, dict):
            raise ValueError(f"--config {path}: {name} is a mapping, and flags take a value or a list of them")
        if isinstance(value, list) and name in one_value:
            raise ValueError(f"--config {path}: {name} is a list, and this flag takes one value")
        if _flag_name(name) in overruled:
            continue
        if isinstance(value, list):
            arguments += [f"--{name}", *map(str, value)]
        elif value is not None:
            arguments.append(f"--{name}={value}")
    return arguments


def _join_negative_numbers(argv: Sequence[str]) -> list[str]:
    """``--flag -1e-4`` as ``--flag=-1e-4``: before Python 3.14 argparse takes -1e-4 for a flag, and says so badly."""
    joined: list[str] = []
    for argument in argv:
        if re.fullmatch(r"-[\d.]+e[+-]?\d+", argument, re.IGNORECASE) and joined and joined[-1].startswith("--"):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def run_command(command: Callable[[], None]) -> None:
    """Run `command`; a ValueError or OSError is the user's, so it becomes one line on stderr and exit status 2.

    So does a GPU's memory that runs out: models that are loaded or merged fill it as well as pictures do.
    """
    try:
        command()
    except OSError as error:
        if error.strerror and error.filename is not None:
            _exit_with(f"{error.strerror}: {error.filename}")
        _exit_with(str(error))
    except ValueError as error:
        _exit_with(str(error))
    except torch.OutOfMemoryError as error:
        reason = str(error).strip().split("\n")[0].removesuffix(".")
        _exit_with(f"{reason}: lower --batch_size or the size, use --dtype fp16, or free the GPU of other programs")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _exit_with(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(USER_ERROR)


def quiet_libraries() -> None:
    """Keep the libraries' notices and inner progress bars off the terminal; errors stay, and so do download bars."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
