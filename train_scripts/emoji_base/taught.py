"""Whether the base can be taught: what style adapters draw, laid against the pictures of all styles.

Style is measured apart from shape: by the correlations between channels of the autoencoder's encoder (Gram matrices,
Gatys et al. 2016), in the directions that tell the styles apart (linear discriminant analysis over things that are not
asked for). A picture belongs to the style whose mean is nearest there. The same is asked of real pictures, so that the
share has something to be compared with. Known pictures pass through the autoencoder first, as all that is drawn does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from torch import Tensor

from dora_diffusion.formats.files import load_adapter

from .autoencoder import decode, encode
from .common import COMMON_THINGS
from .icons import BASE_SETS, load_sets, select_icons
from .metrics import LatentIndex, as_tensor, held_out_icons
from .prompts import GUIDANCE, STEPS
from .rendering import render_all

STYLE = "openmoji"
THINGS = 48
SEED = 1
AXES, SHRINKAGE = 200, 0.05


@dataclass(frozen=True)
class Taught:
    """Shares of 1: pictures that lie nearer to the taught style's pictures than to those of any style of the base.

    `by_style` goes by Gram matrices; `by_shape` compares the latents with the same thing as each style draws it.
    `right_name` is the share of pictures whose nearest picture of all, in any style, bears the name that was asked for.
    """

    by_style: float
    by_shape: float
    right_name: float


class StyleSpace:
    """Known pictures by their Gram matrices, along the directions in which the styles differ."""

    def __init__(self, vae: AutoencoderKL, styles: Sequence[str], pixels: Tensor) -> None:
        self._vae = vae
        self._styles = sorted(set(styles))
        grams = self._grams(decode(vae, encode(vae, pixels)))
        self._mean, self._deviation = grams.mean(0), grams.std(0) + 1e-6
        z = (grams - self._mean) / self._deviation
        self._axes = torch.linalg.svd(z, full_matrices=False).Vh[:AXES].T
        z = z @ self._axes
        label = torch.tensor([self._styles.index(style) for style in styles])
        means = torch.stack([z[label == k].mean(0) for k in range(len(self._styles))])
        within = torch.cov((z - means[label]).T)
        within += SHRINKAGE * within.diagonal().mean() * torch.eye(len(within))
        self._whiten = torch.linalg.inv(torch.linalg.cholesky(within)).T
        self._means = means @ self._whiten

    def styles_of(self, pixels: Tensor) -> list[str]:
        """The nearest style of each uint8 picture [N, 64, 64, 3]."""
        z = (self._grams(pixels) - self._mean) / self._deviation @ self._axes @ self._whiten
        return [self._styles[k] for k in torch.cdist(z, self._means).argmin(1).tolist()]

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
    latents = LatentIndex(pipeline.vae, known, pixels)
    others = [k for k, icon in enumerate(known) if icon.name not in COMMON_THINGS]
    space = StyleSpace(pipeline.vae, [known[k].style for k in others], pixels[others])
    shown = {path.stem.replace("-", " ") for path in samples.rglob("*.png")}
    drawable = {icon.name for icon in known if icon.style == STYLE}
    things = [name for name in sorted(COMMON_THINGS) if name in drawable - shown][:THINGS]

    def share(pictures: Sequence[Image.Image]) -> Taught:
        by_style = space.styles_of(as_tensor(pictures))
        by_shape = latents.nearest_styles(pictures, things)
        right = [match.name == name for match, name in zip(latents.nearest(pictures), things, strict=True)]
        return Taught(by_style.count(STYLE) / len(things), by_shape.count(STYLE) / len(things), sum(right) / len(right))

    def draw() -> list[Image.Image]:
        seeds = [torch.Generator().manual_seed(SEED) for _ in things]
        prompts = [f"{name}, {STYLE} style" for name in things]
        return pipeline(prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=seeds).images

    found = {"base": share(draw())}
    for label, path in adapters.items():
        adapter = load_adapter(pipeline, path)
        found[label] = share(draw())
        adapter.eject()
    for label, taught in (("real pictures of the style", True), ("real pictures of the base's styles", False)):
        some = [k for k, icon in enumerate(known) if icon.name in things and (icon.style == STYLE) == taught]
        styles = space.styles_of(decode(pipeline.vae, encode(pipeline.vae, pixels[some])))
        # By shape a real picture is its own nearest: nothing to measure.
        found[label] = Taught(styles.count(STYLE) / len(some), float(taught), 1.0)
    return found
