"""Damaged files through the suite's own readers, a few of each kind; `python -m tools.fuzz` takes thousands."""

import pytest

from tools.fuzz import KINDS, outcomes


@pytest.mark.parametrize("kind, count", [("exif", 100), ("headers", 40), ("pictures", 60), ("configs", 60)])
def test_damaged_files_are_read_or_refused_with_a_sentence(kind, count):
    found = list(outcomes(kind, count))
    wrong = [(seed, damaged, problem) for seed, damaged, _, problem in found if problem]
    assert not wrong, f"{len(wrong)} of {count}, the first {wrong[0]}"
    assert {outcome for *_, outcome, _ in found} <= {"read", "refused"} and set(KINDS) >= {kind}
    assert any(outcome == "read" for *_, outcome, _ in found) or kind == "configs"
