"""What the commands share: records as the command line, and errors as one sentence. Imports no torch."""

from __future__ import annotations

import argparse
import io
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, TypeVar

from settings.record import Record
from storage.text import expand_home, first_line, load_yaml

Config = TypeVar("Config")
USER_ERROR = 2  # the exit status of argparse for a wrong command line, used for every mistake of the user
TRUE, FALSE = ("true", "yes", "1", "t", "y", "on"), ("false", "no", "0", "f", "n", "off")


class Flag(NamedTuple):
    """One flag: what a record's field or a dataclass's says of it."""

    name: str
    annotation: Any
    default: Any  # MISSING: required
    help: str
    aliases: tuple[str, ...] = ()
    extends: bool = False  # a list that grows where the flag is given again

    @property
    def type(self) -> Any:
        """Of a value, or of each where there are several."""
        return _plain(_arguments(self.annotation)[0]) if self.is_list else self.annotation

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.annotation) is list


def _plain(annotation: Any) -> Any:
    """The type without limits and without None."""
    if typing.get_origin(annotation) is typing.Annotated:
        return _plain(_arguments(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return _plain(next(one for one in _arguments(annotation) if one is not types.NoneType))
    return annotation


def _arguments(annotation: Any) -> tuple[Any, ...]:
    return typing.get_args(annotation)


def record_flags(record: type[Record]) -> Iterator[Flag]:
    """A record's flags, in its order."""
    for name, field in record.model_fields.items():
        default = MISSING if field.is_required() else field.default
        yield Flag(name, _plain(field.annotation), default, field.description or "")


def dataclass_flags(config_class: type[Any]) -> Iterator[Flag]:
    """A dataclass's flags; metadata holds help, aliases and ``action: extend``."""
    hints = typing.get_type_hints(config_class, include_extras=True)
    for field in fields(config_class):
        meta = field.metadata
        extends = meta.get("action") == "extend"
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        yield Flag(
            field.name,
            _plain(hints[field.name]),
            default,
            meta.get("help", ""),
            tuple(meta.get("aliases", ())),
            extends,
        )


def flag_groups(config_class: type[Any]) -> dict[str, list[Flag]]:
    """Title -> flags: a group a record where a configuration is made of these, else one."""
    hints = typing.get_type_hints(config_class)
    if all(isinstance(hint, type) and issubclass(hint, Record) for hint in hints.values()):
        return {(hint.__doc__ or "").strip().split("\n")[0]: list(record_flags(hint)) for hint in hints.values()}
    return {"options": list(dataclass_flags(config_class))}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of argparse's usage block of twenty flags."""
        exit_with(f"{message} (see --help)")


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _format_usage(self, usage, actions, groups, prefix):
        return f"usage: {self._prog} --flag value …   (or --config run.yaml, with the same names)\n\n"


def _boolean(text: str) -> bool:
    known = {**dict.fromkeys(TRUE, True), **dict.fromkeys(FALSE, False)}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f"{text!r} must be true or false")
    return known[text.lower()]


def _add(group: argparse._ActionsContainer, flag: Flag, required: bool) -> None:
    """The flag in both spellings, with underscores and with dashes; argparse shows the first."""
    names = [f"--{flag.name}", *flag.aliases]
    names += [name for spelled in list(names) if (name := "--" + spelled[2:].replace("_", "-")) not in names]
    shown = "" if flag.default in (None, MISSING, False) or "Default" in flag.help else f" Default: {flag.default}."
    options: dict[str, Any] = {
        "dest": flag.name,
        "help": (flag.help + shown).replace("%", "%%"),
        "default": argparse.SUPPRESS,
    }
    if flag.type is bool:
        group.add_argument(*names, type=_boolean, nargs="?", const=True, metavar="BOOL", **options)
        if flag.default is True:
            negative = [f"--no_{flag.name}", f"--no-{flag.name.replace('_', '-')}"]
            group.add_argument(*negative, action="store_false", **options | {"help": argparse.SUPPRESS})
        return
    if typing.get_origin(flag.type) is Literal:
        choices = _arguments(flag.type)
        options |= {"choices": choices, "type": type(choices[0]), "metavar": "{" + ",".join(map(str, choices)) + "}"}
    else:
        options |= {"type": flag.type, "metavar": {int: "N", float: "X"}.get(flag.type, "TEXT")}
    if flag.is_list:
        options |= {"nargs": "+", "action": "extend" if flag.extends else "store"}
    group.add_argument(*names, required=required and flag.default is MISSING, **options)


def parse_flags(config_class: type[Any], argv: Sequence[str] | None = None, **parser_options: Any) -> dict[str, Any]:
    """The flags that a command line and its ``--config`` give, by name; unknown or malformed ones exit with status 2.

    ``--config run.yaml`` holds flags by name; what the command line says wins over it. Abbreviated flags are refused,
    because a flag added later would change what an old command means.
    """
    argv = _join_negative_numbers(sys.argv[1:] if argv is None else argv)
    groups = flag_groups(config_class)
    file, _ = _config_option().parse_known_args(argv)
    from_file: dict[str, Any] = {}
    if file.config is not None:
        one_value = {flag.name for flags in groups.values() for flag in flags if not flag.is_list}
        try:
            arguments = read_config_file(expand_home(file.config), one_value)
        except OSError as error:
            exit_with(f"--config {file.config} can't be read: {error.strerror}")
        except ValueError as error:
            exit_with(str(error))
        from_file = vars(_parser(groups, every_list_grows=True).parse_args(arguments))
    given = vars(_parser(groups, said_already=from_file, **parser_options).parse_args(argv))
    given.pop("config", None)
    return from_file | given


def _parser(
    groups: Mapping[str, Sequence[Flag]],
    said_already: Collection[str] | None = None,
    every_list_grows: bool = False,
    **parser_options: Any,
) -> _Parser:
    """A parser of these flags; what a file has said already, the command line need not.

    Args:
        said_already: None: nothing need be said, and ``--config`` can't be.
    """
    parser = _Parser(allow_abbrev=False, formatter_class=_Help, **parser_options)
    for title, flags in groups.items():
        group = parser if title == "options" else parser.add_argument_group(title)
        for flag in flags:
            if every_list_grows:
                flag = flag._replace(extends=flag.is_list)
            _add(group, flag, required=said_already is not None and flag.name not in said_already)
    if said_already is not None:
        help = "File of flags, by name; the command line wins over it."
        parser.add_argument("--config", metavar="YAML", default=argparse.SUPPRESS, help=help)
    return parser


def parse_config(config_class: type[Config], argv: Sequence[str] | None = None, **parser_options: Any) -> Config:
    """A dataclass, or a configuration made of records, from the command line; what is wrong exits with status 2."""
    given = parse_flags(config_class, argv, **parser_options)
    try:
        return config_class.of(**given) if hasattr(config_class, "of") else config_class(**given)
    except ValueError as error:
        exit_with(str(error))


def _config_option() -> argparse.ArgumentParser:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


def read_config_file(path: str | Path, one_value: Collection[str] = ()) -> list[str]:
    """A YAML mapping of flag names to values, as the arguments that say the same, a list's values one by one.

    Args:
        one_value: flags that take no list.

    Raises:
        ValueError: if the file is no such mapping.
    """
    values = load_yaml(path, "--config")
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"--config {path} must map flag names to values, such as learning_rate: 1e-4")
    arguments: list[str] = []
    spelled: dict[str, str] = {}
    for name, value in values.items():
        if (flag := name.replace("-", "_")) in spelled:
            raise ValueError(f"--config {path}: {spelled[flag]} and {name} are the same flag: leave one out")
        spelled[flag] = name
        if isinstance(value, dict):
            raise ValueError(f"--config {path}: {name} is a mapping, and flags take a value or a list of them")
        if isinstance(value, list) and flag in one_value:
            raise ValueError(f"--config {path}: {name} is a list, and this flag takes one value")
        several = value if isinstance(value, list) else [value] if value is not None else []
        if any(one is None or isinstance(one, list | dict) for one in several):
            raise ValueError(f"--config {path}: {name} has a list, a mapping or nothing among its values")
        arguments += [f"--{name}={one}" for one in several]  # with "=", because a value may begin with a dash
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
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be in no encoding, as stderr knows
    try:
        command()
    except OSError as error:
        if error.strerror and error.filename is not None:
            exit_with(f"{error.strerror}: {error.filename}")
        exit_with(str(error))
    except ValueError as error:
        exit_with(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported here
            raise
        reason = first_line(error).removesuffix(".")
        exit_with(f"{reason}: lower --batch_size or the size, use --dtype fp16, or free the GPU of other programs")


def exit_with(message: str) -> NoReturn:
    """One line on stderr, and the exit status of a user's mistake."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(USER_ERROR)


def quiet_libraries() -> None:
    """Keep the libraries' notices and inner progress bars off the terminal; errors stay, and so do download bars."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
