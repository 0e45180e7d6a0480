"""Adapter methods by name: from flags to PEFT configurations, into the base's modules, and their state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig, PeftConfig, TrainableTokensConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import nn

from dreambooth.draws import INSTANCE, Batch
from dreambooth.loss import Objective
from dreambooth.passes import run_unet_passes
from dreambooth.prepare import PROMPTS_AT_ONCE, Encoded
from inference.tokens import ENCODERS, add_new_word, token_names
from methods.basis_cache import basis_cache
from methods.components import INNER_WEIGHTS, adapter_components
from nora import NoraConfig, NoraLinear, calibration_mask, check_targets, load_inner, preprocess_nora
from settings.training import TEXT_ENCODERS, TrainConfig
from storage.files import write_safetensors

UNET_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT_ENCODER_TARGETS = ["q_proj", "k_proj", "v_proj", "out_proj"]
TRAINED_STATE = "trained.safetensors"


def trained_components(config: TrainConfig) -> list[str]:
    """Names of the pipeline's parts that get an adapter."""
    return ["unet", *(TEXT_ENCODERS if config.trains_text else ())]


def adapter_config(config: TrainConfig, component: str, token_indices: list[int] | None = None) -> PeftConfig:
    """PEFT's configuration for one component: unet, text_encoder or text_encoder_2.

    Args:
        token_indices: of the new tokens, where these are what a text encoder learns.
    """
    if component != "unet" and config.train_text_encoder_ti:
        return TrainableTokensConfig(token_indices=list(token_indices), target_modules=["token_embedding"])
    targets = UNET_TARGETS if component == "unet" else TEXT_ENCODER_TARGETS
    if config.method == "lora":
        return LoraConfig(
            r=config.rank,
            lora_alpha=config.lora_alpha or config.rank,
            lora_dropout=config.lora_dropout,
            use_dora=config.use_dora,
            init_lora_weights="gaussian",
            target_modules=targets,
        )
    return NoraConfig(
        r=config.rank,
        outer_r=config.outer_rank,
        nora_alpha=config.lora_alpha,
        nora_dropout=config.lora_dropout,
        target_modules=targets,
        outer_init=config.outer_init,
        awsvd_gamma=config.awsvd_gamma,
        sigma_side=config.sigma_side,
        inner_init=config.inner_init,
        inner_std=config.inner_std,
    )


def add_new_tokens(config: TrainConfig, pipeline: StableDiffusionXLPipeline) -> dict[str, list[int]]:
    """The abstraction's new tokens in both text encoders, as far from zero as the old ones; their ids by encoder."""
    embeddings = {}
    for key, (encoder, _) in ENCODERS.items():
        weight = getattr(pipeline, encoder).get_input_embeddings().weight
        shape = (config.num_new_tokens_per_abstraction, weight.shape[1])
        generator = torch.Generator().manual_seed(config.seed)
        embeddings[key] = torch.randn(shape, generator=generator) * weight.float().std().cpu()
    add_new_word(pipeline, config.token_abstraction, embeddings)
    names = token_names(config.token_abstraction, config.num_new_tokens_per_abstraction)
    return {
        encoder: getattr(pipeline, tokenizer).convert_tokens_to_ids(names) for encoder, tokenizer in ENCODERS.values()
    }


def check_fits(config: TrainConfig, trained: Mapping[str, nn.Module]) -> None:
    """Refuse ranks that a layer can't hold, before anything is drawn, measured or written.

    Raises:
        ValueError: with the component, the layer and its limit.
    """
    for name, model in trained.items():
        if config.train_text_encoder_ti and name != "unet":
            continue
        peft_config = adapter_config(config, name)
        if config.method == "nora":
            try:
                check_targets(model, peft_config)
            except ValueError as error:
                raise ValueError(f"{name}: {error} (r is --rank, outer_r is --outer_rank)") from error
        for layer_name, layer in model.named_modules():
            adapted = any(layer_name.endswith(f".{target}") for target in peft_config.target_modules)
            if adapted and config.rank > min(layer.weight.shape):
                raise ValueError(
                    f"{name}: --rank {config.rank} exceeds min(out, in)={min(layer.weight.shape)} at {layer_name}, "
                    "the most that an update of it can have: lower it"
                )


@basis_cache()
def inject(model: nn.Module, peft_config: PeftConfig, run_passes: Callable[[], None]) -> None:
    """Put an adapter that starts at the base model into it; NoRA first measures what its layers see.

    Args:
        run_passes: the forward passes to measure in.
    """
    if isinstance(peft_config, NoraConfig):
        preprocess_nora(model, peft_config, run_passes)
    model.add_adapter(peft_config)


@basis_cache()
def restore(trained: Mapping[str, nn.Module], configs: Mapping[str, PeftConfig], checkpoint: Path) -> None:
    """Put the adapters of a checkpoint into the components, with the very numbers that they had."""
    nora = {name: model for name, model in trained.items() if isinstance(configs[name], NoraConfig)}
    if nora:  # the outer factors come from the statistics in the file: nothing is measured again
        load_inner(checkpoint / INNER_WEIGHTS, adapter_components(nora))
    for name, model in trained.items():
        if name not in nora:
            model.add_adapter(configs[name])
    state = load_file(checkpoint / TRAINED_STATE)
    for name, parameter in trained_parameters(trained):
        parameter.data = state[name].to(parameter.device)


def trained_parameters(trained: Mapping[str, nn.Module]) -> Iterator[tuple[str, nn.Parameter]]:
    """What is trained, by component and name."""
    for component, model in trained.items():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                yield f"{component}.{name}", parameter


def save_trained(trained: Mapping[str, nn.Module], folder: Path) -> None:
    write_safetensors(folder / TRAINED_STATE, dict(trained_parameters(trained)))


def outer_ranks(trained: Mapping[str, nn.Module]) -> list[int]:
    """The outer ranks that the NoRA layers got; empty for another method."""
    layers = [module for model in trained.values() for module in model.modules() if isinstance(module, NoraLinear)]
    return sorted({inner.in_features for layer in layers for inner in layer.nora_inner_A.values()})


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The base model, as it was before the adapter."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def run_passes(
    config: TrainConfig,
    accelerator: Accelerator,
    component: str,
    model: nn.Module,
    encoded: Encoded,
    objective: Objective,
) -> None:
    """The forward passes that measure what a component's attention sees."""
    if component == "unet":
        run_unet_passes(
            model,
            encoded.streams[INSTANCE],
            encoded.prompts,
            encoded.unconditional,
            objective,
            passes=config.calibration_passes,
            batch_size=config.train_batch_size,
            seed=config.seed,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
        )
        return
    tokens = encoded.calibration_tokens[TEXT_ENCODERS.index(component)]
    parts = (tokens[name].to(accelerator.device).split(PROMPTS_AT_ONCE) for name in ("input_ids", "attention_mask"))
    for input_ids, attention_mask in zip(*parts):
        with calibration_mask(attention_mask):  # padding does not count
            model(input_ids)


@torch.no_grad()
def teach_by_base(
    config: TrainConfig,
    unet: nn.Module,
    encoded: Encoded,
    batch: Batch,
    noisy_latents: torch.Tensor,
    timesteps: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """The target, with the base's own prediction in the half of the batch that has class prompts."""
    half = config.train_batch_size
    prompt_embeds, pooled = encoded.prompts.rows(batch.prompts[half:])  # as the base's own text encoders make them
    with without_adapters(unet):
        prior = unet(
            noisy_latents[half:],
            timesteps[half:],
            prompt_embeds,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": batch.time_ids[half:]},
        ).sample
    return torch.cat([target[:half], prior.to(target.dtype)])
