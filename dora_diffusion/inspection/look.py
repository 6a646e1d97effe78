"""A look inside files: their summaries, and with a base the analysis of each, made comparable for a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dora_diffusion.errors import AdapterFileError
from dora_diffusion.formats.places import find_file
from dora_diffusion.inspection.analysis import Analysis, analyse
from dora_diffusion.inspection.changes import changes_of, source_kind
from dora_diffusion.inspection.effects import effect_notes
from dora_diffusion.inspection.summary import Summary, summarise
from dora_diffusion.lettering.labels import named_apart
from dora_diffusion.models.loading import Base

__all__ = ["Look", "comparable", "look_at", "names_of"]

Look = tuple[Summary, Analysis | None]


def look_at(paths: Sequence[Path], base: Base | None = None, partial: bool = False) -> list[Look]:
    """Each file's summary and, with a base, its analysis; with `partial` of what can be read and fits.

    Raises AdapterFileError and AdapterMismatchError.
    """
    looks: list[Look] = []
    for path, name in zip(paths, names_of(paths)):
        summary = summarise(path, partial)
        analysis = None
        if base is not None:
            with changes_of(path, base, partial) as changes:
                analysis = analyse(name, summary.kind, summary.rank, changes)
            if source_kind(path) == "adapter":
                found, _ = find_file(path)
                summary = replace(summary, notes=(*summary.notes, *effect_notes(found, base, partial)))
        looks.append((summary, analysis))
    return looks


def names_of(paths: Sequence[Path]) -> list[str]:
    """The files' names, with their folders' where two are alike."""
    return named_apart(paths)


def comparable(analyses: Sequence[Analysis]) -> list[Analysis]:
    """The same layers of each: those that all of them change. Raises AdapterFileError when there are none."""
    changed = [{layer.layer for layer in a.layers if layer.relative_size > 0} for a in analyses]
    shared = set.intersection(*changed) if changed else set()
    if not shared:
        raise AdapterFileError(
            "these files change no layer in common, so that a plot could not compare them. "
            "Plot each by itself, or check with --json which layers each of them changes."
        )
    return [analysis.only(shared) for analysis in analyses]
