"""README and docs: their links lead somewhere, and their commands name programs and flags that there are."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "assets" / "README.md", *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
PROGRAM = re.compile(
    r"(?:python|accelerate launch|torchrun)\b.*?(?:-m (?P<module>[\w.]+)|(?P<script>\S+\.py)\b)(?P<rest>.*)"
)
TRAINER = "train_dreambooth_nora_sdxl.py"
QUICK = (TRAINER, "inference.", "judging.evaluate", "trainer.compare", "methods.budget")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def commands(page: Path) -> list[str]:
    """The lines that run a program, those that go on with a backslash as one, comments left out."""
    text = re.sub(r"\\\n\s*", " ", page.read_text())
    lines = [line.split("  #")[0] for line in text.splitlines() if line.startswith("    ")]
    return [line.strip() for line in lines if PROGRAM.search(line)]


@cache
def help_of(program: str, command: str | None) -> str:
    start = [str(ROOT / program)] if program.endswith(".py") else ["-m", program]
    done = subprocess.run(
        [sys.executable, *start, *([command] if command else []), "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, (program, done.stderr[-300:])
    return done.stdout


def flags(text: str) -> set[str]:
    return set(re.findall(r"--[a-z]\w*", text))


def test_there_are_commands():
    assert sum(len(commands(page)) for page in PAGES) >= 25


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_name_programs_and_flags_that_there_are(page):
    for line in commands(page):
        found = PROGRAM.search(line)
        program, rest = found["module"] or found["script"], found["rest"]
        file = program if program.endswith(".py") else program.replace(".", "/")
        there = (ROOT / file).is_file() or (ROOT / f"{file}.py").is_file() or (ROOT / file / "__main__.py").is_file()
        assert there or program == "pytest", line
        if program.startswith(QUICK):
            command = re.match(r"\s+([a-z]+)\b", rest)[1] if program == "inference.adapters" else None
            own, _, for_trainings = rest.partition(" -- ")
            if "|" not in own:
                assert flags(own) <= flags(help_of(program, command)), line
            assert not for_trainings or flags(for_trainings) <= flags(help_of(TRAINER, None)), line
