"""Write the file that comes out right in one program, or say that none can.

Each form is a way to write an adapter. They are tried from the smallest to the largest, by putting what would be
written through the program's own rules; the first that gives the true update in every layer is taken.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dora_diffusion.adapters.injection import Adapter, AdapterConfig, check_strength
from dora_diffusion.adapters.layers import DoRAUpdate
from dora_diffusion.errors import AdapterFileError, ConfigError, nearest
from dora_diffusion.formats.comfyui import turned_in_comfyui
from dora_diffusion.formats.content import AdapterFile
from dora_diffusion.formats.description import MADE_FOR_KEY
from dora_diffusion.formats.files import read_adapter_file
from dora_diffusion.formats.kohya import has_halves_turned
from dora_diffusion.formats.original import WHOLE
from dora_diffusion.formats.original import Part as Piece
from dora_diffusion.formats.storage import read_header
from dora_diffusion.formats.writing import Layout, file_layer, file_of, write_adapter_file
from dora_diffusion.inspection.formula import halves_swapped
from dora_diffusion.inspection.parity import (
    RIGHT,
    Parity,
    attached,
    evaluate,
    knows,
    refuse_marked,
)
from dora_diffusion.inspection.programs import FLOAT32_EPSILON, Program
from dora_diffusion.inspection.truth import is_swapped
from dora_diffusion.inspection.vectors import changes_vectors
from dora_diffusion.models.loading import Base
from dora_diffusion.outputs import make_folder, scratch_folder

__all__ = ["FORMS", "Form", "Repaired", "Unrepairable", "forms_named", "repair"]


@dataclass(frozen=True)
class Form:
    """A way to write an adapter: `change` makes of it what the layout then writes, or None where it cannot hold it."""

    name: str
    meaning: str
    layout: Layout
    change: Callable[[AdapterFile, Adapter, Program], AdapterFile | None]

    @property
    def label(self) -> str:
        """Its name, with the layout where that is not kohya's or its own."""
        return f"{self.name} (ComfyUI's keys)" if self.layout == "comfyui" != self.name else self.name


@dataclass(frozen=True)
class Repaired:
    """A file that was written: its form, and the largest relative error of a layer by the program's rules."""

    path: Path
    form: Form
    error: float


class Unrepairable(ConfigError):
    """No form of this adapter comes out right in the program; the message has each form's error."""


def repair(
    path: str | os.PathLike[str],
    base: Base,
    program: Program,
    out: Path,
    *,
    strength: float = 1.0,
    form: str | None = None,
) -> Repaired:
    """Write `path`'s adapter to `out` so that it is right in the program, at strength 1 and at `strength`.

    `form` asks for one of FORMS. Raises Unrepairable, ConfigError, AdapterFileError,
    AdapterMismatchError and OutputError.
    """
    strength = check_strength(strength)
    if not knows(program, base):
        raise ConfigError(
            f"how {program.label} names the layers of a {type(base.denoiser).__name__} is not known here, so no file "
            "can be said to be right there. `convert` writes every layout, unchecked."
        )
    refuse_marked(Path(path), read_header(Path(path)).metadata)
    description = read_adapter_file(path).description
    tried = []
    make_folder(out.parent)
    with attached(base, path) as adapter, torch.no_grad(), scratch_folder(out) as scratch:
        _check_known(Path(path), program, adapter)
        written = scratch / out.name
        training = description.training if description else None
        file = file_of(adapter, out, training=training, base_name=description.base.name if description else None)
        for one in FORMS if form is None else forms_named(form):
            changed = one.change(file, adapter, program)
            if changed is None:
                tried.append(f"{one.label} cannot hold this adapter")
                continue
            found = _check(one, _marked(one, changed, program), written, base, adapter, program, strength)
            if found is not None and found.right and found.right_at_strength:
                written.replace(out)
                return Repaired(out, one, found.worst.error)
            tried.append(f"{one.label}: {_outcome(found)}")
    at = "" if strength == 1 else f" at strength 1 and at {strength:g}"
    raise Unrepairable(
        f"no file of this adapter comes out right in {program.label}{at} (up to {RIGHT:g}). Tried: {'; '.join(tried)}. "
        + ("Use it at strength 1 there, or in this project." if strength != 1 else "Use it in another program.")
    )


def _check_known(path: Path, program: Program, adapter: Adapter) -> None:
    """Raises AdapterFileError for changes of biases and norms where no form is known to keep them in the program."""
    if changes_vectors(adapter):
        raise AdapterFileError(
            f"{path} changes biases or normalisation layers too, which no file here is made for with --repair. parity "
            f"says what {program.label} makes of the file as it is; --to diff writes all that it changes. Merged into "
            "the base it is right in every program: dora-diffusion merge FILE --base BASE --out FOLDER."
        )


def _check(
    form: Form, file: AdapterFile, path: Path, base: Base, adapter: Adapter, program: Program, strength: float
) -> Parity | None:
    """Write the form and see what the program makes of it; None for what the layout cannot hold."""
    conversion: dict[str, str | int | float | None] = {"repaired_for": program.name, "form": form.name}
    try:
        write_adapter_file(file, path, form.layout, conversion)
    except AdapterFileError:
        return None
    return evaluate((program,), path, base, adapter, strength)[0]


def _outcome(found: Parity | None) -> str:
    if found is None:
        return "cannot hold this adapter"
    if found.stopped or not found.read:
        return found.stopped or "none of it is read"
    worst = max(found.layers, key=lambda layer: max(layer.error, layer.error_at_strength))
    return f"relative error {max(worst.error, worst.error_at_strength):.2g} in {worst.layer}, the worst layer"


def forms_named(name: str) -> tuple[Form, ...]:
    """The forms of this name, in each layout that it has. Raises ConfigError."""
    if found := tuple(form for form in FORMS if form.name == name):
        return found
    names = list(dict.fromkeys(form.name for form in FORMS))
    near = nearest(name, names, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"there is no form {name!r} to write; the forms are {', '.join(names)}.{hint}")


def _as_it_is(file: AdapterFile, adapter: Adapter, program: Program) -> AdapterFile:
    return file


def _compensated(
    file: AdapterFile, adapter: Adapter, program: Program, turned: Callable[[AdapterFile, str], bool]
) -> AdapterFile | None:
    """m ||W0|| / ||V|| as the magnitude: dividing it by ||W0||, as ComfyUI does, gives m / ||V||.

    Its halves change places where the program turns round B A alone.
    """
    updates = adapter.updates()
    if any(type(update) is not DoRAUpdate for update in updates.values()):
        return None
    tensors = dict(file.tensors)
    for path, update in updates.items():
        W0 = update.frozen.dense_weight().double()
        V = W0 + update.direction().double()
        n0, n = W0.flatten(1).norm(dim=1), V.flatten(1).norm(dim=1)
        factor = torch.where(n > 0, (n0 + FLOAT32_EPSILON) / n.clamp_min(1e-300), 0.0)
        name = f"{file_layer(path)}.magnitude"
        magnitude = (tensors[name].double() * factor.cpu()).float()
        moved = is_swapped(program, (Piece(path, WHOLE),), adapter) and not turned(file, file_layer(path))
        tensors[name] = halves_swapped(magnitude) if moved else magnitude
    return replace(file, tensors=tensors)


_in_kohyas = functools.partial(_compensated, turned=has_halves_turned)
_in_comfyuis = functools.partial(_compensated, turned=turned_in_comfyui)


def _difference(file: AdapterFile, adapter: Adapter, program: Program) -> AdapterFile:
    updates = adapter.updates().items()
    tensors = {f"{file_layer(path)}.difference": update.delta_weight().cpu() for path, update in updates}
    return replace(file, tensors=tensors, config=replace(file.config, kind="full", parametrisation="lora"))


def _full_rank(file: AdapterFile, adapter: Adapter, program: Program) -> AdapterFile:
    """A plain LoRA whose B A is dW: A or B is the identity, whichever is smaller."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for path, update in adapter.updates().items():
        layer, delta = file_layer(path), update.delta_weight().cpu()
        flat = delta.flatten(1)  # [out, in * kernel]
        r = ranks[layer] = min(flat.shape)
        A, B = (torch.eye(r), flat) if flat.shape[1] == r else (flat, torch.eye(r))
        tensors[f"{layer}.lora_A"] = A.reshape(r, *delta.shape[1:])
        tensors[f"{layer}.lora_B"] = B.reshape(-1, r, *(1,) * (delta.dim() - 2))
    most = max(ranks.values())
    config = AdapterConfig(
        kind="lora",
        rank=most,
        alpha=float(most),
        target_modules=file.config.target_modules,
        rank_pattern={layer: r for layer, r in ranks.items() if r != most},
        alpha_pattern={layer: float(r) for layer, r in ranks.items() if r != most},
    )
    return replace(file, tensors=tensors, config=config)


FORMS = (
    Form("diffusers", "PEFT's keys", "diffusers", _as_it_is),
    Form("kohya", "kohya's keys", "kohya", _as_it_is),
    Form("comfyui", "ComfyUI's keys", "comfyui", _as_it_is),
    Form("compensated", "magnitudes for dividing by ||W0||, wrong in every other program", "kohya", _in_kohyas),
    Form("compensated", "the same in ComfyUI's keys", "comfyui", _in_comfyuis),
    Form("diff", "the whole difference of every layer", "kohya", _difference),
    Form("diff", "the same in ComfyUI's keys", "comfyui", _difference),
    Form("full-rank", "a plain LoRA of full rank, larger than the difference", "diffusers", _full_rank),
)


def _marked(form: Form, file: AdapterFile, program: Program) -> AdapterFile:
    """A file that is right in one program alone says so in its header."""
    if form.name != "compensated":
        return file
    mark = {"program": program.label, "version": program.version, "base": file.base.fingerprint}
    return replace(file, header={**file.header, MADE_FOR_KEY: json.dumps(mark, sort_keys=True)})
