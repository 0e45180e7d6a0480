"""The one-way flow between packages (CONTRIBUTING.md), read from the imports."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ABOVE = {"trainer", "tools", "train_dreambooth_nora_sdxl"}
FORBIDDEN = {
    "storage": {"nora", "diffusers", "dreambooth", "inference"} | ABOVE,
    "nora": {"diffusers", "dreambooth", "inference"} | ABOVE,
    "dreambooth": {"nora", "inference"} | ABOVE,
    "inference": {"dreambooth"} | ABOVE,
    "trainer": {"tools", "train_dreambooth_nora_sdxl"},
}


def imported_packages(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_import_only_what_lies_below(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    for path in files:
        assert not imported_packages(path) & FORBIDDEN[package], path


def test_no_pickles_and_no_heavy_weights():
    for path in (ROOT / "assets").rglob("*"):
        assert path.suffix not in {".pt", ".pth", ".ckpt", ".bin", ".pkl"}, path
    base = [path.stat().st_size for path in (ROOT / "assets" / "tiny-sdxl").rglob("*") if path.is_file()]
    assert 0 < sum(base) <= 25e6
