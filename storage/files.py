"""Files that are either whole or not there, and what can be read of them without loading them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from storage.text import parse_json, read_text


def write_atomic(path: str | Path, data: bytes | str) -> Path:
    """Write bytes or UTF-8 text; a cut-off write leaves the old file as it was."""
    with replacing(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
    return Path(path)


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name in the same folder, which is synced and becomes ``path`` unless the body fails."""
    path = Path(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{cut_bytes(path.name, 200)}.", suffix=".part")
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes 0600, which a web server or a colleague can't read
        os.replace(temporary, path)
    except OSError as error:  # a full disk, most of all
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def cut_bytes(text: str, most: int) -> str:
    """The beginning of a text that takes at most so many bytes in UTF-8: file systems count those, up to 255 a name."""
    return text.encode()[:most].decode(errors="ignore")


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside ``path``, which takes its place unless the body fails; the old one is there until then.

    Files of the old one that the new one hasn't stay: somebody has put them there.
    """
    fresh, old = (path.with_name(f".{path.name}.{word}") for word in ("partial", "old"))
    if old.exists() and not path.exists():  # a process was killed between the two renames
        old.rename(path)
    for rest in (fresh, old):
        shutil.rmtree(rest, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        yield fresh
        if path.exists():
            move_others(path, fresh)
            path.rename(old)
        fresh.rename(path)
    finally:
        for rest in (fresh, old):
            shutil.rmtree(rest, ignore_errors=True)


def move_others(folder: Path, to: Path, known: Container[str] = ()) -> None:
    """Move the files of a folder that another one hasn't into it.

    Args:
        known: names, relative to the folder, of files to leave.
    """
    for file in sorted(path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()):
        name = file.relative_to(folder)
        if str(name) not in known and not os.path.lexists(to / name):
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            file.rename(to / name)


def check_kept(inputs: Iterable[tuple[str, str | Path]], written: Iterable[str | Path]) -> None:
    """Refuse to write where an input lies; links are followed.

    Args:
        inputs: (flag, path) of what flags name as input, files or folders, there or not.
        written: files that will be replaced, and folders that will be cleared.

    Raises:
        ValueError: naming the input and what would replace it.
    """
    places = [(place, Path(place).resolve()) for place in written]
    for flag, path in inputs:
        real = Path(path).resolve()
        if place := next((place for place, taken in places if real == taken or taken in real.parents), None):
            raise ValueError(
                f"{flag} {path} is an input, and {place} is written or cleared here: it would be lost; move it, or "
                "choose another place for what is written"
            )


def check_own_output(path: str | Path, flag: str, kind: str, own: Callable[[Path], bool]) -> None:
    """Raise ValueError for a file that is there and isn't what will be written: it is the user's.

    Args:
        kind: what this command writes there, for the message.
        own: says whether a file is that.
    """
    path = Path(path)
    if path.is_file() and path.stat().st_size and not own(path):
        raise ValueError(
            f"{flag}: {path} is there and is no {kind}, which would take its place: move it, or name another"
        )


def check_writable_target(path: str | Path, flag: str, folder: bool) -> None:
    """Raise ValueError unless `path` can become a folder (or a file) here; creates nothing."""
    path = Path(path)
    if folder and path.exists() and not path.is_dir():
        raise ValueError(f"{flag} {path} is a file, and a folder is needed: name another one")
    if not folder and path.is_dir():
        raise ValueError(f"{flag} {path} is a folder, and a file name is needed: for instance {path / 'gallery.html'}")
    parent = path if folder else path.parent
    while not parent.exists() and not parent.is_symlink():
        parent = parent.parent
    if not parent.is_dir():
        kind = "a broken link" if parent.is_symlink() else "a file"
        raise ValueError(f"{flag} {path} can't be made, because {parent} is {kind}: name another place")
    try:  # permissions say little: root has them all, and some file systems take nothing
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise ValueError(
            f"{flag} {path} can't be made, because {parent} is not writable: name another place"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A file that holds a JSON object.

    Raises:
        ValueError: if it holds none.
    """
    text = read_text(path)
    try:
        record = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} holds a JSON {type(record).__name__}, and an object is expected")
    return record
