"""The distribution nora-peft: what is in its wheel, and that it works without the checkout."""

import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

import nora

ROOT = Path(__file__).parent.parent
# the build backend that is installed, if there is one: that needs no package index
HERE = ["--no-build-isolation"] if find_spec("setuptools") and int(version("setuptools").split(".")[0]) >= 77 else []
CLIENT = Path(__file__).with_name("package_client.py")


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy of the checkout with all its rooms, so that building leaves nothing in the checkout."""
    source, built = tmp_path_factory.mktemp("source") / "checkout", tmp_path_factory.mktemp("wheel")
    ignored = shutil.ignore_patterns(".git", ".venv", "assets", "build", "*.egg-info", "out")
    shutil.copytree(ROOT, source, ignore=ignored)
    process = pip("wheel", "--no-deps", *HERE, "--wheel-dir", built, source)
    if process.returncode and "Could not find a version that satisfies the requirement setuptools" in process.stderr:
        pytest.skip("setuptools 77 is not installed and no package index can be reached, so no wheel can be built")
    assert process.returncode == 0, process.stderr
    (path,) = built.iterdir()
    return path


def test_the_wheel_holds_nora_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    info = f"nora_peft-{nora.__version__}.dist-info/"
    assert wheel.name == f"nora_peft-{nora.__version__}-py3-none-any.whl"
    own = {f"nora/{path.name}" for path in (ROOT / "nora").iterdir() if path.suffix == ".py"} | {"nora/py.typed"}
    assert {name for name in names if not name.startswith(info)} == own
    assert f"{info}licenses/LICENSE" in names


def test_the_wheel_requires_ranges_and_nothing_of_the_suite(wheel):
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read(f"nora_peft-{nora.__version__}.dist-info/METADATA").decode()
    metadata = Parser().parsestr(text)
    required = [one.replace(" ", "") for one in metadata.get_all("Requires-Dist")]
    ranges = {"torch>=2.6", "peft<0.22,>=0.21", "transformers<5.24,>=5", "safetensors<1,>=0.5", "numpy<3,>=1.26"}
    assert sorted(required) == sorted(ranges)
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.10"
    assert "NoRA, nested low-rank adaptation" in metadata.get_payload()


def test_the_installed_package_works_outside_the_checkout(wheel, tmp_path):
    target, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    installed = pip("install", "--no-deps", "--target", target, wheel)
    assert installed.returncode == 0, installed.stderr
    client = shutil.copy(CLIENT, elsewhere)
    environment = {**os.environ, "PYTHONPATH": str(target), "HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, client, str(elsewhere)]
    process = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == [nora.__version__, str(target / "nora")]
    assert not (tmp_path / "home").exists()  # no cache of anybody's


def test_the_version_is_said_with_what_it_is_built_on(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nora", "--version"])
    with pytest.raises(SystemExit) as end:
        runpy.run_module("nora", run_name="__main__")
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(
        f"nora {nora.__version__} (torch {version('torch')}, peft {version('peft')}"
    )
