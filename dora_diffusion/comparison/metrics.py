"""How far two pictures are apart: as numbers, and as a picture on a fixed colour scale."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

__all__ = ["SCALE_COLOURS", "SCALE_TOP", "Difference", "difference_of", "difference_picture", "mean_difference"]

SCALE_TOP = 128  # a pixel that differs by this much or more has the last colour; fixed, so that pictures compare
NOTICED = 8  # of 255: what a person may see side by side
# Dark to light through hues that people with any colour vision tell apart, evenly spaced over the scale.
SCALE_COLOURS = ("#000004", "#3b0f70", "#8c2981", "#de4968", "#fe9f6d", "#fcfdbf")


@dataclass(frozen=True)
class Difference:
    """Over the pixels, each the mean of its channels' absolute differences, 0 to 255.

    `mean` and `most` are of these; `changed` is the share, 0 to 1, of pixels that differ visibly.
    """

    mean: float
    most: float
    changed: float


def mean_difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of two pictures of one size, 0 to 255."""
    return float(_apart(a, b).mean())


def difference_of(a: Image.Image, b: Image.Image) -> Difference:
    apart = _apart(a, b)
    return Difference(float(apart.mean()), float(apart.max()), float((apart > NOTICED).mean()))


def difference_picture(a: Image.Image, b: Image.Image) -> Image.Image:
    """Each pixel's difference as a colour of SCALE_COLOURS, from 0 to SCALE_TOP."""
    place = np.clip(_apart(a, b) / SCALE_TOP, 0, 1) * (len(SCALE_COLOURS) - 1)
    colours = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in SCALE_COLOURS], dtype=np.float32)
    stops = np.arange(len(SCALE_COLOURS))
    channels = [np.interp(place, stops, colours[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8), "RGB")


def _apart(a: Image.Image, b: Image.Image) -> np.ndarray:
    first, second = (np.asarray(image.convert("RGB"), dtype=np.float32) for image in (a, b))  # [height, width, 3]
    return np.abs(first - second).mean(axis=-1)
