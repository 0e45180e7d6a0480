"""Files that are either whole or not there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_atomic(path: str | Path, data: bytes | str) -> Path:
    """Write to a temporary name in the same folder, fsync, rename: a cut-off write leaves the old file as it was."""
    path = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes 0600, which a web server or a colleague can't read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def check_writable_target(path: str | Path, flag: str, folder: bool) -> None:
    """Raise ValueError unless `path` can become a folder (or a file) here; creates nothing."""
    path = Path(path)
    if folder and path.exists() and not path.is_dir():
        raise ValueError(f"{flag} {path} is a file, and a folder is needed: name another one")
    if not folder and path.is_dir():
        raise ValueError(f"{flag} {path} is a folder, and a file name is needed: for instance {path / 'gallery.html'}")
    parent = path if folder else path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise ValueError(f"{flag} {path} can't be made, because {parent} is a file: name another place")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{flag} {path} can't be made, because {parent} is not writable: name another place")
