"""Batches for the autoencoder: icons moved, recoloured, shaded and outlined.

The aim is an autoencoder that holds icon styles it has never seen.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _uniform(n: int, low: float, high: float, draw: torch.Generator) -> Tensor:
    return torch.rand(n, generator=draw) * (high - low) + low


def _move(x: Tensor, draw: torch.Generator) -> Tensor:
    """Random turn, size and shift on white."""
    n = len(x)
    angle, size = _uniform(n, -0.5, 0.5, draw), torch.exp(_uniform(n, -0.5, 0.25, draw))
    flip = torch.where(torch.rand(n, generator=draw) < 0.5, -1.0, 1.0)
    shift = torch.rand(n, 2, generator=draw) * 0.6 - 0.3
    theta = torch.stack(
        [
            torch.stack([flip * size * angle.cos(), -size * angle.sin(), shift[:, 0]], -1),
            torch.stack([flip * size * angle.sin(), size * angle.cos(), shift[:, 1]], -1),
        ],
        1,
    )
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return 1.0 - F.grid_sample(1.0 - x, grid, mode="bicubic", align_corners=False).clamp(0, 1)


def _recolour(x: Tensor, draw: torch.Generator) -> Tensor:
    """Swaps colour channels and bends contrast; white stays white half of the time."""
    n = len(x)
    order = torch.stack([torch.randperm(3, generator=draw) for _ in range(n)])
    x = torch.gather(x, 1, order.view(n, 3, 1, 1).expand_as(x))
    gamma = torch.exp(_uniform(n * 3, -0.5, 0.5, draw)).view(n, 3, 1, 1)
    x = x.clamp(0, 1) ** gamma
    tint = torch.where(torch.rand(n, 1, 1, 1, generator=draw) < 0.3, torch.rand(n, 3, 1, 1, generator=draw), 1.0)
    return x * tint


def shade(x: Tensor, draw: torch.Generator) -> Tensor:
    """Smooth light and shadow over the drawing, as shaded icon sets have."""
    n = len(x)
    light = torch.rand(n, 3, 4, 4, generator=draw) * 0.9 - 0.45
    light = light.mean(1, keepdim=True) * 0.7 + light * 0.3
    light = F.interpolate(light, size=x.shape[-2:], mode="bicubic", align_corners=False)
    drawn = (x.amin(1, keepdim=True) < 0.97).float()
    return (x + drawn * light).clamp(0, 1)


def augmented_batch(pictures: Tensor, size: int, draw: torch.Generator) -> Tensor:
    """Random pictures as floats in -1..1: [size, 3, H, W]; a third of them as they are."""
    index = torch.randint(len(pictures), (size,), generator=draw)
    x = pictures[index].permute(0, 3, 1, 2).float() / 255
    for change, share in ((_move, 0.45), (_recolour, 0.35), (shade, 0.3)):
        chosen = torch.rand(size, generator=draw) < share
        if chosen.any():
            x[chosen] = change(x[chosen], draw)
    return (x * 2 - 1).contiguous(memory_format=torch.channels_last)
