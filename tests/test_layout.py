"""The one-way flow between packages and modules (CONTRIBUTING.md), read from the imports."""

import ast
import importlib.util
import subprocess
import sys
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
    "examples",
)
BESIDE = {
    "nora": {"storage", "diffusers"},
    "dreambooth": {"nora"},
    "inference": {"dreambooth"},
    "examples": {room for room in ROOMS if room not in ("nora", "examples")},  # to be copied into other projects
}
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


def modules() -> dict[str, Path]:
    """Name -> file of every module of the rooms and of the script."""
    files = [file for room in ROOMS for file in (ROOT / room).rglob("*.py")]
    files += [ROOT / f"{room}.py" for room in ROOMS if (ROOT / f"{room}.py").is_file()]
    names = (".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files)
    return {name.removesuffix(".__init__"): file for name, file in zip(names, files)}


def imported_modules(name: str, known: dict[str, Path]) -> set[str]:
    """The modules that one imports, at its top, inside a function or for type checkers alone."""
    found = set()
    for node in ast.walk(ast.parse(known[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = name if known[name].name == "__init__.py" else name.rpartition(".")[0]
                module = importlib.util.resolve_name("." * node.level + module, package)
            for alias in node.names:  # a module of the package, or a name in it
                found.add(spelled if (spelled := f"{module}.{alias.name}") in known else module)
    return (found & known.keys()) - {name}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of nodes that all reach each other: strongly connected components of two and more."""
    reached = {node: set(direct) for node, direct in graph.items()}
    for middle in graph:  # Warshall's closure
        for node in graph:
            if middle in reached[node]:
                reached[node] |= reached[middle]
    found = {frozenset(other for other in reached[node] if node in reached[other]) for node in graph}
    return [set(one) for one in found if one]


def test_no_modules_import_each_other_in_a_circle():
    known = modules()
    assert "inference.base" in known and "nora" in known and "train_dreambooth_nora_sdxl" in known
    assert circles({name: imported_modules(name, known) for name in known}) == []


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]


COMMANDS = ("inference.generate", "inference.gallery", "judging.evaluate", "inference.evaluate", "trainer.compare")
WORKING_COMMANDS = (
    ("--help",),
    ("inspect", "--help"),
    ("resize", "a", "--energy", "2", "--output", "b"),
    ("convert", "a"),
)


@pytest.mark.parametrize("flags", [["--help"], ["--no_such_flag"], ["--num_inference_steps", "0"]], ids=" ".join)
@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_refusals_of_flags_import_no_torch(command, flags):
    if "--num_inference_steps" in flags:
        flags = [
            *flags,
            *{"inference.generate": ["--prompt", "a"]}.get(command, ["--adapters", "a=b", "--prompts", "a"]),
        ]
        flags = flags[:2] if command == "trainer.compare" else flags
    heavy = ("torch", "diffusers", "transformers", "peft")
    code = f"""
import runpy, sys
sys.argv = ["x", *{flags!r}]
try:
    runpy.run_module({command!r}, run_name="__main__")
except SystemExit as stopped:
    print("status", stopped.code)
print("heavy", [name for name in {heavy} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    status = 0 if flags == ["--help"] else 2
    assert done.stdout.endswith(f"status {status}\nheavy []\n"), done.stdout[-300:] + done.stderr


@pytest.mark.parametrize("words", WORKING_COMMANDS, ids=" ".join)
def test_help_and_refusals_of_adapters_import_no_torch(words):
    code = f"""
import runpy, sys
sys.argv = ["x", *{words!r}]
try:
    runpy.run_module("inference.adapters", run_name="__main__")
except SystemExit as stopped:
    print("status", stopped.code, [name for name in ("torch", "diffusers", "peft") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.endswith(f"status {0 if '--help' in words else 2} []\n"), done.stdout[-300:] + done.stderr


def test_the_package_imports_no_torch_and_still_quietens_the_libraries():
    code = """
import logging, sys
import inference
assert "torch" not in sys.modules and len(logging.getLogger("transformers.utils.import_utils").filters) == 1
from inference import load_adapter, load_pipeline
import inference.base, inference.load
assert load_adapter is inference.load.load_adapter and load_pipeline is inference.base.load_pipeline
assert set(inference.__all__) <= set(dir(inference))
for name in inference.__all__:
    getattr(inference, name)
from inference.generate import generate_images
import inference.sampling
assert generate_images is inference.sampling.generate_images
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_no_pickles_and_no_heavy_weights():
    for path in (ROOT / "assets").rglob("*"):
        assert path.suffix not in {".pt", ".pth", ".ckpt", ".bin", ".pkl"}, path
    base = [path.stat().st_size for path in (ROOT / "assets" / "tiny-sdxl").rglob("*") if path.is_file()]
    assert 0 < sum(base) <= 25e6


# Who may take the whole configuration: the script, what opens a run, and what builds the run's own objects from it.
WHOLE_CONFIGURATION = {
    "train_dreambooth_nora_sdxl.py": {"train", "train_in_folder"},
    "trainer/preflight.py": {"preflight", "open_run"},
    "trainer/run.py": {"start_run", "_batches", "_embedder", "run_identity"},
    "trainer/models.py": {"make_run_adapter"},
    "trainer/memory.py": {"settle_memory"},
}


def test_functions_take_what_they_use():
    """Few functions take the whole configuration, and they are named; all others take a record, or less."""
    taking: dict[str, set[str]] = {}
    for path in [ROOT / "train_dreambooth_nora_sdxl.py", *(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))]:
        if path.parent.name == "settings":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                arguments = [*node.args.args, *node.args.kwonlyargs]
                if any(one.annotation and "TrainConfig" in ast.unparse(one.annotation) for one in arguments):
                    taking.setdefault(str(path.relative_to(ROOT)), set()).add(node.name)
    assert taking == WHOLE_CONFIGURATION


def test_no_main_module_hands_its_functions_to_spawned_processes():
    """A spawned process doesn't import a package's ``__main__``, so it can't find them there."""
    mains = [path for path in ROOT.rglob("__main__.py") if ".venv" not in path.parts]
    assert mains
    assert not [path for path in mains if "ProcessPool" in path.read_text() or "multiprocessing" in path.read_text()]
