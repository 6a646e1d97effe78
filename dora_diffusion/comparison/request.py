"""What a comparison is asked for and what it gives, apart from the drawing: nothing here needs torch or a pipeline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from dora_diffusion.errors import ConfigError

if TYPE_CHECKING:
    from dora_diffusion.generation import GenerationRequest

__all__ = [
    "BASE",
    "Cell",
    "Column",
    "CompareRequest",
    "one_for_each",
    "parse_size",
    "written_number",
    "written_size",
]


def one_for_each(adapters: Sequence[Path], strengths: Sequence[float] | None) -> list[float]:
    """The adapters' strengths, 1 where none are given. Raises ConfigError."""
    strengths = list(strengths or [1.0] * len(adapters))
    if len(strengths) != len(adapters):
        raise ConfigError(f"{len(adapters)} adapters and {len(strengths)} strengths: give one for each, or none.")
    return strengths


@dataclass(frozen=True)
class Column:
    """One column: an adapter file at a strength, or with no file the base."""

    label: str
    path: Path | None = None
    strength: float = 1.0


BASE = Column("base")


@dataclass(frozen=True)
class CompareRequest:
    """What to draw: every prompt with every seed in every column. The base's column comes first, always."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    adapters: tuple[Column, ...]
    negative_prompt: str = ""
    num_inference_steps: int = 25
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    partial: bool = False  # load what fits of each file, and say so, where it does not fit whole

    def __post_init__(self) -> None:
        if not self.prompts or not self.seeds:
            raise ConfigError("a comparison needs at least one prompt and one seed.")

    @property
    def columns(self) -> tuple[Column, ...]:
        return (BASE, *self.adapters)

    @property
    def headings(self) -> tuple[str, ...]:
        """The columns' labels, with the strength where another column has the same label."""
        labels = [column.label for column in self.columns]
        return tuple(
            f"{column.label} {written_number(column.strength)}" if labels.count(column.label) > 1 else column.label
            for column in self.columns
        )

    @property
    def rows(self) -> tuple[tuple[str, int], ...]:
        return tuple((prompt, seed) for prompt in self.prompts for seed in self.seeds)

    @property
    def pictures(self) -> int:
        return len(self.rows) * len(self.columns)

    def picture(self, prompt: str, seed: int) -> GenerationRequest:
        from dora_diffusion.generation import GenerationRequest

        return GenerationRequest(
            prompt=prompt,
            seed=seed,
            negative_prompt=self.negative_prompt,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            width=self.width,
            height=self.height,
        )


def parse_size(text: str) -> tuple[int | None, int | None]:
    """ "832x1216" as width and height; two None, for the base's own, when nothing is written. Raises ConfigError."""
    if not text.strip():
        return None, None
    sides = re.fullmatch(r"\s*(\d{1,5})\s*[x×]\s*(\d{1,5})\s*", text, re.IGNORECASE)
    if sides is None:
        raise ConfigError(f"size is {text[:40]!r}; give width x height in pixels, such as 832x1216.")
    return int(sides[1]), int(sides[2])


def written_size(width: int | None, height: int | None) -> str:
    """What `parse_size` reads."""
    return "" if width is None or height is None else f"{width}x{height}"


def written_number(value: float) -> str:
    """The number with all its digits, since two that differ must not look alike: 0.5, 1, 0.1234567."""
    short = f"{value:g}"
    return short if float(short) == value else repr(float(value))


@dataclass(frozen=True)
class Cell:
    """One picture of the comparison.

    `difference` is the mean absolute difference to the base's picture over all pixels and channels, 0 to 255.
    `caption` says what is needed to read the picture: adapter, rank, strength, seed. `note` says what is odd about the
    column's adapter; with `fits` false the adapter could not be put into this base, and the picture is the base's.
    """

    row: int
    column: int
    prompt: str
    seed: int
    image: Image.Image
    caption: str
    difference: float
    seconds: float
    note: str = ""
    fits: bool = True
    cached: bool = False
