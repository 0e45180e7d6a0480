"""The one-way flow between packages (CONTRIBUTING.md), read from the imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = (  # from the ground up: a room imports those before it, but for what is forbidden beside
    "storage",
    "nora",
    "methods",
    "settings",
    "dreambooth",
    "runs",
    "inference",
    "judging",
    "trainer",
    "train_dreambooth_nora_sdxl",
    "tools",
)
BESIDE = {"nora": {"storage", "diffusers"}, "dreambooth": {"nora", "methods"}, "inference": {"dreambooth"}}
OLD_NAMES = {"inference/evaluate.py"}  # commands that moved; the file only calls the new one


def forbidden(room: str) -> set[str]:
    return set(ROOMS[ROOMS.index(room) + 1 :]) | BESIDE.get(room, set())


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("room", [room for room in ROOMS if (ROOT / room).is_dir()])
def test_rooms_import_only_what_lies_below(room):
    files = sorted((ROOT / room).rglob("*.py"))
    assert files
    for path in files:
        if str(path.relative_to(ROOT)) not in OLD_NAMES:
            assert not imported_packages(path) & forbidden(room), path


def test_no_pickles_and_no_heavy_weights():
    for path in (ROOT / "assets").rglob("*"):
        assert path.suffix not in {".pt", ".pth", ".ckpt", ".bin", ".pkl"}, path
    base = [path.stat().st_size for path in (ROOT / "assets" / "tiny-sdxl").rglob("*") if path.is_file()]
    assert 0 < sum(base) <= 25e6
