"""What the evaluation measures, each as one small function or class."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch import Tensor

from .autoencoder import decode, encode
from .icons import (
    BASE_SETS,
    HELD_OUT_SETS,
    IMAGE_SIZE,
    Icon,
    NameIndex,
    load_sets,
    select_icons,
    spoken,
)
from .rendering import render_all


def psnr(y: Tensor, x: Tensor) -> float:
    """Peak signal to noise ratio in dB over all uint8 pictures together."""
    error = (y.float() - x.float()).square().mean()
    return float(10 * torch.log10(255.0**2 / error))


def _hue_and_saturation(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in degrees, saturation and value of uint8 RGB [..., 3]."""
    r, g, b = (x.float() / 255).unbind(-1)
    alpha, beta = r - 0.5 * (g + b), (3**0.5 / 2) * (g - b)
    value, low = x.amax(-1).float() / 255, x.amin(-1).float() / 255
    return torch.rad2deg(torch.atan2(beta, alpha)), (value - low) / value.clamp(min=1e-6), value


def hue_error(y: Tensor, x: Tensor) -> float:
    """Mean hue error in degrees over the saturated pixels of `x` (HSV S > 0.5, V > 0.3)."""
    hue_x, saturation, value = _hue_and_saturation(x)
    hue_y, _, _ = _hue_and_saturation(y)
    clear = (saturation > 0.5) & (value > 0.3)
    apart = (hue_y - hue_x).abs() % 360
    return float(torch.minimum(apart, 360 - apart)[clear].mean())


@dataclass(frozen=True)
class Reconstruction:
    """How well the autoencoder holds one icon set."""

    psnr: float
    hue_error: float


def reconstruction_of(vae: AutoencoderKL, pictures: Tensor) -> Reconstruction:
    """Measures the round trip of uint8 pictures [N, 64, 64, 3]."""
    back = decode(vae, encode(vae, pictures))
    return Reconstruction(round(psnr(back, pictures), 2), round(hue_error(back, pictures), 2))


@dataclass(frozen=True)
class Match:
    """The known picture nearest to a drawn one."""

    name: str
    style: str
    distance: float


def held_out_icons(icons_root: Path) -> list[Icon]:
    """The things of the base's training as the held-out sets draw them."""
    sets = load_sets(icons_root, (*BASE_SETS, *HELD_OUT_SETS))
    wanted = {icon.name for icon in select_icons(sets[: len(BASE_SETS)])}
    found = []
    for chief, group in NameIndex(sets).groups().items():
        name = next((spoken(n) for n in group if spoken(n) in wanted), None)
        for icon_set in sets[len(BASE_SETS) :]:
            own = next((n for n in [chief, *group] if n in icon_set.names()), None)
            if name and own:
                found.append(Icon(name, (), icon_set.info.style, icon_set.svg(own)))
    return found


def as_tensor(pictures: Sequence[Image.Image]) -> Tensor:
    """Pictures as uint8 [N, 64, 64, 3]."""
    size = (IMAGE_SIZE, IMAGE_SIZE)
    arrays = [np.asarray(p.convert("RGB").resize(size)) for p in pictures]
    return torch.from_numpy(np.stack(arrays))


class LatentIndex:
    """Known pictures in the autoencoder's latent space, to ask what a new one is nearest to."""

    def __init__(self, vae: AutoencoderKL, icons: Sequence[Icon], pixels: Tensor) -> None:
        self._vae, self._icons = vae, list(icons)
        self._known = encode(vae, pixels).flatten(1)  # [N, 4 * 16 * 16]

    @classmethod
    def from_icons(cls, vae: AutoencoderKL, icons_root: Path, with_held_out: bool = False) -> LatentIndex:
        """The base's training pictures, and the held-out styles' too where asked."""
        icons = select_icons(load_sets(icons_root, BASE_SETS))
        if with_held_out:
            icons += held_out_icons(icons_root)
        pixels = torch.from_numpy(render_all([icon.svg for icon in icons]))
        return cls(vae, icons, pixels)

    def distances(self, pictures: Sequence[Image.Image]) -> Tensor:
        """Root mean square latent distances: [pictures, known]."""
        drawn = encode(self._vae, as_tensor(pictures)).flatten(1)
        return torch.cdist(drawn, self._known) / self._known.shape[1] ** 0.5

    def nearest(self, pictures: Sequence[Image.Image]) -> list[Match]:
        """For each picture the nearest known one."""
        apart, index = self.distances(pictures).min(1)
        return [
            Match(self._icons[k].name, self._icons[k].style, float(d))
            for k, d in zip(index.tolist(), apart, strict=True)
        ]

    def nearest_styles(self, pictures: Sequence[Image.Image], names: Sequence[str] | None = None) -> list[str]:
        """For each picture the style whose pictures lie nearest.

        With `names`, picture k is only held against pictures of the thing `names[k]`, so that
        the answer tells of style alone.
        """
        by_name: dict[str, list[int]] = defaultdict(list)
        for k, icon in enumerate(self._icons):
            by_name[icon.name].append(k)
        styles = []
        for k, row in enumerate(self.distances(pictures)):
            pool = by_name.get(names[k], []) if names else []
            pool = pool or list(range(len(self._icons)))
            styles.append(self._icons[pool[int(row[pool].argmin())]].style)
        return styles
