"""Train several methods on one subject under the same data order, noise and budget, score them, and show them.

    python -m trainer.compare --methods nora lora --train_seeds 0 1 2 --output_dir out/compare -- \
        --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
        --instance_data_dir my_cat --instance_prompt "a photo of [V] cat"

What stands behind ``--`` goes to every training. A finished run is trained again only if its flags, pictures or base
have changed, and a run that was cut off is resumed: the command may be repeated until all is there.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from dreambooth.prior import is_drawn
from inference import gallery
from inference.score_labels import SCORES_VERSION
from judging import evaluate
from judging.plan import instance_folder
from judging.tables import score_table, warn_of_copies
from methods.components import RUN_RECORD
from settings.columns import BASE_COLUMN, CompareConfig, EvaluateConfig, GalleryConfig
from settings.command_line import parse_config, parse_flags, run_command
from settings.sampling import SamplingConfig
from settings.training import INPUTS, SUBJECT_INPUTS, TrainConfig
from storage.files import check_kept, check_own_output, check_writable_target, read_json, write_atomic
from storage.state import local_state
from storage.text import expand_home, load_yaml

SCRIPT = Path(__file__).parent.parent / "train_dreambooth_nora_sdxl.py"
COMMAND = "compare.json"  # in each run's folder: what it is trained with, and the record that it replaces
OWN_FLAGS = ("--output_dir", "--seed", "--resume_from_checkpoint", "--dry_run", "--config")
CAPTION = (
    "Scores with 95 % intervals over all that there are several of: trainings, prompts and seeds of the pictures. "
    "Of one training they say nothing about another. Differences are paired; docs/judging.md says how all is computed."
)
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
    flags, token = without_token(run.flags)
    wanted = {"flags": flags, "inputs": inputs(run)}
    begun = read_json(command_file) if command_file.is_file() else {}
    if "flags" in begun and (cleaned := without_token(begun["flags"])[0]) != begun["flags"]:  # earlier ones had it
        begun["flags"] = cleaned
        write_atomic(command_file, json.dumps(begun) + "\n")
    if {name: begun.get(name) for name in wanted} != wanted:
        # an earlier run's record stays until this one has made a step: it must not be taken for this one's
        begun = wanted | {"replaces": local_state(str(record))}
    if record.is_file() and local_state(str(record)) != begun["replaces"]:
        print(f"{run.folder}: there already")
        return
    print(f"{run.folder}: training", flush=True)
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(command_file, json.dumps(begun) + "\n")
    command = [sys.executable, str(SCRIPT), *flags, "--output_dir", str(run.folder)]
    if not record.is_file():
        command += ["--resume_from_checkpoint", "latest"]
    environment = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    environment |= {"HF_TOKEN": token} if token else {}  # on a command line every user of the machine reads it
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


def without_token(flags: Sequence[str]) -> tuple[list[str], str | None]:
    """The flags, and the Hub token that was among them, which no file shall hold."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--hub_token", "--hub-token")
    known, others = parser.parse_known_args(flags)
    return others, known.hub_token


def inputs(run: Run) -> dict[str, Any]:
    """The state of what a run reads, where it lies on this disk."""
    flags = given_flags(run)
    paths = {name: flags.get(name) for name in INPUTS}
    if listed := paths["concepts_list"]:
        # a list that can't be used is refused before the first training
        for number, entry in enumerate(load_yaml(expand_home(listed), "--concepts_list"), start=1):
            paths |= {f"concepts_list, entry {number}: {name}": entry.get(name) for name in SUBJECT_INPUTS}
    states = {name: local_state(expand_home(path)) if path else [] for name, path in paths.items()}
    for name in states:
        if name.endswith("class_data_dir"):  # the run itself draws what is missing
            states[name] = [file for file in states[name] if not is_drawn(Path(str(file[0])).name)]
    return states


def summarise(result: Mapping[str, Any], runs: Sequence[Run]) -> dict[str, Any]:
    """A file of scores with a column a method: over its trainings, with what they cost and the paired differences.

    Trainings are paired by their seed, pictures by prompt and seed.
    """
    from inference.figures import cost_figures  # these import PyTorch
    from judging.comparison import method_differences, score_summary

    methods: dict[str, dict[int, dict[str, Any]]] = {}
    for run in runs:
        copies = {"copies": result["scores"][run.name]["copies"]}
        methods.setdefault(run.method, {})[run.seed] = result["draws"][run.name] | copies
    records = {
        method: [read_json(one.folder / RUN_RECORD) for one in runs if one.method == method] for method in methods
    }
    return {
        "version": SCORES_VERSION,
        "scores": {BASE_COLUMN: result["scores"][BASE_COLUMN]}
        | {method: score_summary(list(trainings.values())) for method, trainings in methods.items()},
        "differences": method_differences(methods),
        "costs": {method: cost_figures(own) for method, own in records.items()},
    }


def of_columns(summary: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The summary under other names: method -> column of the page."""

    def renamed(found: Mapping[str, Any]) -> dict[str, Any]:
        return {columns.get(name, name): own for name, own in found.items()}

    named = {**summary, "scores": renamed(summary["scores"]), "costs": renamed(summary["costs"])}
    if found := summary["differences"]:
        named["differences"] = {"first": columns[found["first"]], "others": renamed(found["others"])}
    return named


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
        warn_of_copies(name, scores["copies"])
    summary = summarise(result, runs)
    text = score_table(summary)
    write_atomic(output_dir / "table.md", f"{text}\n\n{CAPTION}\n")
    print(text)
    shown = {one.method: one for one in reversed(runs)}  # of several trainings the first
    columns = {method: one.name for method, one in shown.items()}
    summary_file = output_dir / "summary.json"
    draws = {name: result["draws"][name] for name in (BASE_COLUMN, *columns.values())}
    named = of_columns(summary, columns) | {"draws": draws}
    write_atomic(summary_file, json.dumps(named, indent=1, ensure_ascii=False) + "\n")
    page, _ = gallery.run(
        GalleryConfig(
            **sampling_flags(config),
            adapters=[f"{one.name}={one.folder}" for one in runs if one.seed == runs[0].seed],
            prompts=result["prompts"],
            seeds=result["seeds"],
            instance_images=instance_folder(config.instance_images, trained),
            scores=str(summary_file),
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
    inputs = {(f"--{name}", str(path)) for flags in trained for name in INPUTS if (path := flags.get(name))}
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
    names = (
        "protocol",
        "live_subject",
        "subject",
        "class_name",
        "instance_images",
        "seeds",
        "clip",
        "dino",
        "attributes",
    )
    return EvaluateConfig(
        **sampling_flags(config),
        **{name: getattr(config, name) for name in names},
        adapters=[f"{one.name}={one.folder}" for one in runs],
        output=str(Path(config.output_dir) / "scores.json"),
    )


def train_all(runs: Sequence[Run], jobs: int) -> None:
    """Train what is not there, `jobs` at a time."""
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None
    with sigterm_exits(), ThreadPoolExecutor(jobs) as pool:
        trainings = [pool.submit(train, one, threads) for one in runs]
        try:
            for finished in trainings:
                finished.result()
        except BaseException as error:  # Ctrl-C among them: what has not begun shall not begin
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(error, SystemExit):
                end_processes(trainings)
            raise


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """SIGTERM raises SystemExit, as Ctrl-C raises KeyboardInterrupt."""

    def leave(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)  # as shells do

    try:
        before = signal.signal(signal.SIGTERM, leave)
    except ValueError:  # not in the main thread: whoever runs that handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_processes(trainings: Sequence[Future[None]]) -> None:
    """Pass SIGTERM on to each training, once, for it to save and leave: unlike Ctrl-C it reached this process alone."""
    told = set()
    while not all(one.done() for one in trainings):
        for process in psutil.Process().children():
            if process.pid not in told:
                told.add(process.pid)
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
        time.sleep(0.1)


def check_flags(run: Run) -> None:
    """What the trainer refuses before it reads the base's weights.

    Raises:
        ValueError: with the trainer's own sentence.
    """
    # which imports PyTorch: --help and refused flags need none
    from trainer.models import make_run_adapter
    from trainer.preflight import check_fits_base, preflight, settled_flags

    try:
        config, pictures = preflight(train_config(run))
        records = (config.loop, config.optimizer, config.text, config.validation)
        config = config.replace(**settled_flags(*records, pictures, num_processes=1))
        prompts = config.validation.validation_prompt or ()
        check_fits_base(config.base, config.loss, config.text, make_run_adapter(config), pictures, prompts)
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
