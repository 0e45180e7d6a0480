"""The end of a run: its files, its record and card, its samples."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreambooth.prepare import Pictures
from inference.prediction import prediction_of
from methods.components import RUN_RECORD
from methods.files import save_approximation, tools_file
from methods.nora import Nora
from runs.card import write_card
from runs.exports import check_files, save_tools_file
from runs.record import SAMPLES, Clock, file_sizes, run_record
from runs.tools_header import run_header, thumbnail
from storage.files import write_atomic
from storage.tensors import add_to_header
from trainer.accelerator import PRECISIONS, push_to_hub
from trainer.run import Run
from trainer.samples import Sampler, keep_samples


def finish(
    run: Run,
    pictures: Pictures,
    total_steps: int,
    sampler: Sampler,
    fingerprints: Mapping[str, str],
    words: Mapping[str, str],
    clock: Clock,
    peak_memory_mb: float,
    best: Mapping[str, Any] | None,
) -> None:
    """Save and check the adapter, then write record and card, then draw; every process calls it.

    Args:
        total_steps: that were made; fewer than were asked for where the run stopped early.
        fingerprints: of the base's models that learned.
        words: new words -> their tokens.
        best: step and scores of the best adapter.
    """
    accelerator, output, loop = run.accelerator, run.config.output, run.config.loop
    folder, validation = Path(output.output_dir), run.config.validation
    if accelerator.is_main_process:
        files = run.save(folder, peft=output.output_peft_format)
        error = None
        if output.convert_to_lora is not None:
            name, error = save_approximation(run.adapter, output.convert_to_lora, folder)
            files.append(name)
            print(f"{folder / name}: the nearest LoRA of rank {output.convert_to_lora}, relative error {error:.3g}")
        record = run_record(
            run.config.replace(max_train_steps=total_steps).flags(),
            trained=run.models,
            base_fingerprints=fingerprints,
            outer_ranks=run.adapter.outer_ranks() if isinstance(run.adapter, Nora) else [],
            clock=clock,
            peak_memory_mb=peak_memory_mb,
            folder=folder,
            files=files,
            approximation_error=error,
            best=best,
            new_words=words,
            device=accelerator.device,
            dtype=run.dtype,
            num_processes=accelerator.num_processes,
            prediction=prediction_of(run.objective.scheduler),
        )
        check_files(run.adapter, folder, files)
        _write_record(folder, record, files)  # which must not be lost with what follows
        if tools := _save_tools_file(run, pictures, record):
            files.append(tools)
            _write_record(folder, record, files)
        write_card(folder, record)
    seeds = range(loop.seed, loop.seed + validation.num_validation_images)
    samples = sampler.samples(validation.validation_prompt, seeds)
    samples = keep_samples(accelerator, samples, folder / SAMPLES, total_steps)
    if accelerator.is_main_process:
        if samples:
            if tools:
                add_to_header(folder / tools, thumbnail(samples[0].image))
                _write_record(folder, record, files)
            write_card(folder, record, [(sample.prompt, f"{SAMPLES}/{sample.file}") for sample in samples])
        if output.push_to_hub:
            print(f"uploaded to {push_to_hub(folder, output.hub_model_id, output.hub_token)}")
        print(f"{folder}: adapter and record are there")


def _save_tools_file(run: Run, pictures: Pictures, record: Mapping[str, Any]) -> str | None:
    """Write and check the file for drawing programs where it is wanted; returns its name."""
    output = run.config.output
    if not output.writes_tools_file(run.adapter.method.low_rank):
        return None
    folder, captions = Path(output.output_dir), [Counter[str]() for _ in pictures.concepts]
    for picture in pictures.instance:
        captions[picture.example.concept][picture.example.prompt] += 1
    header = run_header(Path(tools_file(folder)).stem, record, pictures.instance_prompts, captions)
    dtype = PRECISIONS[output.output_kohya_dtype]
    name = save_tools_file(run.adapter, folder, header, dtype)
    check_files(run.adapter, folder, [name], dtype)
    return name


def _write_record(folder: Path, record: dict[str, Any], files: Sequence[str]) -> None:
    record["files"] = file_sizes(folder, files)
    write_atomic(folder / RUN_RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
