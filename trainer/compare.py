"""Train several methods on one subject under the same data order, noise and budget, score them, and show them.

    python -m trainer.compare --methods nora lora --train_seeds 0 1 2 --output_dir out/compare -- \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --instance_data_dir my_cat --instance_prompt "a photo of [V] cat"

What stands behind ``--`` goes to every training. A finished run is trained again only if its flags, pictures or base
have changed, and a run that was cut off is resumed: the command may be repeated until all is there.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from inference import gallery
from inference.score_labels import SCORE_LABELS
from judging import evaluate
from judging.plan import instance_folder
from judging.statistics import confidence_interval
from judging.tables import markdown_table, warn_of_memorisation
from methods.components import RUN_RECORD
from settings.columns import CompareConfig, EvaluateConfig, GalleryConfig
from settings.command_line import parse_config, parse_flags, run_command
from settings.sampling import SamplingConfig
from settings.training import TrainConfig
from storage.files import check_kept, check_own_output, check_writable_target, read_json, write_atomic
from storage.state import local_state

SCRIPT = Path(__file__).parent.parent / "train_dreambooth_nora_sdxl.py"
COMMAND = "compare.json"  # in each run's folder: what it is trained with, and the record that it replaces
INPUTS = (
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "instance_data_dir",
    "dataset_name",
    "concepts_list",
    "mask_data_dir",
)
OWN_FLAGS = ("--output_dir", "--seed", "--resume_from_checkpoint", "--dry_run", "--config")
NAME_BYTES = 200  # a file's name takes 255
RESERVED = ("base", "pictures")  # what else is in the folder or on the page


@dataclass(frozen=True)
class Run:
    name: str  # of its column and folder
    method: str
    seed: int
    folder: Path
    flags: list[str]


def plan(config: CompareConfig, train_flags: Sequence[str]) -> list[Run]:
    """The trainings, method by method.

    Raises:
        ValueError: for two methods of one name, and for flags that are this command's.
    """
    seeds = config.train_seeds or [0]
    runs, names = [], []
    for method in config.methods or ["nora", "lora"]:
        name, separator, flags = method.partition("=")
        if not re.fullmatch(r"[\w+-]+", name) or name in RESERVED:
            raise ValueError(f"--methods {name} is no name for a folder here: use letters, digits and + - _")
        try:
            own = shlex.split(flags) if separator else ["--method", name]
        except ValueError as error:
            raise ValueError(f"--methods {method}: {error}") from error
        for flag in OWN_FLAGS:
            if any(given == flag or given.startswith(f"{flag}=") for given in [*train_flags, *own]):
                raise ValueError(f"{flag} is this command's own: use --methods, --train_seeds or --output_dir")
        if len(name.encode()) > NAME_BYTES:
            raise ValueError(
                f"--methods {name} is longer than {NAME_BYTES} bytes: give it a shorter name, as in short=…"
            )
        if name in names:
            raise ValueError(f"--methods has {name} twice: give one of them another name, such as {name}2={flags!r}")
        names.append(name)
        for seed in seeds:
            own_name = name if len(seeds) == 1 else f"{name}-seed{seed}"
            folder = Path(config.output_dir) / own_name
            runs.append(Run(own_name, name, seed, folder, [*train_flags, *own, "--seed", str(seed)]))
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"--train_seeds {seeds}: a seed is given twice")
    return runs


def train(run: Run, threads: int | None) -> None:
    """Train in a process of its own, unless the same run of the same pictures and base is there.

    Raises:
        ValueError: if it fails, with the last line that it printed.
    """
    record, command_file = run.folder / RUN_RECORD, run.folder / COMMAND
    wanted = {"flags": run.flags, "inputs": inputs(run)}
    begun = read_json(command_file) if command_file.is_file() else {}
    if {name: begun.get(name) for name in wanted} != wanted:
        # an earlier run's record stays until this one has made a step: it must not be taken for this one's
        begun = wanted | {"replaces": local_state(str(record))}
    if record.is_file() and local_state(str(record)) != begun["replaces"]:
        print(f"{run.folder}: there already")
        return
    print(f"{run.folder}: training", flush=True)
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(command_file, json.dumps(begun) + "\n")
    command = [sys.executable, str(SCRIPT), *run.flags, "--output_dir", str(run.folder)]
    if not record.is_file():
        command += ["--resume_from_checkpoint", "latest"]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    log = log_file(run)
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    if done.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        reason = next((line for line in reversed(lines) if line.startswith("error: ")), lines[-1] if lines else "")
        raise ValueError(
            f"training {run.folder} failed ({reason.removeprefix('error: ')}); all that it said is in {log}"
        )


def train_config(run: Run) -> TrainConfig:
    """The trainer's configuration of a run.

    Raises:
        ValueError: with the trainer's own sentence.
    """
    return TrainConfig.of(**given_flags(run))


def given_flags(run: Run) -> dict[str, Any]:
    """The flags that a run gives the trainer, by name."""
    return parse_flags(TrainConfig, [*run.flags, "--output_dir", str(run.folder)])


def inputs(run: Run) -> dict[str, Any]:
    """The state of the base and of the pictures where they lie on this disk."""
    flags = given_flags(run)
    return {name: local_state(flags.get(name)) for name in INPUTS}


def summarise(scores: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, dict[str, dict[str, float]]]:
    """Method -> score -> mean and the half of its 95 % interval.

    Of several trainings the interval is Student's, between trainings; of one it is the bootstrap's, between pictures.
    """
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for method in dict.fromkeys(run.method for run in runs):
        own = [scores[run.name] for run in runs if run.method == method]
        summary[method] = {}
        for key in SCORE_LABELS:
            found = [one[key] for one in own if key in one]
            if len(found) > 1:
                mean, half = confidence_interval([one["mean"] for one in found])
            elif found:
                mean, half = found[0]["mean"], (found[0]["high"] - found[0]["low"]) / 2
            else:
                continue
            summary[method][key] = {"mean": mean, "half": half}
        alarms = [one["memorisation"]["alarm"] for one in own]
        nearest = [one["memorisation"]["nearest"] for one in own]
        summary[method]["memorisation"] = {"nearest": sum(nearest) / len(nearest), "alarms": sum(alarms)}
    return summary


def table(summary: Mapping[str, Mapping[str, Mapping[str, float]]], records: Mapping[str, Mapping[str, Any]]) -> str:
    """One row a method: what it trains and costs, its scores with 95 % intervals."""
    known = [key for key in SCORE_LABELS if any(key in scores for scores in summary.values())]
    header = ["method", "trained", "s/step", *(SCORE_LABELS[key] for key in known), "nearest training image"]
    rows = []
    for method, scores in summary.items():
        record = records[method]
        cells = [method, f"{record['trainable_parameters']:,}", f"{record['timings']['seconds_per_step']:.3g}"]
        cells += [f"{scores[key]['mean']:.3f} ± {scores[key]['half']:.3f}" if key in scores else "–" for key in known]
        found = scores["memorisation"]
        cells.append(f"{found['nearest']:.2f}" + (f" ({found['alarms']} memorised)" if found["alarms"] else ""))
        rows.append(cells)
    return markdown_table(header, rows)


def run(config: CompareConfig, train_flags: Sequence[str]) -> Path:
    """Train, score, and write scores.json, table.md and gallery.html; returns the page."""
    output_dir = Path(config.output_dir)
    check_writable_target(output_dir, "--output_dir", folder=True)
    if config.jobs < 1:
        raise ValueError(f"--jobs {config.jobs} must be at least 1")
    if len(config.scales) > 1:
        raise ValueError("--scale: a comparison is at one scale; inference.gallery shows several")
    runs = plan(config, train_flags)
    # What would be refused after the training is refused before it.
    scoring = scoring_flags(config, runs)
    trained = [given_flags(one) for one in runs]
    evaluate.check(scoring, trained)
    check_places(output_dir, runs, trained, config.instance_images)
    # A mistake in one method's flags is found before another has trained for an hour.
    for one in {run.method: run for run in runs}.values():
        check_flags(one)
    train_all(runs, config.jobs)

    result = evaluate.run(scoring)
    for name, scores in result["scores"].items():
        warn_of_memorisation(name, scores["memorisation"])
    records = {one.method: read_json(one.folder / RUN_RECORD) for one in reversed(runs)}
    text = table(summarise(result["scores"], runs), records)
    count = len(config.train_seeds or [0])
    between = f"between {count} trainings of each" if count > 1 else "between pictures, of one training of each"
    write_atomic(output_dir / "table.md", f"{text}\n\nMean ± half of the 95 % interval, {between}.\n")
    print(text)
    page, _ = gallery.run(
        GalleryConfig(
            **sampling_flags(config),
            adapters=[f"{one.name}={one.folder}" for one in runs if one.seed == runs[0].seed],
            prompts=result["prompts"],
            seeds=result["seeds"],
            instance_images=instance_folder(config.instance_images, trained),
            scores=scoring.output,
            output=str(output_dir / "gallery.html"),
        )
    )
    return page


def check_places(
    output_dir: Path, runs: Sequence[Run], trained: Sequence[Mapping[str, Any]], instance_images: str | None
) -> None:
    """Refuse to write where an input lies, or where something else than a comparison is.

    Args:
        trained: the flags of the runs.

    Raises:
        ValueError: naming the input, or the file that is there.
    """
    page, table = output_dir / "gallery.html", output_dir / "table.md"
    names = (*INPUTS, "class_data_dir", "validation_data_dir")
    inputs = {(f"--{name}", str(path)) for flags in trained for name in names if (path := flags.get(name))}
    inputs |= {("--instance_images", instance_images)} if instance_images else set()
    inputs = {(flag, path) for flag, path in inputs if Path(path).exists()}
    if same := [flag for flag, path in inputs if Path(path).resolve() == output_dir.resolve()]:
        raise ValueError(f"{same[0]} and --output_dir are the same folder {output_dir}: name another one")
    logs = [log_file(run) for run in runs]
    written = [page, page.with_suffix(".png"), table, output_dir / "scores.json", *logs]
    check_kept(inputs, [*written, *(run.folder for run in runs)])
    gallery.check_own_page(page)
    check_own_output(output_dir / "scores.json", "--output_dir", "file of scores", evaluate.is_scores)
    check_own_output(table, "--output_dir", "table of this command", lambda path: path.read_bytes()[:1] == b"|")
    for run, log in zip(runs, logs):
        begun = (run.folder / COMMAND).is_file()
        check_own_output(log, "--output_dir", f"log of {run.folder}", lambda _, begun=begun: begun)


def log_file(run: Run) -> Path:
    """What its training says."""
    return run.folder.with_name(f"{run.folder.name}.log")


def sampling_flags(config: CompareConfig) -> dict[str, Any]:
    """What the scores and the page are drawn with."""
    return {one.name: getattr(config, one.name) for one in fields(SamplingConfig)}


def scoring_flags(config: CompareConfig, runs: Sequence[Run]) -> EvaluateConfig:
    names = ("protocol", "live_subject", "subject", "class_name", "instance_images", "seeds", "clip", "dino")
    return EvaluateConfig(
        **sampling_flags(config),
        **{name: getattr(config, name) for name in names},
        adapters=[f"{one.name}={one.folder}" for one in runs],
        output=str(Path(config.output_dir) / "scores.json"),
    )


def train_all(runs: Sequence[Run], jobs: int) -> None:
    """Train what is not there, `jobs` at a time."""
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for finished in [pool.submit(train, one, threads) for one in runs]:
                finished.result()
        except BaseException:  # Ctrl-C among them: what has not begun shall not begin
            pool.shutdown(cancel_futures=True)
            raise


def check_flags(run: Run) -> None:
    """What the trainer refuses before it loads the base.

    Raises:
        ValueError: with the trainer's own sentence.
    """
    from trainer.preflight import preflight  # which imports PyTorch: --help and refused flags need none

    try:
        preflight(train_config(run))
    except ValueError as error:
        raise ValueError(f"{run.method}: {error}") from error


def main(argv: Sequence[str] | None = None) -> None:
    argv = list(sys.argv[1:] if argv is None else argv)
    split = argv.index("--") if "--" in argv else len(argv)
    config = parse_config(
        CompareConfig, argv[:split], prog="python -m trainer.compare", description=__doc__.split("\n")[0]
    )

    def command() -> None:
        page = run(config, argv[split + 1 :])
        print(f"gallery: {page} (page) and {page.with_suffix('.png')} (sheet)\ntable:   {page.parent / 'table.md'}")

    run_command(command)


if __name__ == "__main__":
    main()
