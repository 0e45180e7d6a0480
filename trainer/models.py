"""The models that learn: new words and adapters go in, and what a checkpoint holds of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from diffusers.training_utils import cast_training_params
from peft import TrainableTokensConfig
from safetensors.torch import load_file
from torch import nn

from dreambooth.batches import PROMPTS_AT_ONCE
from dreambooth.draws import INSTANCE, Batch
from dreambooth.loss import Objective
from dreambooth.passes import run_unet_passes
from dreambooth.prepare import Encoded
from inference.tokens import add_new_word, check_new_word, token_names
from methods.adapter import (
    NO_PASSES,
    Adapter,
    Passes,
    Places,
    check_rank_patterns,
    make_adapter,
    without_adapters,
)
from methods.base_passes import LABEL, run_base, unet_identity
from methods.components import ENCODERS, TEXT_ENCODERS
from nora import calibration_mask
from settings.learning import HardwareOptions
from settings.method import TextOptions
from settings.training import TrainConfig
from storage.tensors import write_safetensors
from trainer.blocks import keep_less
from trainer.sharding import share_frozen

TRAINED_STATE = "trained.safetensors"


def trained_names(text: TextOptions) -> list[str]:
    """The pipeline's parts that learn."""
    return ["unet", *(TEXT_ENCODERS if text.learns else ())]


def make_run_adapter(config: TrainConfig) -> Adapter:
    """The method that the flags name."""
    method, loop = config.method, config.loop
    places = Places(method.targets, method.ranks())
    arguments = {"seed": loop.seed, "total_steps": loop.max_train_steps, "places": places}
    return make_adapter(method.name, method.arguments(), **arguments)


def check_fits(adapter: Adapter, models: Mapping[str, nn.Module], text: TextOptions) -> None:
    """Raise ValueError for a layer that can't hold the method, before anything is drawn, measured or written."""
    adapted = {name: model for name, model in models.items() if name == "unet" or text.train_text_encoder}
    for name, model in adapted.items():
        adapter.check_fits(name, model)
    check_rank_patterns(adapted, adapter.places)


def add_new_tokens(pipeline: StableDiffusionXLPipeline, text: TextOptions, seed: int) -> dict[str, list[int]]:
    """The abstraction's new tokens in both text encoders, as far from zero as the old ones; their ids by encoder."""
    if not text.train_text_encoder_ti:
        return {}
    word, count, embeddings = text.token_abstraction, text.num_new_tokens_per_abstraction, {}
    for key, (encoder, _) in ENCODERS.items():
        weight = getattr(pipeline, encoder).get_input_embeddings().weight
        generator = torch.Generator().manual_seed(seed)
        embeddings[key] = torch.randn((count, weight.shape[1]), generator=generator) * weight.float().std().cpu()
    add_new_word(pipeline, word, embeddings)
    names = token_names(word, count)
    return {
        encoder: getattr(pipeline, tokenizer).convert_tokens_to_ids(names) for encoder, tokenizer in ENCODERS.values()
    }


def reserve_new_tokens(outline: StableDiffusionXLPipeline, text: TextOptions) -> dict[str, str]:
    """The abstraction -> its tokens, which the tokenizers know afterwards; for a base without weights.

    Raises:
        ValueError: as `add_new_tokens`.
    """
    if not text.train_text_encoder_ti:
        return {}
    word, names = text.token_abstraction, token_names(text.token_abstraction, text.num_new_tokens_per_abstraction)
    widths = {key: getattr(outline, encoder).config.hidden_size for key, (encoder, _) in ENCODERS.items()}
    check_new_word(outline, word, {key: torch.empty(len(names), width) for key, width in widths.items()})
    for _, tokenizer in ENCODERS.values():
        getattr(outline, tokenizer).add_tokens(names)
    return {word: "".join(names)}


def put_in(
    adapter: Adapter,
    models: Mapping[str, nn.Module],
    new_tokens: Mapping[str, list[int]],
    passes: Callable[[str, nn.Module], Passes],
    checkpoint: Path | None = None,
) -> None:
    """Let the models learn: new tokens in text encoders that have them, the method's layers elsewhere.

    Args:
        new_tokens: component -> ids.
        passes: of a component, for methods that measure something.
        checkpoint: of the same run; what learns gets the very numbers that it had.
    """
    adapted = {name: model for name, model in models.items() if name not in new_tokens}
    for name, ids in new_tokens.items():
        models[name].add_adapter(TrainableTokensConfig(token_indices=list(ids), target_modules=["token_embedding"]))
    if checkpoint:
        adapter.restore(adapted, checkpoint, passes)
        state = load_file(checkpoint / TRAINED_STATE)
        with torch.no_grad():
            for name, tensor in state_tensors(adapter, models):
                tensor.copy_(state[name])
        return
    for name, model in adapted.items():
        adapter.inject(name, model, passes(name, model))


def state_tensors(adapter: Adapter, models: Mapping[str, nn.Module]) -> Iterator[tuple[str, torch.Tensor]]:
    """What a checkpoint holds of the models, by component and name."""
    for component, model in models.items():
        if component in adapter.models:
            tensors = adapter.state_tensors(component)
        else:  # new tokens
            tensors = {name: p for name, p in model.named_parameters() if p.requires_grad}
        for name, tensor in tensors.items():
            yield f"{component}.{name}", tensor


def save_state(adapter: Adapter, models: Mapping[str, nn.Module], folder: Path) -> None:
    write_safetensors(folder / TRAINED_STATE, dict(state_tensors(adapter, models)))


def make_trainable(models: Mapping[str, nn.Module], hardware: HardwareOptions) -> None:
    """Prepare the models for the loop: what learns is in fp32, and as much is kept for the backward pass as asked."""
    for model in models.values():
        cast_training_params(model, dtype=torch.float32)
        model.train()  # a text encoder's dropout is 0 in SDXL; gradient checkpointing asks for training mode
        share_frozen(model)
        keep_less(model, hardware.selective_checkpointing)
        if hardware.gradient_checkpointing:  # diffusers and transformers name it differently
            (getattr(model, "enable_gradient_checkpointing", None) or model.gradient_checkpointing_enable)()


def component_passes(
    encoded: Encoded,
    objective: Objective,
    component: str,
    model: nn.Module,
    *,
    accelerator: Accelerator,
    batch_size: int,
    seed: int,
) -> Passes:
    """The forward passes that measure what a component's attention sees: UNet batches, or all prompts."""

    def unet_passes(passes: int) -> None:
        run_unet_passes(
            model,
            encoded.streams[INSTANCE],
            encoded.prompts,
            encoded.unconditional,
            objective,
            passes=passes,
            batch_size=batch_size,
            seed=seed,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )

    def prompt_passes(_: int) -> None:
        tokens = encoded.calibration_tokens[TEXT_ENCODERS.index(component)]
        parts = (tokens[name].to(accelerator.device).split(PROMPTS_AT_ONCE) for name in ("input_ids", "attention_mask"))
        for input_ids, attention_mask in zip(*parts):
            with calibration_mask(attention_mask):  # padding does not count
                model(input_ids)

    of_run = unet_passes if component == "unet" else prompt_passes
    if encoded.generic is None:
        return NO_PASSES._replace(of_run=of_run)
    of_base = partial(run_base, component, model, encoded.generic, objective.scheduler)
    identity = unet_identity(encoded.generic.identity, objective.scheduler) if component == "unet" else ""
    return Passes(of_run, of_base, LABEL, identity)


@torch.no_grad()
def teach_by_base(
    unet: nn.Module,
    encoded: Encoded,
    batch: Batch,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """The target, with the base's own prediction in the second half of the batch, which has class prompts."""
    half = len(target) // 2
    prompt_embeds, pooled = encoded.prompts.rows(batch.prompts[half:])  # as the base's own text encoders make them
    with without_adapters(unet):
        prior = unet(
            noisy_latents[half:],
            timesteps[half:],
            prompt_embeds,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": batch.time_ids[half:]},
        ).sample
    return torch.cat([target[:half], prior.to(target.dtype)])
