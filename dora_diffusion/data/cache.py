"""Encode pictures and captions once, before training: latents by the autoencoder, conditioning by the text encoders."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor

from dora_diffusion.data.buckets import Size, nearest_bucket
from dora_diffusion.data.folder import TrainingImage
from dora_diffusion.data.pictures import open_image
from dora_diffusion.errors import PromptError
from dora_diffusion.generation import check_prompt
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.loading import Base

__all__ = ["EncodedImages", "encode_images", "long_captions", "tag_orders", "too_long"]

BATCH = 4
ORDERS = 8  # of shuffled tags, each encoded once
MENTIONED = 5  # captions named in a message; the rest is counted


@dataclass(frozen=True)
class EncodedImages:
    """Training pictures of one size as the denoiser sees them.

    size is (width, height) in pixels; mean, std [views, pictures, channels, h, w] are the autoencoder's posterior, in
    the denoiser's scale; view 0 is the picture, view 1, where there is one, its mirror image. `captions` are the
    different ones of all sizes and, last, the empty prompt; `conditioning` has a row for each, and `caption_of`
    [orders, pictures] points into both: order 0 is the caption as it was written, others have its tags shuffled.
    `cropped` are the files of which less than half is left.
    """

    size: Size
    mean: Tensor
    std: Tensor
    captions: tuple[str, ...]
    conditioning: Conditioning
    caption_of: Tensor
    cropped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.caption_of.shape[1]

    def latents(self, index: Tensor, noise: Tensor, view: Tensor | int = 0) -> Tensor:
        """x0 for these pictures, drawn from the posterior with this noise: [batch, channels, h, w]."""
        return self.mean[view, index] + self.std[view, index] * noise

    def caption_rows(self, index: Tensor, dropped: Tensor | None = None, order: Tensor | int = 0) -> Tensor:
        """Where these pictures' captions stand, [batch]; where `dropped` [batch] is true, the empty prompt."""
        rows = self.caption_of[order, index]
        return rows if dropped is None else torch.where(dropped, len(self.captions) - 1, rows)


@torch.no_grad()
def encode_images(
    base: Base,
    images: Sequence[TrainingImage],
    buckets: Sequence[Size],
    *,
    mirrored: bool = False,
    cut_captions: bool = False,
    shuffle_tags_after: int | None = None,
) -> tuple[EncodedImages, ...]:
    """Encode pictures, with their mirror images if wanted, and captions: one group for each bucket that got some.

    A picture is resized to the bucket nearest to its shape, and what stands out is cropped on both sides alike.
    `shuffle_tags_after` gives each caption more orders of its tags, of which the first so many stay in their places.
    Raises PromptError for captions that the text encoder would cut, unless `cut_captions` allows it.
    """
    if not images:
        return ()
    orders = {image.caption: tag_orders(image.caption, shuffle_tags_after) for image in images}
    captions = (*dict.fromkeys(caption for each in zip(*orders.values()) for caption in each), "")
    if not cut_captions and (long := long_captions(base, images)):
        lines = [f"{name}: {problem}" for name, problem in list(long.items())[:MENTIONED]]
        lines += [f"and {len(long) - MENTIONED} more"] if len(long) > MENTIONED else []
        raise PromptError(
            "\n  ".join((f"{len(long)} of {len(images)} captions are too long for this base:", *lines))
            + "\nShorten them, or set cut_captions to true: then the base reads them as far as it can."
        )
    grouped: dict[Size, list[tuple[list[int], Image.Image]]] = {size: [] for size in buckets}
    cropped: dict[Size, list[str]] = {size: [] for size in buckets}
    for image in images:
        picture = open_image(image.path)
        size = nearest_bucket(picture.size, buckets)
        if _is_mostly_cropped(picture.size, size):
            cropped[size].append(image.path.name)
        fitted = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
        grouped[size].append(([captions.index(each) for each in orders[image.caption]], fitted))
    rows = [base.family.encode(base.pipe, [caption]) for caption in captions]
    conditioning = Conditioning.stack(rows).to(torch.device("cpu"), torch.float32)
    groups = []
    for size, group in grouped.items():
        if not group:
            continue
        caption_of, pictures = zip(*group, strict=True)
        views = [pictures, [ImageOps.mirror(picture) for picture in pictures]] if mirrored else [pictures]
        posteriors = [_latents_of(base, view) for view in views]
        mean, std = (torch.stack(parts) for parts in zip(*posteriors, strict=True))
        rows_of = torch.tensor(caption_of).T
        groups.append(EncodedImages(size, mean, std, captions, conditioning, rows_of, tuple(cropped[size])))
    return tuple(groups)


def _is_mostly_cropped(picture: Size, bucket: Size) -> bool:
    """Whether more than half of the picture stands out of the bucket, as of very wide ones."""
    ratio = picture[0] / picture[1] * bucket[1] / bucket[0]
    return min(ratio, 1 / ratio) < 0.5


def tag_orders(caption: str, after: int | None) -> list[str]:
    """The caption and, unless `after` is None, more orders of its tags: what commas part, after the first `after`."""
    tags = [tag.strip() for tag in caption.split(",")]
    if after is None:
        return [caption]
    kept, rest = tags[:after], tags[after:]
    dice = random.Random(caption)
    return [caption, *(", ".join([*kept, *dice.sample(rest, len(rest))]) for _ in range(ORDERS - 1))]


def long_captions(base: Base, images: Sequence[TrainingImage]) -> dict[str, str]:
    """The pictures whose captions the base would cut, by their files' names, and what would be lost."""
    problems = too_long(base.pipe, [image.caption for image in images])
    return {image.path.name: problems[image.caption] for image in images if image.caption in problems}


def too_long(pipe: DiffusionPipeline, captions: Iterable[str]) -> dict[str, str]:
    """Those of the captions that the pipeline's text encoders would cut, and what would be lost.

    A pipeline of tokenizers alone is enough (models/reading.py).
    """
    problems: dict[str, str] = {}
    for caption in dict.fromkeys(captions):
        try:
            check_prompt(pipe, caption)
        except PromptError as error:
            problems[caption] = str(error)
    return problems


@torch.inference_mode()
def _latents_of(base: Base, pictures: Sequence[Image.Image]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the autoencoder's posterior, float32, in the denoiser's scale, on the CPU."""
    vae = base.pipe.vae
    means, stds = [], []
    for start in range(0, len(pictures), BATCH):
        pixels = torch.stack([_to_pixels(picture) for picture in pictures[start : start + BATCH]])
        mean, std = base.family.posterior(base.pipe, pixels.to(vae.device, vae.dtype))
        means.append(mean.cpu())
        stds.append(std.cpu())
    return torch.cat(means), torch.cat(stds)


def _to_pixels(picture: Image.Image) -> Tensor:
    """The picture as [3, height, width] in -1..1."""
    array = np.asarray(picture, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1)
