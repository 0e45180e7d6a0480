"""Run PEFT's own tests of its methods (tests/test_custom_models.py) with NoRA as one more method.

    python -m tools.peft_own_tests PEFT [pytest arguments]

PEFT is a checkout or an unpacked sdist of the installed release (pip download --no-binary :all: --no-deps peft).
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest

FILES = ("testing_common.py", "testing_utils.py", "test_custom_models.py")
CASES = """
from nora import NoraConfig

TEST_CASES = [
    ("MLP NoRA, one layer by name", "MLP", NoraConfig, {"target_modules": "lin0"}),
    ("MLP NoRA, one layer in a list", "MLP", NoraConfig, {"target_modules": ["lin0"]}),
    ("MLP NoRA, the small layer", "MLP", NoraConfig, {"target_modules": ["lin1"], "r": 2}),
    ("MLP NoRA, two layers", "MLP", NoraConfig, {"target_modules": ["lin0", "lin1"], "r": 2}),
    ("MLP NoRA, modules_to_save", "MLP", NoraConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("MLP NoRA, random", "MLP", NoraConfig, {"target_modules": ["lin0"], "outer_init": "random"}),
    ("Conv1D NoRA", "EmbConv1D", NoraConfig, {"target_modules": ["conv1d"], "r": 1}),
]
MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [
    ("NoRA same", "nora", NoraConfig, *2 * ({"target_modules": ["lin0"], "init_weights": False},)),
    (
        "NoRA different",
        "nora",
        NoraConfig,
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin1"], "init_weights": False, "r": 2},
    ),
]
ALL_PEFT_CONFIG_CLASSES = [NoraConfig]
"""
MIXED = "MIXED_ADAPTER_TEST_CASES = ["
MIXED_CASE = """
    (
        "NoRA mixed adapter",
        NoraConfig(target_modules=["lin0"], init_weights=False),
        NoraConfig(target_modules=["lin0"], r=4, init_weights=False),
    ),"""


def main(argv: list[str]) -> int:
    source = Path(argv[0]) / "tests"
    with tempfile.TemporaryDirectory() as folder:
        tests = Path(folder) / "tests"
        tests.mkdir()
        (tests / "__init__.py").touch()
        for name in FILES:
            text = (source / name).read_text(encoding="utf-8")
            if name == FILES[-1]:  # PEFT's own cases are PEFT's to run
                head, mark, tail = text.partition("\nclass ")
                text = (head + CASES + mark + tail).replace(MIXED, MIXED + MIXED_CASE)
            (tests / name).write_text(text, encoding="utf-8")
        print(f"peft {version('peft')}, tests of {source.parent}")
        options = ["-q", "-p", "no:cacheprovider", "--rootdir", folder, "-k", "NoRA or Nora"]
        return pytest.main([*options, str(tests / FILES[-1]), *argv[1:]])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
