"""Encode pictures and captions once, before training: latents by the autoencoder, conditioning by the text encoders."""

from __future__ import annotations

import random
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageOps
from torch import Tensor

from dora_diffusion.data.buckets import Size, nearest_bucket
from dora_diffusion.data.fingerprints import machine
from dora_diffusion.data.folder import TrainingImage
from dora_diffusion.data.pictures import open_image
from dora_diffusion.data.store import Entry, Store
from dora_diffusion.errors import PromptError
from dora_diffusion.generation import check_prompt
from dora_diffusion.models.conditioning import Conditioning
from dora_diffusion.models.loading import Base

__all__ = [
    "EncodedImages",
    "Encoding",
    "drained",
    "encode_images",
    "encoding",
    "long_captions",
    "tag_orders",
    "too_long",
]

Result = TypeVar("Result")
ORDERS = 8  # of shuffled tags, each encoded once
MENTIONED = 5  # captions named in a message; the rest is counted


@dataclass(frozen=True)
class EncodedImages:
    """Training pictures of one size as the denoiser sees them.

    size is (width, height) in pixels; `posteriors` [views][pictures] are where the autoencoder's mean and std
    [channels, h, w], in the denoiser's scale, are kept; view 0 is the picture, view 1, where there is one, its mirror
    image. `captions` are the different ones of all sizes and, last, the empty prompt; `conditioning` has a row for
    each, and `caption_of` [orders, pictures] points into both: order 0 is the caption as it was written, others have
    its tags shuffled. `cropped` are the files of which less than half is left.
    """

    size: Size
    posteriors: tuple[tuple[Entry, ...], ...]
    captions: tuple[str, ...]
    conditioning: Conditioning
    caption_of: Tensor
    cropped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.caption_of.shape[1]

    @property
    def views(self) -> int:
        return len(self.posteriors)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one picture's latents: channels, h, w."""
        return self.posteriors[0][0].shapes["mean"]

    def mean(self, index: Tensor, view: int = 0) -> Tensor:
        """The posterior's mean for these pictures: [batch, channels, h, w]."""
        return torch.stack([self.posteriors[view][picture].load()["mean"] for picture in index.tolist()])

    def latents(self, index: Tensor, noise: Tensor, view: Tensor | int = 0) -> Tensor:
        """x0 for these pictures, drawn from the posterior with this noise: [batch, channels, h, w]."""
        views = torch.as_tensor(view).expand(len(index)).tolist()
        held = [self.posteriors[side][picture].load() for side, picture in zip(views, index.tolist())]
        mean, std = (torch.stack([posterior[name] for posterior in held]) for name in ("mean", "std"))
        return mean + std * noise

    def caption_rows(self, index: Tensor, dropped: Tensor | None = None, order: Tensor | int = 0) -> Tensor:
        """Where these pictures' captions stand, [batch]; where `dropped` [batch] is true, the empty prompt."""
        rows = self.caption_of[order, index]
        return rows if dropped is None else torch.where(dropped, len(self.captions) - 1, rows)


@dataclass(frozen=True)
class Encoding:
    """How far it is: so many of so many pictures or captions."""

    what: str
    done: int
    total: int


def encode_images(
    base: Base,
    images: Sequence[TrainingImage],
    buckets: Sequence[Size],
    *,
    mirrored: bool = False,
    cut_captions: bool = False,
    shuffle_tags_after: int | None = None,
    store: Store | None = None,
) -> tuple[EncodedImages, ...]:
    """Encode pictures, with their mirror images if wanted, and captions: one group for each bucket that got some.

    A picture is resized to the bucket nearest to its shape, and what stands out is cropped on both sides alike.
    `shuffle_tags_after` gives each caption more orders of its tags, of which the first so many stay in their places.
    What `store` has is not encoded again. Raises PromptError for captions that the text encoder would cut, unless
    `cut_captions` allows it.
    """
    return drained(
        encoding(
            base,
            images,
            buckets,
            store or Store(),
            mirrored=mirrored,
            cut_captions=cut_captions,
            shuffle_tags_after=shuffle_tags_after,
        )
    )


def drained(events: Generator[object, None, Result]) -> Result:
    """What a generator returns in the end."""
    while True:
        try:
            next(events)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]


def encoding(
    base: Base,
    images: Sequence[TrainingImage],
    buckets: Sequence[Size],
    store: Store,
    *,
    mirrored: bool = False,
    cut_captions: bool = False,
    shuffle_tags_after: int | None = None,
) -> Generator[Encoding, None, tuple[EncodedImages, ...]]:
    """`encode_images`, which says how far it is."""
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
    rows = yield from _captions(base, captions, store)
    conditioning = Conditioning.stack(rows).to(torch.device("cpu"), torch.float32)
    place = {caption: row for row, caption in enumerate(captions)}
    grouped: dict[Size, list[tuple[list[int], list[Entry]]]] = {size: [] for size in buckets}
    cropped: dict[Size, list[str]] = {size: [] for size in buckets}
    for done, image in enumerate(images):
        yield Encoding("pictures", done, len(images))
        with open_image(image.path) as picture:
            size = nearest_bucket(picture.size, buckets)
            if _is_mostly_cropped(picture.size, size):
                cropped[size].append(image.path.name)
            views = [
                _posterior(base, image.path, picture, size, mirror, store) for mirror in (False, True)[: 1 + mirrored]
            ]
        grouped[size].append(([place[each] for each in orders[image.caption]], views))
    yield Encoding("pictures", len(images), len(images))
    groups = []
    for size, group in grouped.items():
        if group:
            caption_of, entries = zip(*group, strict=True)
            posteriors = tuple(zip(*entries, strict=True))
            rows_of = torch.tensor(caption_of).T
            groups.append(EncodedImages(size, posteriors, captions, conditioning, rows_of, tuple(cropped[size])))
    return tuple(groups)


@torch.no_grad()
def _captions(base: Base, captions: Sequence[str], store: Store) -> Generator[Encoding, None, list[Conditioning]]:
    """The conditioning of each caption, a batch of one."""
    rows = []
    made_by = ("caption", base.family.name, machine(base.device), store.of_texts(base.pipe))
    for done, caption in enumerate(captions):
        yield Encoding("captions", done, len(captions))
        tensors = store.read(*made_by, caption)
        if tensors is None:
            encoded = base.family.encode(base.pipe, [caption]).tensors
            tensors = {name: tensor.cpu() for name, tensor in encoded.items()}
            store.keep(tensors, *made_by, caption)
        rows.append(Conditioning(tensors))
    yield Encoding("captions", len(captions), len(captions))
    return rows


def _posterior(base: Base, path: Path, picture: Image.Image, size: Size, mirror: bool, store: Store) -> Entry:
    """Mean and standard deviation of the autoencoder's posterior, float32, in the denoiser's scale.

    Each picture by itself: in a batch its last bits would depend on its neighbours.
    """
    vae = base.pipe.vae
    made_of = ("picture", f"{size}{mirror}", base.family.name, machine(vae.device), store.of_weights(vae))
    content = path.read_bytes()
    if entry := store.find(*made_of, content):
        return entry
    fitted = ImageOps.fit(picture, size, Image.Resampling.LANCZOS)
    pixels = _to_pixels(ImageOps.mirror(fitted) if mirror else fitted)[None]
    with torch.inference_mode():
        mean, std = base.family.posterior(base.pipe, pixels.to(vae.device, vae.dtype))
    return store.keep({"mean": mean[0], "std": std[0]}, *made_of, content)


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


def _to_pixels(picture: Image.Image) -> Tensor:
    """The picture as [3, height, width] in -1..1."""
    array = np.asarray(picture, dtype=np.float32) / 127.5 - 1
    return torch.from_numpy(array).permute(2, 0, 1)
