"""The denoising objective: noise levels, what the UNet should predict, and how its errors are weighted."""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, SchedulerMixin
from diffusers.training_utils import compute_snr

from dreambooth.draws import Batch
from settings.learning import LossOptions

PREDICTION_TYPES = ("epsilon", "v_prediction")


class Objective:
    """Noise, target and weights of one base model.

    A prediction's error is measured as the UNet makes it (noise, velocity, or EDM's F). Weights are given for an error
    of the clean latents x0 and carried over with the predictor's own factor (dx0 / dprediction)^2, which is 1 / SNR for
    noise and 1 / (SNR + 1) for velocity.

    Args:
        base_scheduler: of the base; gives the schedule and what is predicted.
        edm_style: noise levels sigma, and EDM's preconditioning where the base has it (arXiv 2206.00364).
        snr_gamma: min-SNR weights min(SNR, gamma) on x0 (arXiv 2303.09556).
        debiased_estimation: weights sqrt(SNR) on x0 (arXiv 2310.08442).
        huber_c: pseudo-Huber 2c (sqrt(d^2 + c^2) - c) instead of d^2 (arXiv 2403.16728); None: d^2.

    Raises:
        ValueError: if the base predicts something that can't be trained here, or weights and EDM style contradict.
    """

    @classmethod
    def from_options(cls, base_scheduler: SchedulerMixin, options: LossOptions) -> Objective:
        return cls(
            base_scheduler,
            edm_style=options.do_edm_style_training,
            snr_gamma=options.snr_gamma,
            debiased_estimation=options.debiased_estimation,
            huber_c=options.huber_c if options.loss_type == "huber" else None,
        )

    def __init__(
        self,
        base_scheduler: SchedulerMixin,
        *,
        edm_style: bool = False,
        snr_gamma: float | None = None,
        debiased_estimation: bool = False,
        huber_c: float | None = None,
    ) -> None:
        kind = base_scheduler.config.get("prediction_type", "epsilon")
        if kind not in PREDICTION_TYPES:
            raise ValueError(
                f"the base's scheduler has prediction_type {kind!r}: {' and '.join(PREDICTION_TYPES)} work"
            )
        needs_edm = isinstance(base_scheduler, EDMEulerScheduler)
        if needs_edm and not edm_style:
            raise ValueError("this base was trained in EDM's way: add --do_edm_style_training")
        if edm_style and (snr_gamma is not None or debiased_estimation):
            raise ValueError("--do_edm_style_training has weights of its own: leave --snr_gamma and --debiased_… out")
        self.kind, self.edm_style = kind, edm_style
        self.snr_gamma, self.debiased_estimation, self.huber_c = snr_gamma, debiased_estimation, huber_c
        if needs_edm:
            self.scheduler = EDMEulerScheduler.from_config(base_scheduler.config)
        elif edm_style:
            self.scheduler = EulerDiscreteScheduler.from_config(base_scheduler.config)
        else:
            self.scheduler = DDPMScheduler.from_config(base_scheduler.config)

    @property
    def num_train_timesteps(self) -> int:
        return self.scheduler.config.num_train_timesteps

    def model_input(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """What the UNet is called with: noisy latents (B, 4, h, w) and timesteps (B,)."""
        if not self.edm_style:
            return self.scheduler.add_noise(batch.latents, batch.noise, batch.timesteps), batch.timesteps
        sigmas = self._sigmas(batch)
        noisy = batch.latents + sigmas * batch.noise
        timesteps = self.scheduler.timesteps.to(batch.latents.device)[batch.timesteps]
        if isinstance(self.scheduler, EDMEulerScheduler):
            return self.scheduler.precondition_inputs(noisy, sigmas), timesteps
        return noisy / (sigmas**2 + 1) ** 0.5, timesteps

    def target(self, batch: Batch) -> torch.Tensor:
        """What the UNet should predict, (B, 4, h, w)."""
        if not self.edm_style:
            if self.kind == "v_prediction":  # arXiv 2202.00512, appendix D
                return self.scheduler.get_velocity(batch.latents, batch.noise, batch.timesteps)
            return batch.noise
        sigmas = self._sigmas(batch)
        noisy = batch.latents + sigmas * batch.noise
        c_skip, c_out = self._edm_output_factors(sigmas)
        return (batch.latents - c_skip * noisy) / c_out

    def sample_weights(self, batch: Batch) -> torch.Tensor:
        """(B,) weight of each sample's squared error of the prediction."""
        if self.edm_style:
            if isinstance(self.scheduler, EDMEulerScheduler):
                # lambda(sigma) = 1 / c_out^2 (Table 1 of EDM). diffusers' script takes 1 / sigma^2 here too, which all
                # but ignores high noise.
                return torch.ones(len(batch.latents), device=batch.latents.device)
            sigmas = self._sigmas(batch)
            return (self._edm_output_factors(sigmas)[1] / sigmas).square().flatten()
        if self.snr_gamma is None and not self.debiased_estimation:
            return torch.ones(len(batch.latents), device=batch.latents.device)
        snr = compute_snr(self.scheduler, batch.timesteps)
        x0_weight = snr.sqrt() if self.debiased_estimation else snr.clamp(max=self.snr_gamma)
        factor = snr + 1 if self.kind == "v_prediction" else snr.clamp(min=1e-8)  # SNR is 0 at a zero-terminal end
        return x0_weight / factor

    def loss(
        self, prediction: torch.Tensor, batch: Batch, num_instances: int, target: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Weighted mean error, a scalar: ``sum_i w_i error_i / num_instances``.

        With class images as further samples of the batch this is ``mean(instance) + prior_loss_weight mean(class)``
        (DreamBooth, arXiv 2208.12242, Eq. 2).

        Args:
            prediction: (B, 4, h, w), the UNet's.
            num_instances: how many of the B samples are instance images.
            target: instead of `target`'s.
        """
        # fp32: a sum over a latent overflows in fp16
        error = prediction.float() - (self.target(batch) if target is None else target).float()
        c = self.huber_c
        error = error.square() if c is None else 2 * c * ((error.square() + c**2).sqrt() - c)
        error = (error * batch.mask).mean(dim=(1, 2, 3)) / batch.mask.mean(dim=(1, 2, 3)).clamp(min=1e-8)  # (B,)
        return (error * self.sample_weights(batch) * batch.weight).sum() / num_instances

    def _sigmas(self, batch: Batch) -> torch.Tensor:
        """(B, 1, 1, 1) noise level of each sample."""
        return self.scheduler.sigmas.to(batch.latents.device)[batch.timesteps].reshape(-1, 1, 1, 1).float()

    def _edm_output_factors(self, sigmas: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """c_skip and c_out of ``x0 = c_skip noisy + c_out prediction``, as the sampler computes it."""
        if isinstance(self.scheduler, EDMEulerScheduler):
            one, zero = torch.ones_like(sigmas), torch.zeros_like(sigmas)
            return tuple(self.scheduler.precondition_outputs(*pair, sigmas) for pair in ((one, zero), (zero, one)))
        if self.kind == "v_prediction":
            return 1 / (sigmas**2 + 1), -sigmas / (sigmas**2 + 1) ** 0.5
        return torch.ones_like(sigmas), -sigmas
