"""One training of the study, and what is measured of it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import StableDiffusionXLPipeline

from benchmarks.heldout_loss import heldout_loss
from benchmarks.study.settings import Setting
from inference.base import load_pipeline
from inference.load import load_adapter, unload_adapters
from inference.sampling import generate_images
from inference.score_labels import SCORE_LABELS
from judging import evaluate
from judging.attributes import SubjectReading
from judging.prompts import Protocol, with_article
from judging.scores import ClipEncoder, ImageEncoder
from methods.components import RUN_RECORD
from runs.record import METRICS, read_metrics
from settings.columns import BASE_COLUMN, EvaluateConfig
from settings.training import TrainConfig
from storage.files import read_json, write_atomic
from train_dreambooth_nora_sdxl import train
from trainer.diagnostics import TrainingFailure

PROTOCOL = "scenes"
PICTURE_SEEDS = [1000, 1001]
DRAWING_STEPS = 20
HELDOUT_SAMPLES = 256
CURVE_POINTS = 5
LOSS_MEANS = 10  # of a training: over each tenth of its steps
COLUMN = "adapted"  # each training takes the place of the one before


class Training(NamedTuple):
    setting: Setting
    subject: str
    seed: int
    rate: float
    steps: int

    @property
    def key(self) -> str:
        return f"{self.setting.key} {self.subject} seed {self.seed} rate {self.rate:g} steps {self.steps}"


class NotMeasured(LookupError):
    """A training that isn't there."""


@dataclass(frozen=True)
class Laboratory:
    """Where the study's models, subjects and results lie.

    Args:
        subjects: a folder of each, named after its class, and their held-out pictures in ``heldout``.
        work: results, one line a training, and pictures; a training that is there isn't made again.
        attributes: folder of an attribute reader; None: what pictures show isn't read.
        trains: whether what isn't measured yet is.
    """

    base: str
    subjects: Path
    work: Path
    clip: str
    dino: str
    attributes: str | None = None
    trains: bool = True

    def claim(self) -> None:
        """Note in `work` what its results are of.

        Raises:
            ValueError: if they are of another base, other subjects, judges, prompts or numbers of samples.
        """
        paths = {"base": self.base, "subjects": str(self.subjects), "clip": self.clip, "dino": self.dino}
        protocol = {"prompts": Protocol.read(PROTOCOL, None, False).prompts, "picture_seeds": PICTURE_SEEDS}
        own: dict[str, Any] = {
            **{name: content(path) for name, path in paths.items()},
            "attributes": content(self.attributes) if self.attributes else None,
            "protocol": protocol | {"drawing_steps": DRAWING_STEPS, "heldout_samples": HELDOUT_SAMPLES},
        }
        note = self.work / "laboratory.json"
        if note.is_file():
            if changed := [name for name, state in read_json(note).items() if own.get(name) != state]:
                raise ValueError(
                    f"--work {self.work} has results of other files or numbers ({changed[0]}): name another folder"
                )
            return
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(note, json.dumps(own) + "\n")

    def check_judges(self, subjects: Iterable[str]) -> None:
        """Load each once, before anything is trained that they couldn't score.

        Raises:
            ValueError: if one isn't there, or the subject's attributes aren't.
        """
        ClipEncoder(self.clip, torch.device("cpu"))
        ImageEncoder(self.dino, torch.device("cpu"))
        for subject in subjects if self.attributes else ():
            SubjectReading(Path(self.attributes), self.subjects / subject)

    @property
    def results(self) -> Path:
        return self.work / "trainings.jsonl"

    def known(self) -> dict[str, dict[str, Any]]:
        """What was measured of each training, by its key."""
        return read_results(self.results, self.results.stat().st_size) if self.results.is_file() else {}

    def write(self, training: Training, record: Mapping[str, Any]) -> None:
        """Append a line, in one call: several processes write into one file."""
        self.work.mkdir(parents=True, exist_ok=True)
        file = os.open(self.results, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, (json.dumps({"training": training.key, **record}) + "\n").encode())
        finally:
            os.close(file)

    def found(self, training: Training, scored: bool) -> dict[str, Any] | None:
        """What was measured before, if all that is asked for was."""
        record = self.known().get(training.key)
        if record and scored and not {"scores", "failed"} & record.keys():
            return None
        return record

    def records(self, trainings: Iterable[Training]) -> list[dict[str, Any]]:
        """Of those trainings that are there, scored or failed."""
        return [found for one in trainings if (found := self.found(one, scored=True))]

    def measure(self, training: Training, scored: bool) -> dict[str, Any]:
        """Train, unless that was done before, and measure what it costs and how good it is.

        Args:
            scored: by all scores, held-out loss and its curve; else by what a rate is chosen by (`shortfall`).

        Raises:
            NotMeasured: if it wasn't, in a laboratory that doesn't train.
        """
        if found := self.found(training, scored):
            return found
        if not self.trains:
            raise NotMeasured(training.key)
        own, heldout = self.subjects / training.subject, self.subjects / "heldout" / training.subject
        prompt = f"a photo of [V] {training.subject}"
        record: dict[str, Any] = {"subject": training.subject, "seed": training.seed, "rate": training.rate}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "run"
            started = time.process_time()
            try:
                train(self.flags(training, own, heldout if scored else None, prompt, folder))
            except TrainingFailure as error:  # the loss became NaN: the rate is too high
                record["failed"] = str(error)
                self.write(training, record)
                return record
            record["seconds"] = time.process_time() - started
            record["trained_parameters"] = read_json(folder / RUN_RECORD)["trainable_parameters"]
            if scored or not self.attributes:
                record["held_out"] = self.held_out(folder, heldout, prompt)
            if scored:
                record |= self.scores(folder, own, training)
                lines = read_metrics(folder / METRICS)
                record |= {"curve": curve(lines), "losses": mean_losses(lines, LOSS_MEANS)}
            elif self.attributes:
                record["reading"] = self.reading(folder, own, training.subject)
        self.write(training, record)
        return record

    def flags(self, training: Training, own: Path, heldout: Path | None, prompt: str, folder: Path) -> TrainConfig:
        validation = (
            {"validation_data_dir": str(heldout), "validation_loss_steps": max(1, training.steps // CURVE_POINTS)}
            if heldout
            else {}
        )
        return TrainConfig.of(
            pretrained_model_name_or_path=self.base,
            instance_data_dir=str(own),
            instance_prompt=prompt,
            output_dir=str(folder),
            method=training.setting.method,
            method_args=list(training.setting.args) or None,
            learning_rate=training.rate,
            lr_scheduler="cosine",
            train_batch_size=4,
            max_train_steps=training.steps,
            seed=training.seed,
            mixed_precision="no",
            num_validation_images=0,
            report_to="none",
            **validation,
        )

    def held_out(self, folder: Path, heldout: Path, prompt: str) -> float:
        """The adapter's loss on held-out pictures over the base's."""
        pipeline = loaded(self.base)
        base = base_loss(self.base, heldout, prompt)
        load_adapter(pipeline, folder)
        try:
            return heldout_loss(pipeline, heldout, prompt, HELDOUT_SAMPLES) / base
        finally:
            unload_adapters(pipeline)

    def reading(self, folder: Path, own: Path, subject: str) -> dict[str, float]:
        """The shares of the subject's attributes and of the prompts' scenes in what an adapter draws."""
        assert self.attributes is not None
        prompts = [with_article(one, f"[V] {subject}") for one in Protocol.read(PROTOCOL, None, False).prompts]
        pipeline = loaded(self.base)
        load_adapter(pipeline, folder)
        try:
            options: dict[str, Any] = {"num_inference_steps": DRAWING_STEPS, "batch_size": 4, "progress": False}
            drawn = list(generate_images(pipeline, prompts, PICTURE_SEEDS, **options))
        finally:
            unload_adapters(pipeline)
        found = SubjectReading(Path(self.attributes), own).score(drawn)
        return {name: fmean(one for seeds in draws.values() for one in seeds.values()) for name, draws in found.items()}

    def scores(self, folder: Path, own: Path, training: Training) -> dict[str, Any]:
        """Means of the scores over the pictures, of the adapter and of the base, and how many are copies.

        One process at a time may work on a subject: the base's pictures are kept for all of its trainings.
        """
        result = evaluate.run(
            EvaluateConfig(
                base=self.base,
                adapters=[f"{COLUMN}={folder}"],
                instance_images=str(own),
                protocol=PROTOCOL,
                seeds=PICTURE_SEEDS,
                num_inference_steps=DRAWING_STEPS,
                clip=self.clip,
                dino=self.dino,
                attributes=self.attributes,
                output=str(self.work / "pictures" / training.subject / "scores.json"),
            )
        )
        found = {}
        for name, column in (("scores", COLUMN), ("base", BASE_COLUMN)):
            found[name] = {key: one["estimate"] for key, one in result["scores"][column].items() if key in SCORE_LABELS}
        copies = result["scores"][COLUMN]["copies"]
        return found | {"copies": copies["count"] / copies["pictures"]}


@lru_cache(maxsize=1)
def read_results(path: Path, size: int) -> dict[str, dict[str, Any]]:
    """By training; read again when the file has grown, which is only ever appended to."""
    records = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {record.pop("training"): record for record in records}


@lru_cache(maxsize=1)
def loaded(base: str) -> StableDiffusionXLPipeline:
    return load_pipeline(base, torch.float32)


@cache
def base_loss(base: str, heldout: Path, prompt: str) -> float:
    return heldout_loss(loaded(base), heldout, prompt, HELDOUT_SAMPLES)


def content(path: str) -> str:
    """Hash of a folder's files and their names, the same wherever it lies; what is no folder, as a Hub's id, stays.

    A README.md isn't counted: what it says changes no result.
    """
    root = Path(path)
    if not root.is_dir():
        return path
    digest = hashlib.sha256()
    for file in sorted(file for file in root.rglob("*") if file.is_file() and file.name != "README.md"):
        digest.update(f"{file.relative_to(root).as_posix()} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def curve(lines: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(step, held-out loss) where a run's metrics have it."""
    return [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]


def mean_losses(lines: Sequence[Mapping[str, Any]], count: int) -> list[tuple[int, float]]:
    """(last step, mean training loss) of each of `count` parts of a run's steps, or of each step if they are fewer.

    A seed's pictures, noise and timesteps are the same whatever the method, so that these can be compared part by part.
    """
    steps = [(line["step"], line["loss"]) for line in lines if "loss" in line]
    parts = np.array_split(np.array(steps), min(count, len(steps)))
    return [(int(part[-1, 0]), float(part[:, 1].mean())) for part in parts]
