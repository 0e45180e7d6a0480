"""The study's tables: each setting's means, and paired differences from the first of its group."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from inference.score_labels import SCORE_LABELS
from judging.statistics import Draws, differences
from judging.tables import UNKNOWN, markdown_table
from runs.interval import Difference, format_difference

FIFTHS = ("first_loss", "last_loss")  # of a training's steps
SUMMARY = ("attributes", "scene", "dino", "first_loss", "last_loss")
LABELS = {
    "kept": "Attributes and scene ↑",
    "first_loss": "1000 × loss, first fifth ↓",
    "last_loss": "1000 × loss, last fifth ↓",
    "held_out": "Held-out loss ↓",
    **SCORE_LABELS,
    "copies": "Copies ↓",
}
Records = Sequence[Mapping[str, Any]]  # of one setting: one a subject and seed, as `value` reads them


def value(record: Mapping[str, Any], score: str) -> float | None:
    """A training's figure."""
    if score in ("held_out", "copies"):
        return record.get(score)
    if score in FIFTHS:
        losses = [loss for _, loss in record.get("losses", ())]
        fifth = max(1, len(losses) // 5)
        return 1000 * fmean(losses[:fifth] if score == "first_loss" else losses[-fifth:]) if losses else None
    scores = record.get("scores", {})
    if score == "kept":
        return kept(scores) if "attributes" in scores else None
    return scores.get(score)


def kept(shares: Mapping[str, float]) -> float:
    """What learning rates are chosen by and settings compared by: the subject's attributes and the scenes, alike."""
    return (shares["attributes"] + shares["scene"]) / 2


def draws(records: Records, score: str) -> dict[int, Draws]:
    """Training seed -> subject -> figure, which differences are paired by; of one drawing each, numbered 0."""
    found: dict[int, dict[str, dict[int, float]]] = {}
    for record in records:
        if (one := value(record, score)) is not None:
            found.setdefault(record["seed"], {})[record["subject"]] = {0: one}
    return found


def by_seeds(rows: Mapping[str, Records], subjects: Sequence[str]) -> dict[tuple[int, ...], dict[str, Records]]:
    """Training seeds -> the rows that have these on all subjects, and their records of them; most seeds first.

    Rows with more seeds are in the table of fewer too, where they are compared with the others.
    """
    seeds = {row: whole_seeds(records, subjects) for row, records in rows.items()}
    tables: dict[tuple[int, ...], dict[str, Records]] = {
        own: {
            row: [record for record in rows[row] if record["seed"] in own]
            for row, known in seeds.items()
            if set(own) <= set(known)
        }
        for own in sorted({own for own in seeds.values() if own}, key=lambda one: (-len(one), one))
    }

    def compares(own: tuple[int, ...]) -> bool:
        others = [table for other, table in tables.items() if other != own]
        return len(tables[own]) > 1 or not any(tables[own].keys() <= table.keys() for table in others)

    return {own: table for own, table in tables.items() if compares(own)}


def whole_seeds(records: Records, subjects: Sequence[str]) -> tuple[int, ...]:
    """The seeds with which each subject was trained."""
    return tuple(
        seed
        for seed in sorted({one["seed"] for one in records})
        if {one["subject"] for one in records if one["seed"] == seed} >= set(subjects)
    )


def first_scores(rows: Mapping[str, Records]) -> list[str]:
    """What a group is read by; the first is what rates were chosen by: without an attribute reader it is the loss."""
    compared = "kept" if known_scores(rows, ["kept"]) else "held_out"
    return known_scores(rows, [compared, *SUMMARY])


def group_table(
    rows: Mapping[str, Records], ranks: Mapping[str, str | None], paper: tuple[str, Mapping[str, str]] | None = None
) -> str:
    """What a group is read by: means of the first scores, the base's beside them, and differences in what is compared.

    Args:
        ranks: of the rows, as `settings.rank_said` says them.
        paper: the name of the paper's table, and what it has for the rows.
    """
    scores, first = first_scores(rows), next(iter(rows))
    differences = paired_differences(rows, scores[0])
    name, theirs = paper or ("", {})
    lines = []
    if base := base_records(rows):
        empty = [UNKNOWN] * (4 if paper else 3)
        lines.append(["base", *empty, *(shown(mean_of(base, score)) for score in scores), *[UNKNOWN] * 2])
    for row, records in rows.items():
        cells = [row, *([theirs.get(row, UNKNOWN)] if paper else []), ranks.get(row) or UNKNOWN]
        cells += [f"{records[0]['trained_parameters']:,}", f"{records[0]['rate']:g}"]
        cells += [shown(mean_of(records, score)) for score in scores]
        found = differences.get(row)
        cells += [format_difference(found), shown(found.detectable)] if found else [UNKNOWN] * 2
        lines.append(cells)
    header = ["", *([name] if paper else []), "rank, of the layers", "trained", "learning rate"]
    header += [LABELS[score] for score in scores]
    header += [f"{LABELS[scores[0]]}, less {first}'s", "detectable"]
    if len(rows) == 1:
        header, lines = header[:-2], [line[:-2] for line in lines]
    return markdown_table(header, lines)


def other_scores(rows: Mapping[str, Records]) -> str:
    """Means of the scores that `group_table` leaves out, and what a training costs."""
    scores = [score for score in known_scores(rows, LABELS) if score not in first_scores(rows)]
    lines = [
        [row, f"{fmean(one['seconds'] for one in records):.0f}", *(shown(mean_of(records, score)) for score in scores)]
        for row, records in rows.items()
    ]
    if base := base_records(rows):
        lines.insert(0, ["base", UNKNOWN, *(shown(mean_of(base, score)) for score in scores)])
    return markdown_table(["", "CPU s", *(LABELS[score] for score in scores)], lines)


def known_scores(rows: Mapping[str, Records], scores: Iterable[str]) -> list[str]:
    return [score for score in scores if any(value(one, score) is not None for own in rows.values() for one in own)]


def base_records(rows: Mapping[str, Records]) -> list[dict[str, Any]]:
    """What the base draws, beside each training."""
    return [{"scores": one["base"], "held_out": 1.0} for own in rows.values() for one in own if "base" in one]


def paired_differences(rows: Mapping[str, Records], score: str) -> dict[str, Difference]:
    """Of each row from the first, paired by subject and seed, p by Holm over the rows.

    None at all where a row hasn't the first one's subjects and seeds: over others it would be no difference of methods.
    """
    of_first, *others = (draws(records, score) for records in rows.values())
    paired = {row: own for row, own in zip(list(rows)[1:], others) if own}
    if any(places(own) != places(of_first) for own in paired.values()):
        return {}
    return differences(of_first, paired)


def places(found: Mapping[int, Draws]) -> set[tuple[int, str]]:
    """The seeds and subjects that there are figures of."""
    return {(seed, subject) for seed, own in found.items() for subject in own}


def difference_table(rows: Mapping[str, Records]) -> str | None:
    """The paired differences in all scores; None where there is one row."""
    first, *others = rows
    if not others:
        return None
    cells: dict[str, dict[str, str]] = {name: {} for name in others}
    for score, label in LABELS.items():
        for name, found in paired_differences(rows, score).items():
            cells[name][label] = format_difference(found)
    labels = [label for label in LABELS.values() if any(label in own for own in cells.values())]
    body = [[f"{name} − {first}", *(own.get(label, UNKNOWN) for label in labels)] for name, own in cells.items()]
    return markdown_table(["", *labels], body)


def mean_of(records: Records, score: str) -> float | None:
    known = [found for one in records if (found := value(one, score)) is not None]
    return fmean(known) if known else None


def shown(number: float | None) -> str:
    return UNKNOWN if number is None else f"{number:.3f}"
