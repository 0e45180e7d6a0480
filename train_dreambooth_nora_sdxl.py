"""Teach SDXL a subject from a few pictures, with NoRA (nested low-rank adaptation, arXiv 2408.10280) or another method.

accelerate launch train_dreambooth_nora_sdxl.py \
    --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --instance_data_dir my_cat --instance_prompt "a photo of [V] cat" --output_dir out/cat
"""

from __future__ import annotations

from settings.training import TrainConfig, parse_command_line

# Before torch is imported, so that --help and a wrong flag are answered at once.
COMMAND = parse_command_line() if __name__ == "__main__" else None

import inference  # noqa: F401 -- before the libraries, because it quietens what they print on import

# isort: split
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers.training_utils import free_memory
from tqdm.auto import tqdm

from dreambooth.draws import step_seed
from dreambooth.loss import Objective
from dreambooth.prepare import ENCODED, check_prompt_lengths, encode_run
from inference.prediction import prediction_of
from inference.tokens import spellings
from runs.checkpoints import FolderLock, GracefulStop, read_step
from runs.record import METRICS, Clock, MetricsLog, PeakMemory
from settings.command_line import quiet_libraries, run_command
from storage.tensors import module_fingerprint
from trainer.accelerator import PRECISIONS, end_training, start_trackers, take_folder
from trainer.best_adapter import RunJudge
from trainer.blocks import compile_blocks, wants_compiled
from trainer.diagnostics import check_loss, explained
from trainer.finish import finish
from trainer.hooks import Checkpoints, ClearEarlier, EarlyStop, Hook, Interruption, Log, Look, Step
from trainer.memory import out_of_the_way, settle_memory
from trainer.models import (
    add_new_tokens,
    check_fits,
    component_passes,
    make_run_adapter,
    make_trainable,
    put_in,
    teach_by_base,
    trained_names,
)
from trainer.preflight import end_dry_run, open_run, preflight
from trainer.report import Report
from trainer.run import Run, run_identity, start_run
from trainer.samples import Base, Sampler, draw_class_images


def train_step(run: Run, step: int) -> Step:
    """One optimiser step, counted from 0; the loss is the mean over micro-batches and processes."""
    options, accelerator, started = run.config.loop, run.accelerator, time.perf_counter()
    torch.manual_seed(step_seed(options.seed, step, accelerator.process_index))  # for dropout
    run.adapter.before_step(step)
    mean_loss = 0.0
    for micro_step in range(options.gradient_accumulation_steps):
        with accelerator.accumulate(*run.prepared.values()):
            batch = run.batches(step, micro_step)  # latents (B, 4, h, w), their noise, timesteps and prompts
            prompt_embeds, pooled = run.embedder.embed(batch, step)  # (B, tokens, d), (B, d2)
            noisy_latents, timesteps = run.objective.model_input(batch)
            noisy_latents, target = noisy_latents.to(run.dtype), run.objective.target(batch)
            if run.config.prior.prior_teacher:
                unet, encoded = run.models["unet"], run.embedder.encoded
                target = teach_by_base(unet, encoded, batch, noisy_latents, timesteps, target)
            conditioning = {"text_embeds": pooled, "time_ids": batch.time_ids}
            unet = run.prepared["unet"]
            prediction = unet(noisy_latents, timesteps, prompt_embeds, added_cond_kwargs=conditioning).sample
            loss = run.objective.loss(prediction, batch, options.train_batch_size, target)
            penalty = run.adapter.penalty()
            accelerator.backward(loss if penalty is None else loss + penalty)
            if accelerator.sync_gradients:
                run.watch.look(accelerator, step, run.embedder, batch, options.train_batch_size)
                accelerator.clip_grad_norm_(run.parameters, run.config.optimizer.max_grad_norm)
                run.adapter.before_update()
            mean_loss += accelerator.reduce(loss.detach(), "mean").item() / options.gradient_accumulation_steps
            check_loss(mean_loss, step + 1, accelerator.mixed_precision, run.config.optimizer.learning_rate)
            run.optimizer.step()
            if accelerator.sync_gradients and not run.optimizer.step_was_skipped:
                run.adapter.after_update(step + 1)
            run.optimizer.zero_grad()
    learning_rate = run.schedule.get_last_lr()[0]
    run.schedule.step()
    run.average.step()
    return Step(step + 1, mean_loss, learning_rate, time.perf_counter() - started)


def train(config: TrainConfig) -> Path:
    """Train one adapter and write it, its record and its samples; returns the folder.

    Raises:
        ValueError: for anything wrong with the pictures, the base or the machine; nothing is written then.
    """
    with FolderLock() as lock:
        return train_in_folder(config, lock)


def train_in_folder(config: TrainConfig, lock: FolderLock) -> Path:
    """`train`, which lets go of the folder that is locked here."""
    clock = Clock()
    # 1. What can be refused without the base is refused before it is loaded.
    config, pictures = preflight(config)
    output_dir = Path(config.output.output_dir)
    accelerator, config, checkpoint, samples_every = open_run(config, pictures)
    judge = RunJudge(config.evaluation, accelerator, pictures, output_dir, config.loop.max_train_steps)
    dtype = PRECISIONS[accelerator.mixed_precision]
    base = Base(config.base, accelerator.device, dtype, config.hardware.enable_xformers_memory_efficient_attention)
    if config.data.dry_run:
        return end_dry_run(config.output, pictures.report(config.loop, config.prior, config.text.token_abstraction))

    # 2. The frozen base, and what will learn.
    pipeline = base.load()
    objective = Objective.from_options(pipeline.scheduler, config.loss)
    adapter = make_run_adapter(config)
    models = {name: getattr(pipeline, name) for name in trained_names(config.text)}
    check_fits(adapter, models, config.text)
    fingerprints = {name: module_fingerprint(model) for name, model in models.items()}
    new_tokens = add_new_tokens(pipeline, config.text, config.loop.seed)  # component -> ids
    words = spellings(pipeline.tokenizer)  # such as "[V]" -> the new tokens
    check_prompt_lengths(pipeline, pictures, config.validation.validation_prompt, words)
    take_folder(lock, accelerator, output_dir, config.output)

    # 3. Pictures and prompts are encoded once, and what encoded them is freed unless it is trained.
    steps = config.validation.num_inference_steps
    pictures = draw_class_images(accelerator, base, pipeline, pictures, config.prior, steps)
    cache = {"cache_dir": Path(config.data.encoded_cache_dir or output_dir / ENCODED), "words": words}
    cache |= {"num_workers": config.data.dataloader_num_workers, "measures_base": adapter.measures_base}
    cache |= {"clip_skip": config.base.clip_skip}
    with out_of_the_way(pipeline.unet, config.hardware):
        encoded = encode_run(pipeline, pictures, accelerator, **cache)
    parts = models | {name: getattr(pipeline, name) for name in ("tokenizer", "tokenizer_2")}
    pipeline = None
    free_memory()
    clock.lap("encode_seconds")

    # 4. The adapters go in, all starting at the base model; some methods first measure what their layers see.
    same_run = run_identity(config, accelerator, fingerprints, prediction_of(objective.scheduler), encoded, pictures)
    first_step = read_step(checkpoint, same_run, config.loop.max_train_steps) if checkpoint else 0
    set_seed(config.loop.seed)  # for the adapters' first weights, whatever was drawn before
    measuring = {"batch_size": config.loop.train_batch_size, "seed": config.loop.seed, "accelerator": accelerator}
    put_in(adapter, models, new_tokens, partial(component_passes, encoded, objective, **measuring), checkpoint)
    make_trainable(models, config.hardware)
    settle_memory(models, encoded, config, accelerator)
    if wants_compiled(config.hardware, config.loop, accelerator, encoded.largest_shape):
        compile_blocks(models)
    clock.lap("inject_seconds")

    # 5. The loop.
    run = start_run(config, accelerator, adapter, models, encoded, objective, judge, dtype, checkpoint)
    metrics = MetricsLog(output_dir / METRICS, enabled=accelerator.is_main_process, after=first_step)
    sampler = Sampler(accelerator, base, parts, steps, config.prior.sample_batch_size)
    memory = PeakMemory(accelerator.device)
    start_trackers(accelerator, config.flags())
    total_steps, silent = config.loop.max_train_steps, not accelerator.is_main_process
    options = {"initial": first_step, "total": total_steps, "desc": "training", "unit": "step", "disable": silent}
    progress = tqdm(range(first_step, total_steps), **options)
    report = Report(run, clock, metrics, judge)
    with metrics, GracefulStop() as stop, report:
        checkpoints = Checkpoints(accelerator, output_dir, config.loop, same_run)
        hooks: list[Hook] = [
            ClearEarlier(accelerator, output_dir, judge, first_step, total_steps, checkpoint),
            Log(accelerator, metrics, progress),
            Look(run, clock, memory, metrics, judge, sampler, samples_every, report),
            checkpoints,
            EarlyStop(judge),
            Interruption(run, stop, checkpoints),
        ]
        for step in progress:
            done = train_step(run, step)
            ends = [hook.after_step(done) for hook in hooks]  # all of them, whatever the first says
            if any(ends):
                total_steps = done.number
                break
    accelerator.wait_for_everyone()
    clock.lap("train_seconds")
    clock.timings |= metrics.timings

    # 6. Adapter and record are saved before anything is drawn: running out of memory there must not lose the run.
    run.average.copy_to_parameters()
    peak = memory.megabytes
    finish(run, pictures, total_steps, sampler, fingerprints, words, clock, peak, judge.best)
    report.write(peak)
    end_training(accelerator, run.prepared)
    return output_dir


def main(argv: Sequence[str] | None = None) -> None:
    config = COMMAND if argv is None and COMMAND is not None else parse_command_line(argv)
    quiet_libraries()

    def command() -> None:
        with explained(config.loop.train_batch_size, config.output.output_dir):
            train(config)

    run_command(command)


if __name__ == "__main__":
    main()
