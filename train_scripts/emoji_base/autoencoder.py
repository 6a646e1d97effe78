"""The autoencoder: 64 x 64 pixels to 16 x 16 latents of four equally strong channels."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from .augment import augmented_batch
from .icons import IMAGE_SIZE
from .speed import mixed_precision, quicken
from .state import MovingAverage, Training, learning_rate_factor

LATENT_CHANNELS = 4
# The posterior's fixed spread, beside a latent spread of 1: the decoder learns to bear the
# small errors that a denoiser leaves.
POSTERIOR_STD = 0.05


@dataclass(frozen=True)
class AutoencoderPlan:
    """How long and how hard to train."""

    steps: int = 6400
    batch: int = 16
    learning_rate: float = 2e-3
    decay_share: float = 0.44


def new_autoencoder() -> AutoencoderKL:
    """The stock class, small: about 1.7 million parameters, 4 x down."""
    levels = (32, 64, 96)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(levels),
        up_block_types=("UpDecoderBlock2D",) * len(levels),
        block_out_channels=levels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=16,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )


def _luma_chroma(x: Tensor) -> Tensor:
    """RGB to luma and two colour differences: [N, 3, H, W]."""
    r, g, b = x.unbind(1)
    luma = 0.299 * r + 0.587 * g + 0.114 * b
    return torch.stack([luma, 0.564 * (b - luma), 0.713 * (r - luma)], 1)


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """Absolute error with colour weighed up, squared error, and the error of the edges."""
    error = _luma_chroma(y - x)
    weight = error.new_tensor([1.0, 3.5, 3.5]).view(1, 3, 1, 1)
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return (weight * error).abs().mean() + 5.0 * F.mse_loss(y, x) + 0.5 * edges


def _standardised(mean: Tensor) -> Tensor:
    """Each channel to mean 0 and variance 1 over the batch, so that all carry their share."""
    centred = mean - mean.mean((0, 2, 3), keepdim=True)
    return centred * torch.rsqrt(centred.square().mean((0, 2, 3), keepdim=True) + 1e-5)


def new_training(plan: AutoencoderPlan, device: torch.device, seed: int) -> Training:
    """A fresh autoencoder with its optimizer, average and random numbers."""
    torch.manual_seed(seed)
    vae = quicken(new_autoencoder(), device)
    groups = [{"params": list(vae.parameters()), "base_lr": plan.learning_rate}]
    optimizer = torch.optim.AdamW(groups, lr=plan.learning_rate, betas=(0.9, 0.99),
                                  weight_decay=1e-3, fused=True)  # fmt: skip
    draw = torch.Generator().manual_seed(seed)
    return Training(vae, optimizer, MovingAverage(vae, 0.995), draw)


def train(run: Training, plan: AutoencoderPlan, pictures: Tensor, device: torch.device) -> Iterator[float]:
    """Yields each step's loss, from the step the run stands at to the plan's end."""
    vae = run.module
    assert isinstance(vae, AutoencoderKL)
    vae.train()
    decay_steps = math.ceil(plan.steps * plan.decay_share)
    while run.step < plan.steps:
        run.set_learning_rate(learning_rate_factor(run.step, plan.steps, 100, decay_steps))
        x = augmented_batch(pictures, plan.batch, run.generator)
        with mixed_precision(device):
            moments = vae.quant_conv(vae.encoder(x.to(device)))
            z = _standardised(moments[:, :LATENT_CHANNELS].float())
            noise = torch.randn(z.shape, generator=run.generator).to(device)
            y = vae.decode(z + POSTERIOR_STD * noise).sample
        loss = reconstruction_loss(y.float(), x.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.average.update()
        run.step += 1
        yield loss.item()


def polish(vae: AutoencoderKL, pictures: Tensor, steps: int, device: torch.device, seed: int) -> Iterator[float]:
    """Trains the decoder alone on finished latents, which stay as they are; yields the loss."""
    vae.requires_grad_(False)
    parts = [vae.decoder, vae.post_quant_conv]
    parameters = [p for part in parts for p in part.requires_grad_(True).parameters()]
    quicken(vae, device)
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), fused=True)
    average = MovingAverage(vae, 0.99)
    draw = torch.Generator().manual_seed(seed)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-3 * learning_rate_factor(step, steps, 20, steps)
        x = augmented_batch(pictures, 16, draw).to(device)
        with mixed_precision(device):
            z = vae.encode(x).latent_dist.mean.float()
            noise = torch.randn(z.shape, generator=draw).to(device)
            y = vae.decode(z + POSTERIOR_STD * noise).sample
        loss = reconstruction_loss(y.float(), x)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update()
        yield loss.item()
    average.swap()


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: Tensor, batch: int = 64) -> Tensor:
    """The latents' means of uint8 pictures [N, H, W, 3]: float32 [N, 4, H / 4, W / 4]."""
    parts = []
    for part in pictures.split(batch):
        x = (part.permute(0, 3, 1, 2).float() / 127.5 - 1).to(vae.device)
        parts.append(vae.encode(x).latent_dist.mean.float().cpu())
    return torch.cat(parts)


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor, batch: int = 64) -> Tensor:
    """Back to uint8 pictures [N, H, W, 3]."""
    parts = [vae.decode(z.to(vae.device)).sample.float().cpu() for z in latents.split(batch)]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)


@torch.no_grad()
def fold_standardisation(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Moves the batch statistics of training into the 1 x 1 convolutions, once and exactly.

    Afterwards each latent channel has mean 0 and variance 1 over `pictures` (so the stock
    pipeline's single scaling factor, 1.0, fits all four) and the posterior's spread is fixed.
    """
    z = encode(vae, pictures)
    mean, std = z.mean((0, 2, 3)).to(vae.device), z.std((0, 2, 3)).to(vae.device)
    conv = vae.quant_conv
    conv.weight[:LATENT_CHANNELS] /= std.view(-1, 1, 1, 1)
    conv.bias[:LATENT_CHANNELS] = (conv.bias[:LATENT_CHANNELS] - mean) / std
    conv.weight[LATENT_CHANNELS:] = 0.0
    conv.bias[LATENT_CHANNELS:] = 2 * math.log(POSTERIOR_STD)
