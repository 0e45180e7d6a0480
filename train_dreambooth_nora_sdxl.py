"""Teach SDXL a subject from a few pictures, with NoRA (nested low-rank adaptation, arXiv 2408.10280) or LoRA.

accelerate launch train_dreambooth_nora_sdxl.py \
    --pretrained_model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \
    --instance_data_dir my_cat --instance_prompt "a photo of [V] cat" --output_dir out/cat
"""

from __future__ import annotations

import inference  # noqa: F401 -- before the libraries, because it quietens what they print on import

# isort: split
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers.training_utils import cast_training_params, free_memory
from tqdm.auto import tqdm

from dreambooth.draws import CLASS, INSTANCE, picture_orders, step_seed, training_batch
from dreambooth.loss import Objective
from dreambooth.prepare import current_prompts, embed_prompts, encode_run, with_class_prompts
from inference.base import check_xformers
from inference.tokens import spell_out, spellings
from methods.components import BEST, EMBEDDINGS, FOLDED_WEIGHTS, INNER_WEIGHTS, RUN_RECORD
from runs.checkpoints import (
    FolderLock,
    GracefulStop,
    check_earlier_run,
    clear_earlier_run,
    find_checkpoint,
    identity,
    read_step,
    save_checkpoint,
)
from runs.exports import KOHYA_WEIGHTS, PEFT_FOLDER, check_files, save_adapter, save_components
from runs.record import (
    LOSS_PLOT,
    METRICS,
    MODEL_CARD,
    SAMPLES,
    Clock,
    MetricsLog,
    module_fingerprint,
    reset_peak_memory,
    run_record,
    samples_after,
    write_card,
)
from settings.command_line import parse_config, quiet_libraries, run_command
from settings.training import TrainConfig, is_first_process
from storage.files import write_atomic
from trainer.accelerator import PRECISIONS, end_training, make_accelerator, push_to_hub, start_trackers
from trainer.best_adapter import RunJudge
from trainer.diagnostics import GradientWatch, check_loss, explained
from trainer.hooks import Observer
from trainer.memory import memory_line, quantize_frozen
from trainer.methods import (
    adapter_config,
    add_new_tokens,
    check_fits,
    inject,
    outer_ranks,
    restore,
    run_passes,
    teach_by_base,
    trained_components,
    trained_parameters,
)
from trainer.optimizer import (
    Average,
    build_optimizer,
    build_schedule,
    parameter_groups,
    scaled_learning_rate,
)
from trainer.preflight import preflight
from trainer.samples import draw_class_images, draw_samples, keep_samples, load_base
from trainer.sharding import share_frozen

# What a finished run leaves.
WEIGHTS = (FOLDED_WEIGHTS, INNER_WEIGHTS, KOHYA_WEIGHTS, EMBEDDINGS, PEFT_FOLDER)
RESULTS = (RUN_RECORD, MODEL_CARD, LOSS_PLOT, *WEIGHTS)


def train(config: TrainConfig) -> Path:
    """Train one adapter and write it, its record and its samples; returns the folder.

    Raises:
        ValueError: for anything wrong with the configuration, the pictures or the base; nothing is written then.
    """
    with FolderLock() as lock:
        return train_alone(config, lock)


def train_alone(config: TrainConfig, lock: FolderLock) -> Path:
    """`train`, which lets go of the folder that is locked here."""
    clock = Clock()
    # 1. What can be refused without the base is refused before it is loaded.
    config, pictures = preflight(config)
    output_dir = Path(config.output_dir)
    if config.dry_run:
        if is_first_process():
            print(pictures.report(config))
        return output_dir
    checkpoint = find_checkpoint(config.resume_from_checkpoint, output_dir)
    if config.resume_from_checkpoint and checkpoint is None:
        print(f"{output_dir} has no checkpoint yet: starting from the beginning")
    check_earlier_run(output_dir, [*RESULTS, SAMPLES, BEST], RUN_RECORD, METRICS, resumes=checkpoint is not None)
    accelerator = make_accelerator(config, output_dir)
    if config.enable_xformers_memory_efficient_attention:
        check_xformers(accelerator.device)
    epoch_steps = pictures.epoch_steps(config, accelerator.num_processes)
    sampling_steps = config.sampling_steps(epoch_steps)
    config = replace(
        config,
        max_train_steps=config.total_steps(epoch_steps),
        learning_rate=scaled_learning_rate(config, accelerator.num_processes),
        mixed_precision=accelerator.mixed_precision,
        validation_prompt=config.validation_prompt or pictures.instance_prompts,
    )
    judge = RunJudge(config, accelerator, pictures)
    text_steps = config.text_steps
    first_step = read_step(checkpoint, identity(asdict(config)), config.max_train_steps) if checkpoint else 0

    # 2. The frozen base.
    dtype = PRECISIONS[accelerator.mixed_precision]
    pipeline = load_base(config, accelerator, dtype)
    objective = Objective(
        pipeline.scheduler,
        edm_style=config.do_edm_style_training,
        snr_gamma=config.snr_gamma,
        debiased_estimation=config.debiased_estimation,
        huber_c=config.huber_c if config.loss_type == "huber" else None,
    )
    trained = {name: getattr(pipeline, name) for name in trained_components(config)}
    check_fits(config, trained)
    base_fingerprints = {name: module_fingerprint(model) for name, model in trained.items()}
    new_tokens = add_new_tokens(config, pipeline) if config.train_text_encoder_ti else {}
    configs = {name: adapter_config(config, name, new_tokens.get(name)) for name in trained}

    # 3. Pictures and prompts are encoded once, and what encoded them is freed unless it is trained.
    draw_class = partial(draw_class_images, config, accelerator, pipeline)
    spell = partial(spell_out, pipeline)
    encoded, pictures = encode_run(config, accelerator, pipeline, pictures, draw_class, spell, lock.take)
    tokenizers = {name: getattr(pipeline, name) for name in ("tokenizer", "tokenizer_2")}
    pipeline = draw_class = spell = None
    free_memory()
    clock.lap("encode_seconds")

    # 4. The adapters go in, all starting at the base model; NoRA first measures what its layers see.
    who = identity(
        asdict(config),
        base=base_fingerprints,
        autoencoder_and_text_encoders=encoded.encoders,
        pictures_and_prompts=pictures.hash(),
        number_of_processes=accelerator.num_processes,
    )
    if checkpoint:
        read_step(checkpoint, who, config.max_train_steps)
    set_seed(config.seed)  # for the adapters' first weights, whatever was drawn before
    if checkpoint:
        restore(trained, configs, checkpoint)
    for name, model in trained.items():
        if not checkpoint:
            inject(model, configs[name], partial(run_passes, config, accelerator, name, model, encoded, objective))
        cast_training_params(model, dtype=torch.float32)
        model.train()  # a text encoder's dropout is 0 in SDXL; gradient checkpointing asks for training mode
        share_frozen(model)
        if config.gradient_checkpointing:  # diffusers and transformers name it differently
            (getattr(model, "enable_gradient_checkpointing", None) or model.gradient_checkpointing_enable)()
    parameters = [parameter for _, parameter in trained_parameters(trained)]
    if accelerator.is_main_process:
        samples = config.train_batch_size * (2 if config.with_prior_preservation else 1)
        largest = encoded.largest_shape, encoded.prompt_length
        print(memory_line(trained, samples, *largest, accelerator.device, config.quantize_base))
    if config.quantize_base == "int8":
        for model in trained.values():
            quantize_frozen(model)
    clock.lap("inject_seconds")

    # 5. The loop.
    optimizer = build_optimizer(config, parameter_groups(config, trained))
    lr_scheduler = build_schedule(config, optimizer)
    average = Average(parameters, config.ema_decay)
    models = {name: accelerator.prepare(model) for name, model in trained.items()}
    optimizer = accelerator.prepare(optimizer)
    accelerator.register_for_checkpointing(lr_scheduler, average, judge)
    accelerator.register_save_state_pre_hook(partial(save_components, config, accelerator, trained, average))
    accelerator.register_load_state_pre_hook(lambda models, _: models.clear())  # they were restored before
    if checkpoint:
        accelerator.load_state(str(checkpoint))
    slots_per_step = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
    orders = picture_orders(
        encoded.streams, seed=config.seed, slots_per_step=slots_per_step, num_steps=config.max_train_steps
    )
    metrics = MetricsLog(output_dir / METRICS, enabled=accelerator.is_main_process, after=first_step)
    reset_peak_memory()
    start_trackers(accelerator, config)
    progress = tqdm(
        range(first_step, config.max_train_steps),
        initial=first_step,
        total=config.max_train_steps,
        desc="training",
        unit="step",
        disable=not accelerator.is_main_process,
    )
    observer = Observer(
        config, accelerator, trained, tokenizers, dtype, encoded, objective, average, judge, metrics, sampling_steps
    )
    watch = GradientWatch({} if checkpoint else trained, config.mixed_precision)
    earlier = samples_after(output_dir, first_step) if checkpoint else [SAMPLES, BEST]
    clear_earlier = partial(
        clear_earlier_run, accelerator, output_dir, [*RESULTS, *earlier], keep_state=checkpoint is not None
    )
    if first_step == config.max_train_steps:
        clear_earlier()
    settled = None  # the prompts' embeddings, once the text encoders have learned
    with metrics, GracefulStop() as stop:
        for step in progress:
            step_started, step_loss = time.perf_counter(), 0.0
            torch.manual_seed(step_seed(config.seed, step, accelerator.process_index))  # for dropout
            if config.trains_text and settled is None and step >= text_steps:
                settled = current_prompts(config, trained, encoded)  # the text encoders learn no more
            for micro_step in range(config.gradient_accumulation_steps):
                with accelerator.accumulate(*models.values()):
                    share = micro_step * accelerator.num_processes + accelerator.process_index
                    first = share * config.train_batch_size
                    batch = training_batch(
                        encoded.streams,
                        orders,
                        {INSTANCE: 1.0, CLASS: config.prior_loss_weight},
                        step=step,
                        slots=range(first, first + config.train_batch_size),
                        seed=config.seed,
                        num_train_timesteps=objective.num_train_timesteps,
                        noise_offset=config.noise_offset,
                        caption_dropout=config.caption_dropout,
                    ).to(accelerator.device)
                    if config.prior_teacher:
                        batch = with_class_prompts(batch, encoded, config.prior_loss_weight)
                    prompt_embeds, pooled = embed_prompts(config, models, encoded, batch, settled)
                    noisy_latents, timesteps = objective.model_input(batch)
                    noisy_latents, target = noisy_latents.to(dtype), objective.target(batch)
                    if config.prior_teacher:
                        unet = trained["unet"]
                        target = teach_by_base(config, unet, encoded, batch, noisy_latents, timesteps, target)
                    prediction = models["unet"](
                        noisy_latents,
                        timesteps,
                        prompt_embeds,
                        added_cond_kwargs={"text_embeds": pooled, "time_ids": batch.time_ids},
                    ).sample
                    loss = objective.loss(prediction, batch, config.train_batch_size, target)
                    accelerator.backward(loss)
                    if accelerator.sync_gradients:
                        if watch.unseen:
                            teaches_text = settled is None and encoded.teaches_text(batch, config.train_batch_size)
                            loss_scale = accelerator.scaler.get_scale() if accelerator.scaler else 1
                            norms = watch.norms(teaches_text).items()
                            logged = {f"gradient_norm/{name}": norm / loss_scale for name, norm in norms}
                            accelerator.log(logged, step=step + 1)
                        accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
                    step_loss += accelerator.reduce(loss.detach(), "mean").item() / config.gradient_accumulation_steps
                    check_loss(step_loss, step + 1, config.mixed_precision, config.learning_rate)
                    optimizer.step()
                    optimizer.zero_grad()
            learning_rate = lr_scheduler.get_last_lr()[0]
            lr_scheduler.step()
            average.step()
            done = step + 1
            if step == first_step:  # the run works: only now may the results of an earlier one go
                clear_earlier()
            logged = {"loss": step_loss, "learning_rate": learning_rate}
            metrics.write(done, **logged, seconds=round(time.perf_counter() - step_started, 5))
            accelerator.log(logged, step=done)
            progress.set_postfix(loss=f"{step_loss:.4f}", lr=f"{learning_rate:.1e}")
            with clock.pause():  # looking is not training
                observer.look(done)
            if done % config.checkpointing_steps == 0:
                save_checkpoint(accelerator, output_dir, done, who, config.checkpoints_total_limit)
            if judge.due(done) and judge.gives_up():
                config = replace(config, max_train_steps=done)
                break
            if stop.asked(accelerator) and done < config.max_train_steps:
                path = save_checkpoint(accelerator, output_dir, done, who, config.checkpoints_total_limit)
                end_training(accelerator, models)
                if accelerator.is_main_process:
                    print(f"stopped; {path} is whole, go on with --resume_from_checkpoint latest", file=sys.stderr)
                sys.exit(128 + stop.signal)
    accelerator.wait_for_everyone()
    clock.lap("train_seconds")
    clock.timings |= metrics.timings

    # 6. Adapter and record are saved before anything is drawn: running out of memory there must not lose the run.
    average.copy_to_parameters()
    if accelerator.is_main_process:
        files = save_adapter(config, trained, output_dir)
        check_files(config, trained, output_dir)
        record = run_record(
            config,
            trained=trained,
            base_fingerprints=base_fingerprints,
            outer_ranks=outer_ranks(trained),
            clock=clock,
            folder=output_dir,
            files=files,
            best=judge.best,
            new_words=spellings(tokenizers["tokenizer"]),
            device=accelerator.device,
            dtype=dtype,
            num_processes=accelerator.num_processes,
        )
        write_atomic(output_dir / RUN_RECORD, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        write_card(output_dir, record)
    samples = draw_samples(config, accelerator, trained | tokenizers, dtype)
    keep_samples(accelerator, samples, output_dir / SAMPLES, config.max_train_steps)
    if accelerator.is_main_process:
        write_card(output_dir, record, [(sample.prompt, f"{SAMPLES}/{sample.file}") for sample in samples])
        if config.push_to_hub:
            print(f"uploaded to {push_to_hub(config, output_dir)}")
        print(f"{output_dir}: adapter and record are there")
    end_training(accelerator, models)
    return output_dir


def main(argv: Sequence[str] | None = None) -> None:
    config = parse_config(TrainConfig, argv, description=__doc__.split("\n")[0])
    quiet_libraries()

    def command() -> None:
        with explained(config):
            train(config)

    run_command(command)


if __name__ == "__main__":
    main()
