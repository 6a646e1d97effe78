"""The modules of a file at the layers that their names mean, in a model or by the names alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from dora_diffusion.formats import names
from dora_diffusion.formats.anatomy import MODEL_LABEL, Anatomy, Model
from dora_diffusion.formats.configs import config_of, fold_scale_of_whole, says_dora
from dora_diffusion.formats.content import AdapterFile
from dora_diffusion.formats.cutting import cannot_fall_apart, cut, has_no_parts
from dora_diffusion.formats.findings import Findings, some
from dora_diffusion.formats.forms import form_of, name_of
from dora_diffusion.formats.unet_names import is_original

__all__ = ["open_names", "place", "place_again"]


DECOMPOSED = ("lora", "loha", "lokr")  # the forms that trainers give magnitudes to, in all layers or in none


@dataclass
class _Placed:
    """The sound modules of a file at their layers."""

    parameters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    flat: set[str] = field(default_factory=set)
    fellows: dict[str, tuple[str, ...]] = field(default_factory=dict)


def place_again(file: AdapterFile, anatomy: Anatomy) -> tuple[AdapterFile, Findings]:
    """A file that was read without a model, led to this one's layers. One with other tensors than were read stays."""
    findings = Findings()
    if file.raw is None or file.raw.placed is not file.tensors:
        return file, findings
    return place(file, anatomy, findings), findings


def place(file: AdapterFile, anatomy: Anatomy | None, findings: Findings) -> AdapterFile:
    """The file with the tensors of its raw modules by layer: those of the model, or what the names alone tell.

    What finds no place goes into `findings`. Raises AdapterFileError.
    """
    raw = file.raw
    assert raw is not None
    models = _models(file) if anatomy is None else (anatomy.model,)
    here = anatomy or Anatomy(models[0], file.base.layers_per_block)
    placed = _place(raw.modules, here, findings)
    prefix = names.denoiser_prefix(raw.modules, placed.parameters, models[0])
    folded = fold_scale_of_whole(file, placed.parameters, prefix)
    config, notes = config_of(file, placed.parameters, prefix)
    if config.kind == "lora" and (said := says_dora(file, prefix)):
        findings.missing.append(f"every magnitude: {said}, and no layer has one, so that it is a LoRA of other weights")
    for layer, held in placed.parameters.items():
        if "unscaled_magnitude" in held and config.scale_of(layer) == 1:  # ai-toolkit's norm is DoRA's, then
            held["magnitude"] = held.pop("unscaled_magnitude")
    tensors = {f"{la}.{p}": t for la, held in placed.parameters.items() for p, t in held.items() if p != "alpha"}
    kept = set(placed.written.values())
    made = replace(
        file,
        prefix=prefix,
        config=config,
        tensors=tensors,
        written=placed.written,
        flat=frozenset(placed.flat),
        fellows={la: fellows for la, fellows in placed.fellows.items() if la in placed.parameters},
        notes=tuple(dict.fromkeys((*raw.notes, *folded, *notes))),
        left_out=tuple(key for key, module in raw.keys.items() if module not in kept),
        models=models,
        raw=replace(raw, placed=tensors),
    )
    return made if anatomy else replace(made, notes=(*made.notes, *_guesses(made)))


def _models(file: AdapterFile) -> tuple[Model, ...]:
    assert file.raw is not None
    return names.models_of(file.raw.modules, _linear_shapes(file.raw.modules), file.base.model_class, file.header)


def open_names(file: AdapterFile) -> list[str]:
    """The modules whose names mean other layers in one family than in the next, where the file leaves it open."""
    if file.raw is None or len(file.models) < 2:
        return []
    anatomies = [Anatomy(model, file.base.layers_per_block) for model in file.models]
    first, *others = anatomies
    return [
        module
        for module in dict.fromkeys(file.written.values())
        if any(names.locate(module, other) != names.locate(module, first) for other in others)
    ]


def _guesses(file: AdapterFile) -> Iterable[str]:
    """What was taken for granted of the layers' names, as there is no model to look at."""
    if unclear := open_names(file):
        families = " or ".join(MODEL_LABEL[model] for model in file.models)
        yield (
            f"nothing in the file says whether it is for {families}, and {some(unclear)} would be other layers in "
            f"each: read as {MODEL_LABEL[file.models[0]]}'s here; in a base its own names count"
        )
    blocks = any(is_original(names.dotted(module)) for module in file.written.values())
    if file.models[0] == "unet" and blocks and file.base.layers_per_block is None:
        yield (
            "the original names of a UNet are taken for two layers in a block, as Stable Diffusion 1, 2 and XL have "
            "them; in a base its own blocks count"
        )


def _place(modules: Mapping[str, Mapping[str, Tensor]], anatomy: Anatomy, findings: Findings) -> _Placed:
    """Each module at its layer, or at several where it was fused."""
    placed = _Placed()
    whole: dict[str, str] = {}
    for module, held in modules.items():
        located = names.locate(module, anatomy)
        rows = [part.rows for part in located.parts]
        problem = cannot_fall_apart(held, rows)
        taken = [part.layer for part in located.parts if part.layer in placed.parameters]
        if problem:
            findings.misshapen.append(f"{module}: {problem}")
        elif kind := has_no_parts(held, rows):
            whole[module] = kind
        elif taken:
            findings.unexpected.append(
                f"{module}: the layer {taken[0]} is there already, as {placed.written[taken[0]]}"
            )
        else:
            for part, tensors in zip(located.parts, cut(held, rows)):
                placed.parameters[part.layer] = tensors
                placed.written[part.layer] = module
                placed.flat |= {part.layer} if located.flat else set()
                if "shared_magnitude" in tensors:
                    placed.fellows[part.layer] = tuple(each.layer for each in located.parts)
    findings.add_foreign(whole)
    _check_evenness(placed, findings)
    return placed


def _linear_shapes(modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the modules that are linear and whole."""
    shapes = {}
    for module, held in modules.items():
        sizes = form_of(held).sizes(held)
        if sizes.outputs and sizes.columns and not sizes.kernel:
            shapes[module] = (sizes.outputs, sizes.columns)
    return shapes


def _check_evenness(placed: _Placed, findings: Findings) -> None:
    """A DoRA has a magnitude in every layer of a model; a layer without one has lost it."""
    for component in {_component(layer) for layer in placed.parameters}:
        layers = [layer for layer in placed.parameters if _component(layer) == component]
        low_rank = [layer for layer in layers if name_of(placed.parameters[layer]) in DECOMPOSED]
        without = [layer for layer in low_rank if not any("magnitude" in p for p in placed.parameters[layer])]
        if without and len(without) < len(low_rank):
            findings.missing += [f"{placed.written[layer]}: its magnitude" for layer in without]
            for layer in without:
                del placed.parameters[layer], placed.written[layer]


def _component(layer: str) -> str:
    first = layer.partition(".")[0]
    return first if first in names.TEXT_ENCODERS else ""
