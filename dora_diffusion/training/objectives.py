"""What the denoiser is trained to predict. The base's scheduler decides: epsilon, v or flow.

epsilon: x_t = sqrt(abar) x0 + sqrt(1 - abar) eps, target eps                          (Ho et al. 2020)
v:       the same x_t, target sqrt(abar) eps - sqrt(1 - abar) x0                       (Salimans and Ho 2022)
flow:    x_t = (1 - sigma) x0 + sigma eps, target eps - x0, t = 1000 sigma             (Esser et al. 2024)
"""

from __future__ import annotations

from typing import Protocol

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_snr
from torch import Tensor

from dora_diffusion.errors import BaseModelError
from dora_diffusion.training.config import TimestepSampling

__all__ = ["DiffusionObjective", "FlowObjective", "Objective", "objective_of"]


class Objective(Protocol):
    """Draws timesteps, makes noisy latents and the target for them."""

    name: str

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` random timesteps by the density used in training, [count]."""
        ...

    def even_timesteps(self, count: int) -> Tensor:
        """`count` timesteps spread evenly over the noise levels, for a loss that is always measured alike."""
        ...

    def noisy(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...
    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor: ...
    def weight(self, t: Tensor, snr_gamma: float | None) -> Tensor:
        """Weight of each picture's loss, [batch]."""
        ...


class DiffusionObjective:
    """Epsilon- or v-prediction with the base's noise schedule."""

    def __init__(self, scheduler: SchedulerMixin, sampling: TimestepSampling = "uniform") -> None:
        self.sampling = sampling
        self.scheduler = DDPMScheduler.from_config(scheduler.config)
        self.name = str(self.scheduler.config.prediction_type)
        if self.name not in ("epsilon", "v_prediction"):
            raise BaseModelError(
                f"the base's scheduler predicts {self.name!r}; epsilon, v_prediction and flow matching can be trained."
            )
        self.steps = int(self.scheduler.config.num_train_timesteps)

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        if self.sampling == "uniform":
            return torch.randint(self.steps, (count,), generator=generator)
        return (_fractions(self.sampling, count, generator) * self.steps).long().clamp_max(self.steps - 1)

    def even_timesteps(self, count: int) -> Tensor:
        return ((torch.arange(count) + 0.5) / count * self.steps).long()

    def noisy(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return self.scheduler.add_noise(x0, eps, t)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps if self.name == "epsilon" else self.scheduler.get_velocity(x0, eps, t)

    def weight(self, t: Tensor, snr_gamma: float | None) -> Tensor:
        """Min-SNR (Hang et al. 2023); for v the signal-to-noise ratio is taken plus one, as its target implies."""
        if snr_gamma is None:
            return torch.ones_like(t, dtype=torch.float32)
        snr = compute_snr(self.scheduler, t).clamp_min(1e-8)
        return snr.clamp_max(snr_gamma) / (snr if self.name == "epsilon" else snr + 1)


class FlowObjective:
    """Flow matching on straight lines, noise levels by the logit-normal density of Stable Diffusion 3, or evenly."""

    name = "flow"

    def __init__(self, scheduler: SchedulerMixin, sampling: TimestepSampling = "logit_normal") -> None:
        self.sampling = sampling
        # The sigmas the base was made for, shift included, as it was before any inference step count was set.
        self.sigmas = type(scheduler).from_config(scheduler.config).sigmas.float()

    def timesteps(self, count: int, generator: torch.Generator) -> Tensor:
        return self._at(_fractions(self.sampling, count, generator))

    def even_timesteps(self, count: int) -> Tensor:
        return self._at((torch.arange(count) + 0.5) / count)

    def _at(self, fraction: Tensor) -> Tensor:
        levels = self.sigmas[self.sigmas > 0]  # from all noise to almost none
        return levels[(fraction * len(levels)).long().clamp_max(len(levels) - 1)] * 1000

    def noisy(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        sigma = (t / 1000).reshape(-1, 1, 1, 1)
        return (1 - sigma) * x0 + sigma * eps

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps - x0

    def weight(self, t: Tensor, snr_gamma: float | None) -> Tensor:
        return torch.ones_like(t)


def _fractions(sampling: TimestepSampling, count: int, generator: torch.Generator) -> Tensor:
    """Places between 0 and 1 on the base's schedule, [count]."""
    if sampling == "uniform":
        return torch.rand(count, generator=generator)
    return compute_density_for_timestep_sampling("logit_normal", count, 0.0, 1.0, generator=generator)


def objective_of(scheduler: SchedulerMixin, sampling: TimestepSampling | None = None) -> Objective:
    """The objective that this scheduler's base was trained with; `sampling` other than its own, if given.

    Raises BaseModelError.
    """
    kind = FlowObjective if "FlowMatch" in type(scheduler).__name__ else DiffusionObjective
    return kind(scheduler, sampling) if sampling else kind(scheduler)
