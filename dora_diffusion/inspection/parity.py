"""How far each program's update is from the one that an adapter file means, layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.errors import AdapterFileError
from dora_diffusion.formats.anatomy import Anatomy, anatomy_of, model_of
from dora_diffusion.formats.description import MADE_FOR_KEY
from dora_diffusion.formats.diffusers import METADATA_KEY
from dora_diffusion.formats.files import load_adapter
from dora_diffusion.formats.names import locate
from dora_diffusion.formats.original import Part as Piece
from dora_diffusion.formats.storage import read_safetensors
from dora_diffusion.injection import Adapter, adaptable_layers, check_strength
from dora_diffusion.inspection.formula import DoesNotFit, program_update
from dora_diffusion.inspection.programs import PROGRAMS, Program
from dora_diffusion.inspection.reading import FileModule, Reading, read_as, split_key
from dora_diffusion.layers import DoRAUpdate, InputAxisDoRAUpdate
from dora_diffusion.models.loading import Base
from dora_diffusion.variants import UnscaledNormDoRAUpdate

__all__ = [
    "RIGHT",
    "LayerParity",
    "Parity",
    "attached",
    "compare_programs",
    "evaluate",
    "knows",
    "refuse_marked",
]

RIGHT = 1e-4  # a relative error up to this is rounding: programs compute in float32


@dataclass(frozen=True)
class LayerParity:
    """One layer: the relative error of the update at strength 1 and at the strength asked for, and what went wrong.

    `size` is the norm of the true update; an error is infinite where the program gives no finite number.
    """

    layer: str
    size: float
    error: float
    error_at_strength: float
    note: str = ""


@dataclass(frozen=True)
class Parity:
    """What one program makes of the file: its error in every layer that the file is for."""

    program: Program
    strength: float
    layers: tuple[LayerParity, ...]
    read: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    stopped: str = ""
    reasons: tuple[str, ...] = ()

    @property
    def total(self) -> float:
        """||all differences|| / ||all true updates|| at strength 1."""
        return self._over_all("error")

    @property
    def total_at_strength(self) -> float:
        return self._over_all("error_at_strength")

    @property
    def worst(self) -> LayerParity:
        return max(self.layers, key=lambda layer: (layer.error, layer.error_at_strength))

    @property
    def right(self) -> bool:
        """Whether every layer is right at strength 1."""
        return not self.stopped and self.worst.error <= RIGHT

    @property
    def right_at_strength(self) -> bool:
        return not self.stopped and all(layer.error_at_strength <= RIGHT for layer in self.layers)

    def _over_all(self, which: str) -> float:
        squares = sum((getattr(layer, which) * layer.size) ** 2 for layer in self.layers if layer.size > 0)
        size = sum(layer.size**2 for layer in self.layers)
        return math.sqrt(squares / size) if size else max(getattr(layer, which) for layer in self.layers)


@dataclass(frozen=True)
class TrueUpdate:
    """What the file means for one module of it: W0 and W' - W0 in the file's rows."""

    weight: Tensor
    delta: Tensor


def compare_programs(
    path: str | os.PathLike[str], base: Base, strength: float = 1.0, programs: tuple[Program, ...] = PROGRAMS
) -> list[Parity]:
    """What each program makes of the file on this base, as far as its names for the base's layers are known.

    Raises AdapterFileError and AdapterMismatchError.
    """
    strength = check_strength(strength)
    programs = tuple(program for program in programs if knows(program, base))
    tensors, header = read_safetensors(Path(path))
    refuse_marked(Path(path), header)
    with attached(base, path) as adapter:
        updates = adapter.updates()
        scale_of = (lambda layer: updates[layer].scale) if METADATA_KEY in header else None
        return evaluate(programs, tensors, adapter, strength, scale_of)


def knows(program: Program, base: Base) -> bool:
    """Whether the program's names for this base's layers are known."""
    return model_of(type(base.denoiser).__name__) in program.knows


def refuse_marked(path: Path, header: Mapping[str, str]) -> None:
    """A file made for one program alone does not mean what its keys say. Raises AdapterFileError."""
    if MADE_FOR_KEY in header:
        raise AdapterFileError(
            f"{path} was made for one program alone ({header[MADE_FOR_KEY]}): its numbers are not what its keys say. "
            "Give the file that it was made from."
        )


@contextmanager
def attached(base: Base, path: str | os.PathLike[str]) -> Iterator[Adapter]:
    """The adapter in the base for as long as the block lasts."""
    adapter = load_adapter(base.pipe, path, strength=0.0)
    try:
        yield adapter
    finally:
        adapter.eject()


def evaluate(
    programs: Sequence[Program],
    tensors: Mapping[str, Tensor],
    adapter: Adapter,
    strength: float,
    scale_of: Callable[[str], float] | None,
) -> list[Parity]:
    """The programs on a file with these tensors, whose meaning is what `adapter` computes; one layer at a time.

    `scale_of` gives s of a layer as PEFT's configuration in the file's header has it; None for a file without.
    """
    anatomy = anatomy_of(adapter.model, {*adaptable_layers(adapter.model), *adapter.layers})
    readings = [read_as(program, tensors, anatomy) for program in programs]
    taken = [{module.name: module for module in reading.modules} for reading in readings]
    layers: list[list[LayerParity]] = [[] for _ in programs]
    for name in dict.fromkeys(split_key(key)[0] for key in tensors):
        pieces = pieces_of(name, anatomy)
        true = true_update(pieces, adapter)
        scale = scale_of(pieces[0].layer) if scale_of is not None and "." in name else None
        for program, modules, found in zip(programs, taken, layers):
            found += _layers(program, modules.get(name), pieces, true, strength, scale)
    return [
        _judged(program, reading, found, adapter, scale_of is not None, strength)
        for program, reading, found in zip(programs, readings, layers)
    ]


def _judged(
    program: Program, reading: Reading, layers: list[LayerParity], adapter: Adapter, has_header: bool, strength: float
) -> Parity:
    stopped = reading.refused
    if program.on_error == "stop" and not stopped:
        stopped = next((f"fails at {layer.layer}: {layer.note}" for layer in layers if layer.note), "")
    read = 0 if stopped else sum(len(module.pieces) for module in reading.modules)
    reasons = () if stopped else _reasons(program, reading, layers, adapter, has_header)
    return Parity(program, strength, tuple(layers), read, reading.dropped, stopped, reasons)


def _reasons(
    program: Program, reading: Reading, layers: list[LayerParity], adapter: Adapter, has_header: bool
) -> tuple[str, ...]:
    """What a program that gets the file wrong does otherwise than it should."""
    if not reading.modules:
        return ("reads none of it: the pictures are the base's",)
    kinds = {type(update) for update in adapter.updates().values()}
    has_magnitudes = any(module.magnitude is not None or module.untrained for module in reading.modules)
    reasons = []
    if missed := len(layers) - sum(len(module.pieces) for module in reading.modules):
        reasons.append(f"does not read {missed} layers")
    if kinds & {DoRAUpdate, InputAxisDoRAUpdate, UnscaledNormDoRAUpdate} and not has_magnitudes:
        reasons.append("drops the magnitudes, which leaves a plain LoRA")
    if untrained := sum(module.untrained for module in reading.modules):
        reasons.append(f"loses the magnitudes of {untrained} layers of a text encoder, which stay ||W0||")
    if skipped := sum(1 for layer in layers if layer.note):
        reasons.append(f"leaves out {skipped} layers whose shapes it cannot compute")
    if has_header and not program.header:
        reasons.append("does not read alpha from the header")
    if has_magnitudes and DoRAUpdate in kinds:
        if program.axis == "input":
            reasons.append("takes the norm of the columns, not of the rows")
        elif program.output_norm == "W0":
            reasons.append("divides by ||W0||, not by ||W0 + s B A||")
    if has_magnitudes and InputAxisDoRAUpdate in kinds and program.axis == "output":
        reasons.append("takes the norm of the rows, not of the columns")
    return tuple(reasons)


def _layers(
    program: Program,
    module: FileModule | None,
    pieces: tuple[Piece, ...],
    true: TrueUpdate,
    strength: float,
    header_scale: float | None,
) -> list[LayerParity]:
    zero = torch.zeros(())
    updates, note = [zero, zero], ""
    if module is not None:
        try:
            updates = [program_update(program, module, true.weight, w, header_scale) for w in (1.0, strength)]
        except DoesNotFit as error:
            note = str(error)
    layers = []
    for piece in pieces:
        delta = piece.rows.cut(true.delta)
        ours = [piece.rows.cut(update) if update.dim() else update for update in (updates[0], updates[-1])]
        errors = [_relative(update, w * delta) for update, w in zip(ours, (1.0, strength))]
        layers.append(LayerParity(piece.layer, delta.norm().item(), errors[0], errors[1], note))
    return layers


def _relative(found: Tensor, expected: Tensor) -> float:
    size, off = expected.norm().item(), (found - expected).norm().item()
    if not math.isfinite(off):
        return math.inf
    return off / size if size else (0.0 if off == 0 else math.inf)


def pieces_of(name: str, anatomy: Anatomy) -> tuple[Piece, ...]:
    """The model's layers that a file's module of this name is."""
    return locate(name, anatomy).parts


def true_update(pieces: tuple[Piece, ...], adapter: Adapter) -> TrueUpdate:
    """The true update of a file's module, its layers put together again in the file's rows."""
    updates = [adapter.updates()[piece.layer] for piece in pieces]
    weights = [update.frozen.dense_weight().double() for update in updates]
    deltas = [update.delta_weight().double() for update in updates]
    if pieces[0].rows.swapped:  # changing places twice changes nothing
        return TrueUpdate(pieces[0].rows.cut(weights[0]), pieces[0].rows.cut(deltas[0]))
    return TrueUpdate(torch.cat(weights), torch.cat(deltas))
