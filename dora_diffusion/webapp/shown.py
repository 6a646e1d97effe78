"""What a page shows of a comparison: the request, and for each cell the file and the words; no pixels are held."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from dora_diffusion.comparison.export import KEY, Record
from dora_diffusion.comparison.request import Cell, Column, CompareRequest
from dora_diffusion.webapp.example import EXAMPLE

__all__ = ["Placed", "Shown", "packaged_example"]


@dataclass(frozen=True)
class Placed:
    """A cell and the PNG it was saved as."""

    row: int
    column: int
    prompt: str
    seed: int
    caption: str
    difference: float
    path: Path
    size: tuple[int, int]
    note: str = ""
    fits: bool = True
    cached: bool = False

    @classmethod
    def of(cls, cell: Cell, path: Path) -> Placed:
        return cls(
            row=cell.row,
            column=cell.column,
            prompt=cell.prompt,
            seed=cell.seed,
            caption=cell.caption,
            difference=cell.difference,
            path=path,
            size=cell.image.size,
            note=cell.note,
            fits=cell.fits,
            cached=cell.cached,
        )

    def cell(self) -> Cell:
        """With its pixels, for the grid and the report."""
        with Image.open(self.path) as image:
            image.load()
        return Cell(
            row=self.row,
            column=self.column,
            prompt=self.prompt,
            seed=self.seed,
            image=image,
            caption=self.caption,
            difference=self.difference,
            seconds=0.0,
            note=self.note,
            fits=self.fits,
            cached=self.cached,
        )


@dataclass(frozen=True)
class Shown:
    """`names` says for each column which base or file it is. `is_example`: packaged, and not drawn here and now.

    `is_sweep`: asked for by the sweep's own form.
    """

    request: CompareRequest
    names: tuple[str, ...]
    cells: tuple[Placed, ...] = ()
    is_example: bool = False
    is_sweep: bool = False
    by_place: dict[tuple[int, int], Placed] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_place", {(cell.row, cell.column): cell for cell in self.cells})

    def with_cell(self, placed: Placed) -> Shown:
        return replace(self, cells=(*self.cells, placed))

    @property
    def is_whole(self) -> bool:
        return len(self.cells) == self.request.pictures


def packaged_example() -> Shown | None:
    """The pictures that come with the package, as their own metadata describes them; None where they are missing."""
    from dora_diffusion.comparison.metrics import mean_difference

    files = sorted(EXAMPLE.glob("row*-column*.png"))
    if not files:
        return None
    record: Record | None = None
    cells: list[Placed] = []
    references: dict[int, Image.Image] = {}
    for file in files:
        row, column = (int(part.strip("rowclumn")) - 1 for part in file.stem.split("-"))
        with Image.open(file) as image:
            image.load()
            text: dict[str, str] = getattr(image, "text", {})
        record = record or Record.model_validate_json(text[KEY])
        reference = references.setdefault(row, image)
        cells.append(
            Placed(
                row=row,
                column=column,
                prompt=text["prompt"],
                seed=int(text["seed"]),
                caption=text["caption"],
                difference=mean_difference(image, reference),
                path=file,
                size=image.size,
            )
        )
    assert record is not None
    columns = tuple(Column(a.label, EXAMPLE / f"{a.name}.safetensors", a.strength) for a in record.adapters)
    request = CompareRequest(record.prompts, record.seeds, columns, num_inference_steps=record.num_inference_steps)
    names = (record.base, *("openmoji style" for _ in columns))
    return Shown(request, names, tuple(cells), is_example=True)
