"""What a comparison leaves behind so that it can be made again: metadata in its pictures, and the command line."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dora_diffusion.comparison.cache import file_digest
from dora_diffusion.comparison.request import Cell, CompareRequest, written_number, written_size
from dora_diffusion.errors import DataError
from dora_diffusion.models.quantising import Packing
from dora_diffusion.screen import shell_line

__all__ = ["AdapterRecord", "Record", "command_of", "metadata_of", "read_record", "record_of"]

KEY = "dora_diffusion"  # the PNG text chunk that holds the record
MOST_BYTES = 64 * 1024**2


class AdapterRecord(BaseModel):
    """An adapter of the comparison: found again by its bytes, wherever it lies then."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    label: str
    name: str
    sha256: str
    strength: float


class Record(BaseModel):
    """A whole request, as it is written into every picture."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    version: int = 1
    base: str
    quantise: Packing | None = None
    prompts: tuple[str, ...] = Field(min_length=1)
    seeds: tuple[int, ...] = Field(min_length=1)
    adapters: tuple[AdapterRecord, ...] = ()
    negative_prompt: str = ""
    num_inference_steps: int = 25
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    partial: bool = False


def record_of(request: CompareRequest, base_name: str, packing: Packing | None = None) -> Record:
    adapters = tuple(
        AdapterRecord(
            label=column.label, name=column.path.stem, sha256=file_digest(column.path), strength=column.strength
        )
        for column in request.adapters
        if column.path
    )
    return Record(
        base=base_name,
        quantise=packing,
        prompts=request.prompts,
        seeds=request.seeds,
        adapters=adapters,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        width=request.width,
        height=request.height,
        partial=request.partial,
    )


def metadata_of(record: Record, cell: Cell | None = None) -> dict[str, str]:
    """PNG text for a cell, or for the whole grid: the record, and for people the few things they look for."""
    metadata = {"Software": "DoRA Diffusion", KEY: record.model_dump_json()}
    if cell is not None:
        metadata |= {"prompt": cell.prompt, "seed": str(cell.seed), "caption": cell.caption, "base": record.base}
    return metadata


def read_record(path: Path, name: str | None = None) -> Record:
    """The request that a picture was made by; `name` is what people call the file. Raises DataError."""
    name = name or path.name
    try:
        if path.stat().st_size > MOST_BYTES:
            raise DataError(f"{name} is too large to be one of these pictures. Drop in a PNG that was saved here.")
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # the text may stand behind the pixels
            text = getattr(image, "text", {}).get(KEY)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is no PNG that can be read. Drop in a picture that was saved here.") from error
    if text is None:
        raise DataError(
            f"{name} does not say how it was made: another program saved it, or took its metadata out. "
            "Drop in the file as it was downloaded from here."
        )
    try:
        return Record.model_validate(json.loads(str(text)))
    except (ValidationError, ValueError) as error:
        raise DataError(f"{name} has damaged metadata. Drop in another picture of the comparison.") from error


def command_of(
    request: CompareRequest, base_name: str, packing: Packing | None = None, out: str = "outputs/compare"
) -> str:
    """The command that makes the same comparison in a terminal."""
    words = ["dora-diffusion", "compare"]
    for prompt in request.prompts:
        words += ["--prompt", prompt]
    words += ["--seeds", ",".join(map(str, request.seeds))]
    for column in request.adapters:
        words += ["--adapters", str(column.path), "--strength", written_number(column.strength)]
    words += ["--steps", str(request.num_inference_steps)]
    if request.guidance_scale is not None:
        words += ["--guidance", written_number(request.guidance_scale)]
    if size := written_size(request.width, request.height):
        words += ["--size", size]
    if request.negative_prompt:
        words += ["--negative-prompt", request.negative_prompt]
    if request.partial:
        words.append("--partial")
    if base_name != "emoji":
        words += ["--base", base_name]
    if packing is not None:
        words += ["--quantise", packing]
    return shell_line([*words, "--out", out])
