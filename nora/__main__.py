"""``python -m nora --version``: which version this is, and of what it is built on."""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version

from . import __version__

BUILT_ON = ("torch", "peft", "transformers", "safetensors", "numpy")


def versions() -> str:
    """ "nora 0.3.0 (torch 2.13.0, …)"; a package that is not installed is left out."""
    found = []
    for package in BUILT_ON:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return f"nora {__version__} ({', '.join(found)})"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nora", description="NoRA as a method of PEFT: a library, used by `import nora`."
    )
    parser.add_argument("--version", action="version", version=versions())
    parser.parse_args()
    parser.print_help()


if __name__ == "__main__":
    main()
