"""How far each program's update is from the one that an adapter file means, layer by layer."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.adapters.injection import Adapter, adaptable_layers, check_strength
from dora_diffusion.adapters.layers import DoRAUpdate, InputAxisDoRAUpdate
from dora_diffusion.errors import AdapterFileError
from dora_diffusion.formats.anatomy import Anatomy, anatomy_of, model_of
from dora_diffusion.formats.description import MADE_FOR_KEY
from dora_diffusion.formats.diffusers import METADATA_KEY
from dora_diffusion.formats.files import load_adapter, read_adapter_file
from dora_diffusion.formats.names import locate
from dora_diffusion.formats.original import WHOLE
from dora_diffusion.formats.original import Part as Piece
from dora_diffusion.formats.places import find_file
from dora_diffusion.formats.storage import read_header, read_safetensors
from dora_diffusion.formats.writing import file_layer
from dora_diffusion.inspection.directions import OTHERWISE
from dora_diffusion.inspection.formula import DoesNotFit, halves_swapped, program_update
from dora_diffusion.inspection.programs import PROGRAMS, Program
from dora_diffusion.inspection.reading import FileModule, Reading, read_as, split_key
from dora_diffusion.inspection.stock import read_by_diffusers
from dora_diffusion.models.loading import Base

__all__ = [
    "RIGHT",
    "LayerParity",
    "Parity",
    "attached",
    "check_matrices",
    "compare_programs",
    "evaluate",
    "is_swapped",
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
    found, _ = find_file(path)
    refuse_marked(found, read_header(found).metadata)
    with attached(base, path) as adapter:
        if adapter.config.parametrisation != "lora":
            raise AdapterFileError(
                f"{found} is {adapter.config.kind_label}: what other programs make of it is not known here. What "
                "convert --to diff writes of it is exact in all that read differences, and parity says which do."
            )
        check_matrices(found, adapter)
        return evaluate(programs, found, base, adapter, strength)


def check_matrices(path: Path, adapter: Adapter) -> None:
    """Raises AdapterFileError for changes of biases and norms: what other programs make of these is not known here."""
    if any(u.bias_difference is not None or not u.frozen.in_shape for u in adapter.updates().values()):
        raise AdapterFileError(
            f"{path} changes biases or normalisation layers too: what other programs make of these is not known here, "
            "so that nothing can be said of the file as a whole. Merged into the base it is right in every program: "
            "dora-diffusion merge FILE --base BASE --out FOLDER."
        )


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
def attached(base: Base, path: str | os.PathLike[str], partial: bool = False) -> Iterator[Adapter]:
    """The adapter, or with `partial` what fits of it, in the base for as long as the block lasts."""
    adapter = load_adapter(base.pipe, path, strength=0.0, partial=partial)
    try:
        yield adapter
    finally:
        adapter.eject()


def evaluate(programs: Sequence[Program], path: Path, base: Base, adapter: Adapter, strength: float) -> list[Parity]:
    """The programs on this file, whose meaning is what `adapter`, in the base, computes; one layer at a time."""
    tensors, header = read_safetensors(path)
    has_header, config = METADATA_KEY in header, read_adapter_file(path).config
    anatomy = anatomy_of(adapter.model, {*adaptable_layers(adapter.model), *adapter.layers})
    names = dict.fromkeys(split_key(key)[0] for key in tensors)
    places = {name: pieces for name in names if (pieces := pieces_of(name, anatomy, adapter))}
    readings = [
        read_by_diffusers(path, tensors, base.pipe, lambda name: places.get(name, ()))
        if program.asked
        else read_as(program, tensors, anatomy)
        for program in programs
    ]
    taken = [{module.name: module for module in reading.modules} for reading in readings]
    layers: list[list[LayerParity]] = [[] for _ in programs]
    for name, pieces in places.items():
        true = true_update(pieces, adapter)
        scale = config.scale_of(file_layer(pieces[0].layer)) if has_header and "." in name else None
        for program, reading, modules, found in zip(programs, readings, taken, layers):
            if not reading.by_layer:
                moved = is_swapped(program, pieces, adapter)
                found += _layers(program, modules.get(name), pieces, true, strength, scale, moved)
                continue
            for piece in pieces:
                own = TrueUpdate(piece.rows.cut(true.weight), piece.rows.cut(true.delta))
                found += _layers(program, modules.get(piece.layer), (Piece(piece.layer, WHOLE),), own, strength, None)
    return [
        _judged(program, reading, found, adapter, has_header, strength)
        for program, reading, found in zip(programs, readings, layers)
    ]


def _judged(
    program: Program, reading: Reading, layers: list[LayerParity], adapter: Adapter, has_header: bool, strength: float
) -> Parity:
    stopped = reading.refused
    meant = {layer.layer for layer in layers}
    strays = [module.name for module in reading.modules if reading.by_layer and module.name not in meant]
    layers = layers + [LayerParity(name, 0.0, math.inf, math.inf, "the file is not for it") for name in strays]
    if program.on_error == "stop" and not stopped:
        stopped = next((f"fails at {layer.layer}: {layer.note}" for layer in layers if layer.note), "")
    read = 0 if stopped else sum(len(module.pieces) for module in reading.modules)
    reasons = () if stopped else _reasons(program, reading, layers, adapter, has_header)
    if strays and not stopped:
        reasons = (*reasons, f"changes {len(strays)} layers that the file is not for")
    return Parity(program, strength, tuple(layers), read, reading.dropped, stopped, reasons)


def _reasons(
    program: Program, reading: Reading, layers: list[LayerParity], adapter: Adapter, has_header: bool
) -> tuple[str, ...]:
    """What a program that gets the file wrong does otherwise than it should."""
    if not reading.modules:
        return ("reads none of it: the pictures are the base's",)
    norms = {update.magnitude_name for update in adapter.updates().values() if isinstance(update, DoRAUpdate)}
    by_output = DoRAUpdate.magnitude_name in norms
    has_magnitudes = any(module.magnitude is not None or module.untrained for module in reading.modules)
    reasons = []
    if missed := len({layer.layer for layer in layers} - {p.layer for m in reading.modules for p in m.pieces}):
        reasons.append(f"does not read {missed} layers")
    if norms and not has_magnitudes:
        reasons.append("drops the magnitudes, which leaves a plain LoRA")
    if untrained := sum(module.untrained for module in reading.modules):
        reasons.append(f"loses the magnitudes of {untrained} layers of a text encoder, which stay ||W0||")
    if rescaled := _rescaled(reading, adapter):
        reasons.append(f"gives {rescaled} layers another alpha / rank than the file's")
    if skipped := sum(1 for layer in layers if layer.note and layer.size):
        reasons.append(f"leaves out {skipped} layers whose shapes it cannot compute")
    if has_header and not program.header:
        reasons.append("does not read alpha from the header")
    computed = {program.forms[module.form] for module in reading.modules if module.form in program.forms}
    reasons += [OTHERWISE[how] for how in sorted(computed) if how in OTHERWISE]
    if program.unturned and any(piece.rows.swapped for module in reading.modules for piece in module.pieces):
        reasons.append("leaves the halves of a final layer in the checkpoint's order, where its model has the other")
    if has_magnitudes and by_output:
        if program.axis == "input":
            reasons.append("takes the norm of the columns, not of the rows")
        elif program.output_norm == "W0":
            reasons.append("divides by ||W0||, not by ||W0 + s B A||")
        if any(m.magnitude is not None and is_swapped(program, m.pieces, adapter) for m in reading.modules):
            reasons.append("turns round the halves of a final layer's B A and not of its magnitude")
    if has_magnitudes and InputAxisDoRAUpdate.magnitude_name in norms and program.axis == "output":
        reasons.append("takes the norm of the rows, not of the columns")
    return tuple(reasons)


def _rescaled(reading: Reading, adapter: Adapter) -> int:
    """How many layers a program that was asked gives another s."""
    updates = adapter.updates()
    scales = (
        {m.name: m.alpha / m.down.shape[0] for m in reading.modules if m.alpha is not None and m.down is not None}
        if reading.by_layer
        else {}
    )
    return sum(not math.isclose(s, updates[name].scale, rel_tol=1e-5) for name, s in scales.items() if name in updates)


def is_swapped(program: Program, pieces: Sequence[Piece], adapter: Adapter) -> bool:
    """Whether the program turns round the halves of this module's B A, which has the name and the rows of diffusers."""
    last = getattr(getattr(adapter.model, "config", None), "num_layers", 0) - 1
    names = program.swaps.get(model_of(type(adapter.model).__name__), ())
    return not pieces[0].rows.swapped and pieces[0].layer in {name.format(last=last) for name in names}


def _layers(
    program: Program,
    module: FileModule | None,
    pieces: tuple[Piece, ...],
    true: TrueUpdate,
    strength: float,
    header_scale: float | None,
    swapped: bool = False,
) -> list[LayerParity]:
    zero = torch.zeros(())
    updates, note = [zero, zero], ""
    if module is not None:
        try:
            unturned = program.unturned and pieces[0].rows.swapped
            W0 = halves_swapped(true.weight) if unturned else true.weight
            updates = [program_update(program, module, W0, w, header_scale, swapped) for w in (1.0, strength)]
            updates = [halves_swapped(update) for update in updates] if unturned else updates
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


def pieces_of(name: str, anatomy: Anatomy, adapter: Adapter) -> tuple[Piece, ...]:
    """The adapter's layers that a file's module of this name is; none for what is no layer."""
    return tuple(piece for piece in locate(name, anatomy).parts if piece.layer in adapter.layers)


def true_update(pieces: tuple[Piece, ...], adapter: Adapter) -> TrueUpdate:
    """The true update of a file's module, its layers put together again in the file's rows."""
    updates = [adapter.updates()[piece.layer] for piece in pieces]
    weights = [update.frozen.dense_weight().double() for update in updates]
    deltas = [update.delta_weight().double() for update in updates]
    if pieces[0].rows.swapped:  # changing places twice changes nothing
        return TrueUpdate(pieces[0].rows.cut(weights[0]), pieces[0].rows.cut(deltas[0]))
    return TrueUpdate(torch.cat(weights), torch.cat(deltas))
