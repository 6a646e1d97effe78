"""Every icon in several renditions, so that the base learns style and shape as two things.

A base that has seen each thing in four pictures only knows those pictures: an adapter that changes their style takes
their shape apart. Here a thing comes outlined, flat, gray, pale and shaded too, each said in the caption, and moved and
mirrored, which is not said.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image

from .augment import shade
from .icons import Icon

OUTLINE = 1.6  # pixels
FLAT_COLOURS = 6
SEED = 5

Pixels = npt.NDArray[np.uint8]  # [pictures, height, width, 3]
Change = Callable[[Pixels], Pixels]


def _flat(pixels: Pixels) -> Pixels:
    pictures = [Image.fromarray(each).quantize(FLAT_COLOURS, dither=Image.Dither.NONE) for each in pixels]
    return np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])


def _gray(pixels: Pixels) -> Pixels:
    light = pixels.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)
    return np.repeat(light.round().astype(np.uint8)[..., None], 3, -1)


def _pale(pixels: Pixels) -> Pixels:
    return 255 - (255 - pixels) // 2


def _shaded(pixels: Pixels) -> Pixels:
    draw = torch.Generator().manual_seed(SEED)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (shade(x, draw) * 255).round().byte().permute(0, 2, 3, 1).numpy()


@dataclass(frozen=True)
class Rendition:
    """A way to draw every icon: the word for it, its share of the batches, and how the pixels change."""

    word: str
    share: float
    outline: float = 0.0
    change: Change | None = None


RENDITIONS = (
    Rendition("", 0.40),
    Rendition("outlined", 0.17, outline=OUTLINE),
    Rendition("outlined flat", 0.13, outline=OUTLINE, change=_flat),
    Rendition("flat", 0.10, change=_flat),
    Rendition("gray", 0.06, change=_gray),
    Rendition("pale", 0.06, change=_pale),
    Rendition("shaded", 0.08, change=_shaded),
)
# As it is, and two that are moved, one of them mirrored: shares of a rendition.
PLACES = (0.6, 0.2, 0.2)


def moved(pixels: Pixels, mirrored: bool, seed: int) -> Pixels:
    """A little larger or smaller and to the side, on white."""
    draw = torch.Generator().manual_seed(seed)
    n = len(pixels)
    size = torch.exp(torch.rand(n, generator=draw) * 0.3 - 0.08)  # above 1 the picture is smaller
    shift = torch.rand(n, 2, generator=draw) * 0.16 - 0.08
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = size * (-1 if mirrored else 1), size, shift
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    y = 1.0 - F.grid_sample(1.0 - x, grid, mode="bicubic", align_corners=False).clamp(0, 1)
    return (y * 255).round().byte().permute(0, 2, 3, 1).numpy()


def in_all_renditions(icons: Sequence[Icon]) -> list[Icon]:
    """The icons with the words and weights of all renditions and places, in `render_renditions`'s order."""
    return [
        replace(icon, style=f"{each.word} {icon.style}".strip(), weight=icon.weight * each.share * share)
        for each in RENDITIONS
        for share in PLACES
        for icon in icons
    ]
