"""Whether the base can be taught: what style adapters draw, laid against the pictures of all styles.

Style is measured apart from shape: by the correlations between channels of the autoencoder's encoder (Gram matrices,
Gatys et al. 2016), and never against pictures of the same thing. A picture belongs to the style whose pictures are
nearest on average. The same is asked of real pictures, so that the share has something to be compared with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from torch import Tensor

from dora_diffusion.formats.files import load_adapter

from .common import COMMON_THINGS
from .icons import BASE_SETS, Icon, load_sets, select_icons
from .metrics import LatentIndex, as_tensor, held_out_icons
from .prompts import GUIDANCE, STEPS
from .rendering import render_all

STYLE = "openmoji"
THINGS, REAL = 48, 200
SEED = 1


@dataclass(frozen=True)
class Taught:
    """Shares of 1: pictures that lie nearer to the taught style's pictures than to those of any style of the base.

    `by_style` compares Gram matrices with all other things of each style; `by_shape` the latents with the same thing as
    each style draws it.
    """

    by_style: float
    by_shape: float


class StyleSpace:
    """Known pictures by their Gram matrices."""

    def __init__(self, vae: AutoencoderKL, icons: Sequence[Icon], pixels: Tensor) -> None:
        self._vae = vae
        self._names = np.array([icon.name for icon in icons])
        self._styles = np.array([icon.style for icon in icons])
        grams = self._grams(pixels)
        self._mean, self._deviation = grams.mean(0), grams.std(0) + 1e-6
        self._known = (grams - self._mean) / self._deviation

    def styles_of(self, pixels: Tensor, names: Sequence[str]) -> list[str]:
        """For uint8 pictures [N, 64, 64, 3] of the things `names`, the style that is nearest on average."""
        drawn = (self._grams(pixels) - self._mean) / self._deviation
        apart = torch.cdist(drawn, self._known).numpy()
        styles = sorted(set(self._styles.tolist()))
        return [
            min(styles, key=lambda s: row[(self._styles == s) & (self._names != name)].mean())
            for row, name in zip(apart, names, strict=True)
        ]

    @torch.no_grad()
    def _grams(self, pixels: Tensor) -> Tensor:
        """Normalised Gram matrices of the encoder's levels, one row a picture."""
        encoder = self._vae.encoder
        levels: list[Tensor] = []
        hooks = [
            part.register_forward_hook(lambda _, __, output: levels.append(output.flatten(2)))
            for part in (encoder.conv_in, *encoder.down_blocks)
        ]
        rows = []
        for batch in pixels.split(64):
            levels.clear()
            encoder(batch.permute(0, 3, 1, 2).float() / 127.5 - 1)
            products = [torch.einsum("nct,ndt->ncd", f, f).flatten(1) for f in levels]
            rows.append(torch.cat([g / g.norm(dim=1, keepdim=True) for g in products], 1))
        for hook in hooks:
            hook.remove()
        return torch.cat(rows)


def measure_taught(
    pipeline: DiffusionPipeline, icons_root: Path, samples: Path, adapters: dict[str, Path]
) -> dict[str, Taught]:
    """The base, each adapter by its name, and real pictures of both sides, on things that are not in `samples`."""
    known = select_icons(load_sets(icons_root, BASE_SETS))
    known += [icon for icon in held_out_icons(icons_root) if icon.style == STYLE]
    pixels = torch.from_numpy(render_all([icon.svg for icon in known]))
    space, latents = StyleSpace(pipeline.vae, known, pixels), LatentIndex(pipeline.vae, known, pixels)
    shown = {path.stem.replace("-", " ") for path in samples.rglob("*.png")}
    drawable = {icon.name for icon in known if icon.style == STYLE}
    things = [name for name in sorted(COMMON_THINGS) if name in drawable - shown][:THINGS]

    def share(pictures: Sequence[Image.Image]) -> Taught:
        by_style = space.styles_of(as_tensor(pictures), things)
        by_shape = latents.nearest_styles(pictures, things)
        return Taught(by_style.count(STYLE) / len(things), by_shape.count(STYLE) / len(things))

    def draw() -> list[Image.Image]:
        seeds = [torch.Generator().manual_seed(SEED) for _ in things]
        prompts = [f"{name}, {STYLE} style" for name in things]
        return pipeline(prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeds).images

    found = {"base": share(draw())}
    for label, path in adapters.items():
        adapter = load_adapter(pipeline, path)
        found[label] = share(draw())
        adapter.eject()
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).tolist()
    for label, taught in (("real pictures of the style", True), ("real pictures of the base's styles", False)):
        some = [k for k in order if (known[k].style == STYLE) == taught][:REAL]
        styles = space.styles_of(pixels[some], [known[k].name for k in some])
        # By shape a real picture is its own nearest: nothing to measure.
        found[label] = Taught(styles.count(STYLE) / len(some), float(taught))
    return found
