"""Every method on many subjects, each at its own best learning rate, and NoRA's neighbours: tables and differences.

    python -m benchmarks.study --tuning_subjects bear bird --attributes assets/tiny-attributes
    python -m benchmarks.study … --groups "rank 4" "Table 4" --seeds 0
    python -m benchmarks.study … --measured

First each setting's rate is tuned on subjects that are not scored (successive halving by attributes and scenes), then
it is trained on every other subject with every seed, and scored. Each training is written to --work as it ends: the
command may be ended and given again until all is there, for a few groups at a time; --measured writes the tables of
what there is.
"""

from __future__ import annotations

import inference  # noqa: F401 -- before the libraries, because it quietens what they print on import

# isort: split
import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from benchmarks.study.plots import group_plot
from benchmarks.study.report import Records, by_seeds, difference_table, group_table, other_scores
from benchmarks.study.settings import PAPER, Setting, attention_layers, groups_of, rank_said
from benchmarks.study.trainings import Laboratory, NotMeasured, Training
from benchmarks.study.tuning import Tuning, rates_table, tune
from benchmarks.study.workers import best_rate, in_processes, score
from inference.base import check_base
from storage.files import check_writable_target, write_atomic
from storage.text import expand_home, home_path

INTRODUCTION = """\
# The study: every score

{steps} steps of batch 4; subjects {subjects}; learning rates chosen on {tuning}.

- *Rank, of the layers*: the rank, and its share of a layer's smaller side; for NoRA the outer rank too.
- *Loss*: of the training, whose pictures and noise are the same for all settings of a subject and seed.
- Differences are paired by subject and training seed. Their intervals hold together for a table's rows at 95 %
  (Bonferroni), p is by Holm over the rows, not over the scores; with one training seed both are of that seed alone.
- *Detectable*: the true difference that such a study shows in four of five."""


def report(
    title: str,
    rows: Mapping[str, Records],
    subjects: Sequence[str],
    ranks: Mapping[str, str | None],
    plots: Path | None = None,
) -> str:
    """A group's tables and plots, for each number of training seeds; what isn't measured on all subjects is named."""
    parts = [f"## {title}"]
    diverged = [row for row, records in rows.items() if any("failed" in one for one in records)]
    tables = by_seeds({row: [one for one in own if "scores" in one] for row, own in rows.items()}, subjects)
    for seeds, there in tables.items():
        parts.append(f"Training seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}:")
        parts += [group_table(there, ranks, PAPER.get(title)), other_scores(there)]
        parts += [table] if (table := difference_table(there)) else []
        if plots and (picture := group_plot(there)):
            several = f" seeds {seeds}" if seeds != list(tables)[-1] else ""
            name = re.sub(r"[^a-z0-9]+", "-", f"{title}{several}".lower()).strip("-") + ".png"
            write_atomic(plots / name, picture)
            parts.append(f"![{title}]({plots.name}/{name})")
    if diverged:
        parts.append(f"Diverged on a subject at the rate that was chosen: {'; '.join(diverged)}.")
    measured = {row for there in tables.values() for row in there}
    if missing := [row for row in rows if row not in measured and row not in diverged]:
        parts.append(f"Not measured: {'; '.join(missing)}.")
    return "\n\n".join(parts)


def known_tuning(laboratory: Laboratory, subjects: Sequence[str], steps: int, one: Setting) -> Tuning | None:
    """How the setting's rate was chosen, where that is measured."""
    try:
        return tune(replace(laboratory, trains=False), one, subjects, steps)
    except NotMeasured:
        return None


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=expand_home, default="assets/tiny-sdxl")
    parser.add_argument("--subjects_dir", type=home_path, default=Path("assets/subjects"))
    parser.add_argument("--subjects", nargs="+", help="scored ones; default: all others")
    parser.add_argument("--tuning_subjects", nargs="+", required=True, help="rates are chosen on these")
    parser.add_argument("--groups", nargs="+", default=[""], help="patterns that a group's title must have one of")
    parser.add_argument("--settings", default="", help="a pattern that a setting, such as 'nora rank=8', must have")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--jobs", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--clip", type=expand_home, default="assets/tiny-clip")
    parser.add_argument("--dino", type=expand_home, default="assets/tiny-dino")
    parser.add_argument("--attributes", type=expand_home, help="folder of an attribute reader")
    parser.add_argument("--work", type=home_path, default=Path("out/study"))
    parser.add_argument("--measured", action="store_true", help="train nothing: tables of what --work has")
    parser.add_argument("--output", type=home_path, help="a file for the tables, beside printing them")
    parser.add_argument("--plots", type=home_path, help="a folder for a plot of each group")
    args = parser.parse_args(argv)
    there = sorted(folder.name for folder in (args.subjects_dir / "heldout").glob("*"))
    subjects = args.subjects or [name for name in there if name not in args.tuning_subjects]
    if unknown := [name for name in (*subjects, *args.tuning_subjects) if name not in there]:
        parser.error(
            f"{unknown[0]} is no subject of {args.subjects_dir}/heldout, which has {', '.join(there) or 'none'}"
        )
    if both := sorted(set(subjects) & set(args.tuning_subjects)):
        parser.error(f"{both[0]} is to be scored, so its rate can't be chosen on it: give --subjects without it")
    laboratory = Laboratory(args.base, args.subjects_dir, args.work, args.clip, args.dino, args.attributes)
    try:
        if args.output:
            check_writable_target(args.output, "--output", folder=False)
        if args.plots:
            check_writable_target(args.plots, "--plots", folder=True)
        check_writable_target(args.work, "--work", folder=True)
        if args.measured and not laboratory.results.is_file():
            raise ValueError(f"--work {args.work} has no trainings: leave --measured out to make some")
        check_base(args.base)
        layers = attention_layers(args.base)
        all_groups = groups_of(layers)
        groups = {
            title: {name: one for name, one in rows.items() if re.search(args.settings, one.key)}
            for title, rows in all_groups.items()
            if any(re.search(pattern, title) for pattern in args.groups)
        }
        chosen = list(dict.fromkeys(one for rows in groups.values() for one in rows.values()))
        if not chosen:
            raise ValueError(f"nothing fits --groups and --settings: the groups are {'; '.join(all_groups)}")
        if not args.measured:
            laboratory.check_judges([*subjects, *args.tuning_subjects])
        laboratory.claim()
    except (ValueError, re.error) as error:
        parser.error(str(error))
    if not args.measured:
        rates = in_processes(args.jobs, partial(best_rate, laboratory, args.tuning_subjects, args.steps), chosen)
        trainings = [
            [Training(one, subject, seed, rate, args.steps) for seed in args.seeds for one, rate in zip(chosen, rates)]
            for subject in subjects
        ]
        in_processes(args.jobs, partial(score, laboratory), trainings)
    if args.plots:
        args.plots.mkdir(parents=True, exist_ok=True)
    tuning = " and ".join(args.tuning_subjects)
    text = INTRODUCTION.format(steps=args.steps, subjects=", ".join(subjects), tuning=tuning)
    tuned = {one: known_tuning(laboratory, args.tuning_subjects, args.steps, one) for one in chosen}
    known = {
        one: laboratory.records(
            Training(one, subject, seed, found.rate, args.steps) for subject in subjects for seed in args.seeds
        )
        for one, found in tuned.items()
        if found
    }
    for title, rows in groups.items():
        records = {row: known.get(one, []) for row, one in rows.items()}
        ranks = {row: rank_said(one, layers) for row, one in rows.items()}
        text += "\n\n" + report(title, records, subjects, ranks, args.plots)
    if tried := {one.key: found for one, found in tuned.items() if found}:
        what = "Attributes and scene" if args.attributes else "The loss on held-out pictures"
        text += f"\n\n## Learning rates\n\n{what} on {tuning}, by learning rate:\n\n"
        text += rates_table(tried, bool(args.attributes))
    text += "\n"
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.output, text)


if __name__ == "__main__":
    main()
