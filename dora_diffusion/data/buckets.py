"""Aspect-ratio buckets: pictures of like shape are trained together, so that none is cut to a square.

After NovelAI's "Aspect Ratio Bucketing" (2022), as trainers for Stable Diffusion do it: every bucket has about the
area of the square, and a picture goes into the one whose shape is nearest to its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["Size", "bucket_sizes", "nearest_bucket"]

Size = tuple[int, int]  # width and height in pixels

STEP = 64  # pixels between the sides of neighbouring buckets, as is usual; an eighth of a smaller square's side
WIDEST = 2.5  # times as wide as high; what is wider, or higher, is cropped to this


def bucket_sizes(resolution: int, multiple: int, largest: int | None = None) -> list[Size]:
    """The sizes of no more pixels than the square of side `resolution`, which is among them.

    All sides are multiples of `multiple`, which must divide `resolution`, and none is longer than `largest`.
    """
    step = max(multiple, min(STEP, resolution // 8) // multiple * multiple)
    sizes = {(resolution, resolution)}
    for short in range(resolution // step * step, 0, -step):
        long = min(resolution**2 // short, largest or resolution**2) // step * step
        if short < long <= WIDEST * short:
            sizes |= {(long, short), (short, long)}
    return sorted(sizes)


def nearest_bucket(size: Size, buckets: Sequence[Size]) -> Size:
    """The bucket whose ratio of width to height is nearest to the picture's; of equal ones the largest."""
    width, height = size

    def distance(bucket: Size) -> tuple[float, int]:
        return abs(math.log(bucket[0] / bucket[1] * height / width)), -bucket[0] * bucket[1]

    return min(buckets, key=distance)
