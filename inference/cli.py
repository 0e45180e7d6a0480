"""What the commands share: a typed config as the command line, and errors as one sentence."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import diffusers
import transformers
from transformers import HfArgumentParser

Config = TypeVar("Config")
USER_ERROR = 2  # the exit status of argparse for a wrong command line, used for every mistake of the user


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage block of twenty flags."""
        print(f"error: {message} (see --help)", file=sys.stderr)
        sys.exit(USER_ERROR)


def parse_config(config_class: type[Config], argv: Sequence[str] | None = None, **parser_options) -> Config:
    """Build `config_class` from the command line; unknown or malformed flags exit with status 2.

    Abbreviated flags are refused, because a flag added later would change what an old command means.
    """
    parser = _Parser(config_class, allow_abbrev=False, **parser_options)
    return config_class(**vars(parser.parse_args(_join_negative_numbers(sys.argv[1:] if argv is None else argv))))


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
    """Run `command`; a ValueError or OSError is the user's, so it becomes one line on stderr and exit status 2."""
    try:
        command()
    except OSError as error:
        if error.strerror and error.filename is not None:
            _exit_with(f"{error.strerror}: {error.filename}")
        _exit_with(str(error))
    except ValueError as error:
        _exit_with(str(error))
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
