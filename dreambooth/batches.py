"""What a step of the loop takes: its samples with noise and timesteps, and their prompts' embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dreambooth.draws import CLASS, INSTANCE, Batch, picture_orders, training_batch
from dreambooth.encode import EncodedPrompts, encode_prompts
from dreambooth.prepare import PROMPTS_AT_ONCE, Encoded


class Batches:
    """The samples of each forward pass, a function of (seed, step, sample) whatever the processes.

    Args:
        share: this process's number, and how many there are.
        first_step: of the run, where it is resumed.
        prior_loss_weight: of class images, or of the class prompts that a teacher is asked for.
        teacher: each picture comes once more with its class's prompt.
    """

    def __init__(
        self,
        encoded: Encoded,
        *,
        seed: int,
        total_steps: int,
        batch_size: int,
        accumulation: int,
        share: tuple[int, int],
        num_train_timesteps: int,
        noise_offset: float,
        caption_dropout: float,
        prior_loss_weight: float,
        teacher: bool,
        device: torch.device,
    ) -> None:
        self.encoded, self.batch_size, self.share, self.device = encoded, batch_size, share, device
        self.weights = {INSTANCE: 1.0, CLASS: prior_loss_weight}
        self.class_weight = prior_loss_weight if teacher else None
        self.options = {
            "seed": seed,
            "num_train_timesteps": num_train_timesteps,
            "noise_offset": noise_offset,
            "caption_dropout": caption_dropout,
        }
        slots_per_step = batch_size * accumulation * share[1]
        self.orders = picture_orders(encoded.streams, seed=seed, slots_per_step=slots_per_step, num_steps=total_steps)

    def __call__(self, step: int, micro_step: int) -> Batch:
        first = (micro_step * self.share[1] + self.share[0]) * self.batch_size
        batch = training_batch(
            self.encoded.streams,
            self.orders,
            self.weights,
            step=step,
            slots=range(first, first + self.batch_size),
            **self.options,
        ).to(self.device)
        return batch if self.class_weight is None else with_class_prompts(batch, self.encoded, self.class_weight)


def with_class_prompts(batch: Batch, encoded: Encoded, prior_loss_weight: float) -> Batch:
    """The batch, and the same pictures and noise once more with their class's prompt."""
    rows = encoded.class_rows.to(batch.prompts.device)[batch.prompts]
    again = batch._replace(
        prompts=rows,
        weight=torch.full_like(batch.weight, prior_loss_weight),
        uncaptioned=torch.zeros_like(batch.uncaptioned),
    )
    return Batch(*(torch.cat(pair) for pair in zip(batch, again)))


class PromptEmbedder:
    """Prompt embeddings of batches: encoded once, or anew at each step by text encoders that learn.

    Args:
        text_encoders: both, that learn; None where they don't.
        prepared: the same as the accelerator wraps them.
        steps: they learn during the first so many.
    """

    def __init__(
        self,
        encoded: Encoded,
        text_encoders: Sequence[nn.Module] | None = None,
        prepared: Sequence[nn.Module] | None = None,
        steps: int = 0,
    ) -> None:
        self.encoded, self.text_encoders, self.prepared, self.steps = encoded, text_encoders, prepared, steps
        self._after: EncodedPrompts | None = None  # all prompts, once the text encoders have learned

    def learns(self, step: int) -> bool:
        """Whether the text encoders learn at a step, counted from 0."""
        return self.text_encoders is not None and step < self.steps

    def embed(self, batch: Batch, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt embeddings (B, tokens, d) and pooled ones (B, d2) of the batch's prompts."""
        if self.learns(step):
            encoders, skip = list(self.prepared), self.encoded.clip_skip
            prompts = encode_prompts(encoders, self.encoded.tokens, batch.prompts, skip)
        else:
            if self._after is None:
                self._after = self.current()
            prompts = self._after.rows(batch.prompts)
        nothing, unconditional = batch.uncaptioned, self.encoded.unconditional
        prompt_embeds, pooled = prompts
        if nothing.any():
            prompt_embeds = torch.where(nothing[:, None, None], unconditional.prompt_embeds, prompt_embeds)
            pooled = torch.where(nothing[:, None], unconditional.pooled_prompt_embeds, pooled)
        return prompt_embeds, pooled

    @torch.no_grad()
    def current(self) -> EncodedPrompts:
        """All prompts of the run as the text encoders make them now, without dropout."""
        if self.text_encoders is None:
            return self.encoded.prompts
        training = [model.training for model in self.text_encoders]
        for model in self.text_encoders:
            model.eval()
        rows = torch.arange(len(self.encoded.class_rows), device=self.encoded.prompts.prompt_embeds.device)
        encoders, skip = list(self.text_encoders), self.encoded.clip_skip
        parts = [encode_prompts(encoders, self.encoded.tokens, some, skip) for some in rows.split(PROMPTS_AT_ONCE)]
        for model, was in zip(self.text_encoders, training):
            model.train(was)
        return EncodedPrompts(*map(torch.cat, zip(*parts)))
