"""Prior preservation's pictures: drawn by the base before anything is injected, and kept for the next run.

Each says inside what drew it. One that another prompt, base or setting drew is drawn again; a picture that says nothing
is the user's own: it is used, and never written over.
"""

from __future__ import annotations

from collections.abc import Generator
from itertools import count, islice
from pathlib import Path

from PIL import Image
from pydantic import BaseModel, ConfigDict, ValidationError

from dora_diffusion.data.folder import is_passed_over
from dora_diffusion.data.pictures import is_picture, trouble_with
from dora_diffusion.errors import DataError
from dora_diffusion.formats.description import identify_base
from dora_diffusion.generation import GenerationRequest, generate
from dora_diffusion.models.loading import Base
from dora_diffusion.outputs import save_png
from dora_diffusion.paths import obstacle
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.events import Preparing

__all__ = ["class_images"]

FOLDER = "class_images"
MARK = "dora_diffusion_class_image"
SAME = 1e-3  # between two sketches of one base, on another device or in another precision


class Record(BaseModel):
    """What drew a class image, as its file says it; `sketch` is of the base's weights (formats/description.py)."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt: str
    seed: int
    base: str
    sketch: dict[str, float]
    packing: str | None
    size: int
    steps: int
    guidance_scale: float

    def other(self, wanted: Record) -> list[str]:
        """What was different when this was drawn, in words."""
        mine, its = self.model_dump(), wanted.model_dump()
        differing = [f"{key} {mine[key]!r}" for key in mine if key != "sketch" and mine[key] != its[key]]
        near = self.sketch.keys() == wanted.sketch.keys() and all(
            abs(value - wanted.sketch[layer]) <= SAME * abs(value) for layer, value in self.sketch.items()
        )
        return differing if differing or near else [f"other weights of {self.base}"]


def class_images(config: TrainConfig, base: Base, out: Path) -> Generator[Preparing, None, list[Path]]:
    """The class images of a run: the user's own first, then drawn ones; those that fit are kept.

    Raises DataError for one of the user's own that cannot be read, OutputError, PromptError, NotEnoughMemoryError.
    """
    if config.class_prompt is None:
        return []
    folder = out / FOLDER
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    pictures = [path for path in entries if is_picture(path.name) and not is_passed_over(path.name)]
    for path in pictures:
        if reason := obstacle(path) or ("is a folder" if path.is_dir() else ""):  # a named pipe would be waited for
            raise DataError(f"the class image {path} {reason}. Take it out of the folder.")
    records = {path: record for path in pictures if (record := _record_in(path)) is not None}
    own = [path for path in pictures if path not in records]
    if unused := own[config.num_class_images :]:
        most = config.num_class_images
        yield Preparing(f"class images of your own beyond num_class_images = {most}, which are not used: {len(unused)}")
    own = own[: config.num_class_images]
    for path in own:
        if trouble := trouble_with(path)[0]:
            raise DataError(f"the class image {path} {trouble}. Replace it, or delete it: then one is drawn for it.")
    if own:
        yield Preparing(f"class images that say nothing of what drew them are taken as your own: {len(own)}")
    slots = (seed for seed in count() if _path(folder, seed) not in own)
    first = _wanted(config.class_prompt, base)
    seeds = islice(slots, config.num_class_images - len(own))
    wanted = {_path(folder, seed): first.model_copy(update={"seed": seed}) for seed in seeds}
    for line in _why_again(records, wanted):
        yield Preparing(line)
    for number, (path, record) in enumerate(wanted.items()):
        yield Preparing("drawing class images", len(own) + number, config.num_class_images)
        if path not in records or records[path].other(record) or trouble_with(path)[0]:
            image = generate(base, GenerationRequest(record.prompt, record.seed))
            save_png(image, path, {MARK: record.model_dump_json()})
    yield Preparing("drawing class images", config.num_class_images, config.num_class_images)
    return [*own, *wanted]


def _path(folder: Path, seed: int) -> Path:
    return folder / f"{seed:04d}.png"


def _wanted(prompt: str, base: Base) -> Record:
    return Record(
        prompt=prompt,
        seed=0,
        base=base.name,
        sketch=identify_base(base.denoiser).sketch,
        packing=base.packing,
        size=base.size,
        steps=GenerationRequest("").num_inference_steps,
        guidance_scale=base.guidance_scale,
    )


def _record_in(path: Path) -> Record | None:
    """What drew this picture, if it says so; a file that is cut short says it still, at its beginning."""
    try:
        with Image.open(path, formats=["PNG"]) as file:
            return Record.model_validate_json(str(file.info[MARK]))
    except (OSError, SyntaxError, ValueError, KeyError, ValidationError, Image.DecompressionBombError):
        return None


def _why_again(records: dict[Path, Record], wanted: dict[Path, Record]) -> list[str]:
    """What is to be said of the pictures that are drawn again."""
    reasons: dict[str, int] = {}
    for path in records.keys() & wanted.keys():
        if differing := records[path].other(wanted[path]):
            reason = f"an earlier run drew ({', '.join(differing)})"
        elif trouble_with(path)[0]:
            reason = "are damaged"
        else:
            continue
        reasons[reason] = reasons.get(reason, 0) + 1
    return [f"class images that {reason} are drawn again: {number}" for reason, number in reasons.items()]
