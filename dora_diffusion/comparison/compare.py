"""Side by side: the same prompts and seeds through the base and through each adapter."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dora_diffusion.errors import ConfigError
from dora_diffusion.formats.files import AdapterFile, attach, read_adapter_file
from dora_diffusion.generation import GenerationRequest, OnStep, check_prompt, generate
from dora_diffusion.injection import Adapter
from dora_diffusion.models.loading import Base

__all__ = ["BASE", "Cell", "Column", "CompareRequest", "columns_of", "compare", "mean_difference"]


@dataclass(frozen=True)
class Column:
    """One column: an adapter file at a strength, or with no file the base."""

    label: str
    path: Path | None = None
    strength: float = 1.0


BASE = Column("base")


def columns_of(paths: Sequence[Path], strengths: Sequence[float] | None = None) -> tuple[Column, ...]:
    """A column for each adapter file, labelled by its kind, and by its name where the kind says too little."""
    strengths = strengths or [1.0] * len(paths)
    if len(strengths) != len(paths):
        raise ConfigError(f"{len(paths)} adapters and {len(strengths)} strengths: give one for each, or none.")
    kinds = [read_adapter_file(path).config.kind_label for path in paths]
    labels = [
        kind if kinds.count(kind) == 1 else f"{kind} {path.parent.name}/{path.stem}"
        for kind, path in zip(kinds, paths, strict=True)
    ]
    return tuple(Column(*column) for column in zip(labels, paths, strengths, strict=True))


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

    def __post_init__(self) -> None:
        if not self.prompts or not self.seeds:
            raise ConfigError("a comparison needs at least one prompt and one seed.")

    @property
    def columns(self) -> tuple[Column, ...]:
        return (BASE, *self.adapters)

    @property
    def rows(self) -> tuple[tuple[str, int], ...]:
        return tuple((prompt, seed) for prompt in self.prompts for seed in self.seeds)

    def picture(self, prompt: str, seed: int) -> GenerationRequest:
        return GenerationRequest(
            prompt=prompt,
            seed=seed,
            negative_prompt=self.negative_prompt,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            width=self.width,
            height=self.height,
        )


@dataclass(frozen=True)
class Cell:
    """One picture of the comparison.

    `difference` is the mean absolute difference to the base's picture over all pixels and channels, 0 to 255.
    `caption` says what is needed to read the picture: adapter, rank, strength, seed.
    """

    row: int
    column: int
    prompt: str
    seed: int
    image: Image.Image
    caption: str
    difference: float
    seconds: float


def compare(base: Base, request: CompareRequest, on_step: OnStep | None = None) -> Iterator[Cell]:
    """Draw the comparison, a cell at a time, row by row and the base first.

    Adapters are loaded once, at strength 0, and only their strengths change between cells. They are taken out again at
    the end, whatever happens. Raises the errors of reading and loading before the first cell.
    """
    for prompt in request.prompts:
        check_prompt(base.pipe, prompt)
    files = [read_adapter_file(column.path) if column.path else None for column in request.columns]
    with ExitStack() as undo:
        adapters: list[Adapter | None] = []
        for i, file in enumerate(files):
            adapter = None if file is None else attach(base.denoiser, file, strength=0.0, name=f"column_{i}")
            if adapter is not None:
                undo.callback(adapter.eject)
            adapters.append(adapter)
        for row, (prompt, seed) in enumerate(request.rows):
            reference: Image.Image | None = None
            for i, column in enumerate(request.columns):
                began = time.monotonic()
                adapter = adapters[i]
                if adapter is not None:
                    adapter.strength = column.strength
                try:
                    image = generate(base, request.picture(prompt, seed), on_step)
                finally:
                    if adapter is not None:
                        adapter.strength = 0.0
                reference = reference or image
                yield Cell(
                    row=row,
                    column=i,
                    prompt=prompt,
                    seed=seed,
                    image=image,
                    caption=_caption(column, files[i], seed),
                    difference=mean_difference(image, reference),
                    seconds=time.monotonic() - began,
                )


def _caption(column: Column, file: AdapterFile | None, seed: int) -> str:
    if file is None:
        return f"{column.label} · seed {seed}"
    return f"{column.label} · rank {file.config.rank} · strength {column.strength:g} · seed {seed}"


def mean_difference(a: Image.Image, b: Image.Image) -> float:
    """Mean absolute difference of two pictures of one size, 0 to 255."""
    first, second = (np.asarray(image.convert("RGB"), dtype=np.float32) for image in (a, b))
    return float(np.abs(first - second).mean())
