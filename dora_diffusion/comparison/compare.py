"""Side by side: the same prompts and seeds through the base and through each adapter."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from pathlib import Path

from PIL import Image

from dora_diffusion.adapters.injection import Adapter
from dora_diffusion.comparison.cache import PictureCache, file_digest
from dora_diffusion.comparison.metrics import mean_difference
from dora_diffusion.comparison.request import BASE, Cell, Column, CompareRequest, one_for_each, written_number
from dora_diffusion.errors import AdapterMismatchError
from dora_diffusion.formats.description import identify_base
from dora_diffusion.formats.files import AdapterFile, attach, fit_of, read_what_fits
from dora_diffusion.formats.findings import counted
from dora_diffusion.generation import OnStep, check_prompt, generate
from dora_diffusion.lettering.labels import named_apart
from dora_diffusion.models.loading import Base

__all__ = ["BASE", "Cell", "Column", "CompareRequest", "columns_of", "compare", "mean_difference"]


def columns_of(
    paths: Sequence[Path], strengths: Sequence[float] | None = None, partial: bool = False
) -> tuple[Column, ...]:
    """A column for each adapter file, labelled by its kind, and by its name where the kind says too little."""
    strengths = one_for_each(paths, strengths)
    kinds = [read_what_fits(path, partial=partial).config.kind_label for path in paths]
    labels = [
        kind if kinds.count(kind) == 1 else f"{kind} {name}"
        for kind, name in zip(kinds, named_apart(paths, folders_at_least=1), strict=True)
    ]
    return tuple(Column(*column) for column in zip(labels, paths, strengths, strict=True))


@dataclass(frozen=True)
class _Ready:
    """A column whose adapter is in the base at strength 0, or does not fit it."""

    column: Column
    file: AdapterFile | None
    adapter: Adapter | None
    note: str = ""
    fits: bool = True


def compare(
    base: Base,
    request: CompareRequest,
    on_step: OnStep | None = None,
    *,
    cache: PictureCache | None = None,
    owner: str = "",
    tolerant: bool = False,
) -> Iterator[Cell]:
    """Draw the comparison, a cell at a time, row by row and the base first.

    Adapters are loaded once, at strength 0, and only their strengths change between cells. They are taken out again at
    the end, whatever happens. Raises the errors of reading and loading before the first cell; `tolerant` shows an
    adapter that does not fit the base as the base's picture with a note instead. Pictures that `owner` has in the cache
    are not drawn again.
    """
    for prompt in request.prompts:
        check_prompt(base.pipe, prompt)
    files = [
        read_what_fits(column.path, partial=request.partial) if column.path else None for column in request.columns
    ]
    with ExitStack() as undo:
        ready: list[_Ready] = []
        for i, (column, file) in enumerate(zip(request.columns, files, strict=True)):
            ready.append(_attach(base, column, file, f"column_{i}", tolerant, request.partial))
            if (adapter := ready[-1].adapter) is not None:
                undo.callback(adapter.eject)
        identity = (owner, base.name, base.packing, identify_base(base.denoiser).fingerprint, str(base.pipe.device))
        for row, (prompt, seed) in enumerate(request.rows):
            reference: Image.Image | None = None
            for i, each in enumerate(ready):
                began = time.monotonic()
                key = repr((identity, _mark(each), astuple(request.picture(prompt, seed))))
                image = reference if not each.fits else (cache.find(key) if cache else None)
                cached = image is not None and each.fits
                image = image or _draw(base, request, prompt, seed, each, on_step)
                if cache is not None and each.fits and not cached:
                    cache.keep(key, image)
                reference = reference or image
                yield Cell(
                    row=row,
                    column=i,
                    prompt=prompt,
                    seed=seed,
                    image=image,
                    caption=_caption(each.column, each.file, seed),
                    difference=mean_difference(image, reference),
                    seconds=time.monotonic() - began,
                    note=each.note,
                    fits=each.fits,
                    cached=cached,
                )


def _attach(base: Base, column: Column, file: AdapterFile | None, name: str, tolerant: bool, partial: bool) -> _Ready:
    if file is None:
        return _Ready(column, None, None)
    fit = fit_of(base, file)
    try:
        adapter = attach(base, file, strength=0.0, name=name, partial=partial)
    except AdapterMismatchError:
        if not tolerant:
            raise
        note = f"{fit.matched} of {fit.total} keys matched: made for another base, so this is the base's picture"
        return _Ready(column, file, None, note, fits=False)
    if fit.unmatched or fit.left_out:
        note = f"loaded in part: {fit.matched} of {fit.total} layers, {counted(fit.left_out)} of the file left out"
        return _Ready(column, file, adapter, note)
    if fit.same_weights:
        return _Ready(column, file, adapter)
    note = f"trained on {file.base.name} with other weights ({file.base.fingerprint}, here {fit.fingerprint})"
    return _Ready(column, file, adapter, note)


def _draw(
    base: Base, request: CompareRequest, prompt: str, seed: int, each: _Ready, on_step: OnStep | None
) -> Image.Image:
    if each.adapter is not None:
        each.adapter.strength = each.column.strength
    try:
        return generate(base, request.picture(prompt, seed), on_step)
    finally:
        if each.adapter is not None:
            each.adapter.strength = 0.0


def _mark(each: _Ready) -> tuple[str, float]:
    """What decides a picture beside the request: the adapter's bytes and its strength."""
    return (f"{file_digest(each.column.path)} {each.note}", each.column.strength) if each.column.path else ("", 0.0)


def _caption(column: Column, file: AdapterFile | None, seed: int) -> str:
    if file is None:
        return f"{column.label} · seed {seed}"
    return f"{column.label} · rank {file.config.rank} · strength {written_number(column.strength)} · seed {seed}"
