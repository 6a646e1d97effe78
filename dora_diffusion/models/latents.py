"""Pictures to latents, in the scale that the denoiser works in, one function for each kind of autoencoder."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline
from torch import Tensor

__all__ = ["flux2_posterior", "kl_posterior", "qwen_posterior"]


def kl_posterior(pipe: DiffusionPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the autoencoder's posterior for pixels [batch, 3, height, width] in -1..1."""
    vae = pipe.vae
    posterior = vae.encode(pixels).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
    return (posterior.mean.float() - shift) * scale, posterior.std.float() * scale


def qwen_posterior(pipe: DiffusionPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The same from an autoencoder of videos, which has a mean and a scale for each channel; a picture is one frame."""
    vae = pipe.vae
    posterior = vae.encode(pixels.unsqueeze(2)).latent_dist
    mean, std = (
        torch.tensor(values, device=pixels.device).reshape(1, -1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (posterior.mean.float().squeeze(2) - mean) / std, posterior.std.float().squeeze(2) / std


def flux2_posterior(pipe: DiffusionPipeline, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The same, with squares of 2 x 2 latents as channels, [batch, 4 channels, h / 2, w / 2], normalised by the
    autoencoder's running statistics."""
    vae = pipe.vae
    posterior = vae.encode(pixels).latent_dist
    patches = [Flux2KleinPipeline._patchify_latents(part.float()) for part in (posterior.mean, posterior.std)]
    mean = vae.bn.running_mean.float().reshape(1, -1, 1, 1)
    std = torch.sqrt(vae.bn.running_var.float() + vae.config.batch_norm_eps).reshape(1, -1, 1, 1)
    return (patches[0] - mean) / std, patches[1] / std
