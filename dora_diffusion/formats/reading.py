"""From a file of any dialect to an `AdapterFile`: recognise, check every key, bring into one form.

Nothing is dropped in silence: a key that is missing, not expected or misshapen is named, all of them in one error.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from dora_diffusion.errors import AdapterFileError
from dora_diffusion.formats import names
from dora_diffusion.formats.configs import config_of, read_description
from dora_diffusion.formats.content import AdapterFile
from dora_diffusion.formats.description import Description
from dora_diffusion.formats.leaves import NOT_READ, Leaf, dialect_of, split_key
from dora_diffusion.formats.modules import cannot_fall_apart, check_module, cut, one_form
from dora_diffusion.formats.original import is_flux2
from dora_diffusion.formats.places import find_file
from dora_diffusion.formats.storage import read_header, read_safetensors

__all__ = ["Findings", "check_adapter", "read_adapter_file", "read_with_findings", "some"]

FLOATS = ("F64", "F32", "F16", "BF16")
WHOLE_NUMBERS = ("I64", "I32", "I16", "I8", "U8")  # some programs save alpha as one
MENTIONED = 20  # keys of one sort named in a message; the rest is counted
SOUND_RANGE = 1e6  # no weight is near it, and products of two and their squares stay within float32


@dataclass
class Findings:
    """All that does not fit, by sort; `total` counts the modules of the file."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    total: int = 0

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def lines(self) -> str:
        sorts = {"missing": self.missing, "unexpected": self.unexpected, "misshapen": self.misshapen}
        return "".join(f"\n{name}:\n  " + some(keys, "\n  ") for name, keys in sorts.items() if keys)

    def way_out(self) -> str:
        if self.missing or self.misshapen:
            return (
                "It is damaged or incomplete: download or save it again, or load what is sound of it with partial=True."
            )
        return "Load the rest of it with partial=True, if that is what you want."


def some(keys: list[str], between: str = ", ") -> str:
    more = f"{between}and {len(keys) - MENTIONED} more" if len(keys) > MENTIONED else ""
    return between.join(keys[:MENTIONED]) + more


def check_adapter(path: str | os.PathLike[str]) -> None:
    """Raise AdapterFileError where there is no sound safetensors file; only its header is read."""
    read_header(find_file(path)[0])


def read_adapter_file(
    path: str | os.PathLike[str], *, partial: bool = False, alpha: float | None = None
) -> AdapterFile:
    """Read an adapter of any dialect: a file, a PEFT folder, or a hub id.

    `partial` leaves out what cannot be read and says so; `alpha` is for files of programs that do not save theirs.
    Raises AdapterFileError.
    """
    file, findings = read_with_findings(path, alpha=alpha)
    if findings and not (partial and file.tensors):
        raise AdapterFileError(f"{file.path} cannot be read whole.{findings.lines()}\n{findings.way_out()}")
    if findings:
        warnings.warn(f"{file.path.name}: {len(file.left_out)} keys are left out.{findings.lines()}", stacklevel=2)
    return file


def read_with_findings(path: str | os.PathLike[str], *, alpha: float | None = None) -> tuple[AdapterFile, Findings]:
    """What can be read, and what cannot. Raises AdapterFileError for a file that is no sound adapter at all."""
    found, peft_config = find_file(path)
    _check_dtypes(found)
    raw, header = read_safetensors(found)
    findings = Findings()
    modules, leaves = _by_module(raw, findings)
    dialect = _dialect(found, leaves, header, modules, findings)
    _check_values(found, raw)
    description = read_description(found, header)
    read = _place(modules, description, findings)
    prefix = names.denoiser_prefix(modules, read.parameters)
    peft_named = any(leaf.dialect == "PEFT" for leaf in leaves)
    config = config_of(found, read.parameters, peft_named, header, prefix, description, peft_config, alpha)
    for layer, held in read.parameters.items():
        if "unscaled_magnitude" in held and config.scale_of(layer) == 1:  # ai-toolkit's norm is DoRA's, then
            held["magnitude"] = held.pop("unscaled_magnitude")
    kept = set(read.written.values())
    file = AdapterFile(
        path=found,
        prefix=prefix,
        config=config,
        tensors={f"{layer}.{p}": t for layer, held in read.parameters.items() for p, t in held.items() if p != "alpha"},
        description=description,
        dialect=dialect,
        header=header,
        written=read.written,
        flat=frozenset(read.flat),
        notes=tuple(dict.fromkeys(read.notes)),
        left_out=tuple(key for key in raw if (split := split_key(key)) is None or split[0] not in kept),
    )
    return file, findings


@dataclass
class _Read:
    """The sound modules of a file at their layers."""

    parameters: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    flat: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def _check_dtypes(path: Path) -> None:
    wrong = [
        f"{name} ({dtype})"
        for name, (dtype, _) in read_header(path).tensors.items()
        if dtype not in FLOATS and not (dtype in WHOLE_NUMBERS and name.endswith(".alpha"))
    ]
    if wrong:
        raise AdapterFileError(
            f"{path} holds numbers of a kind that no adapter has: {some(wrong)}. It is read in float32, float16, "
            "bfloat16 or float64: write it again in one of these."
        )


def _by_module(raw: Mapping[str, Tensor], findings: Findings) -> tuple[dict[str, dict[str, Tensor]], set[Leaf]]:
    modules: dict[str, dict[str, Tensor]] = {}
    leaves: set[Leaf] = set()
    foreign: set[str] = set()  # modules of a method that is not read: what else they have is none of ours
    for key, tensor in raw.items():
        split = split_key(key)
        if split is None:
            end = next((end for end in NOT_READ if key.endswith("." + end)), None)
            findings.unexpected.append(key + (f": {NOT_READ[end]}, which is not read here" if end else ""))
            foreign |= {key.removesuffix(f".{end}")} if end else set()
            continue
        module, leaf = split
        leaves.add(leaf)
        held = modules.setdefault(module, {})
        if leaf.holds in held:
            findings.unexpected.append(f"{key}: {module} has its {leaf.holds} twice")
        held[leaf.holds] = tensor
    for module in foreign & modules.keys():
        if not modules[module].keys() & {"lora_A", "lora_B", "difference"}:
            del modules[module]
    return modules, leaves


def _dialect(
    path: Path, leaves: set[Leaf], header: Mapping[str, str], modules: Mapping[str, object], findings: Findings
) -> str:
    if not modules:
        raise AdapterFileError(
            f"{path} is no adapter that this version reads: {some(findings.unexpected) or 'it has no tensors'}. "
            "Give a LoRA or DoRA file of PEFT, diffusers, kohya, LyCORIS, OneTrainer, ai-toolkit or NVlabs, or "
            "differences."
        )
    try:
        return dialect_of(
            leaves, header, prefixed=any(module.startswith(tuple(names.DOTTED_PREFIXES)) for module in modules)
        )
    except ValueError as error:
        raise AdapterFileError(
            f"{path} mixes two dialects, {error}: no program reads both. It was put together from two files; "
            "convert each by itself."
        ) from error


def _check_values(path: Path, raw: Mapping[str, Tensor]) -> None:
    # A NaN is not within any range; min and max pass it on.
    broken = [k for k, t in raw.items() if t.numel() and not (t.abs().max().item() <= SOUND_RANGE)]
    if broken:
        raise AdapterFileError(
            f"{path} holds values that are not finite, in {some(broken)}. Its training went wrong: "
            "use an earlier checkpoint, or train again with a lower learning rate."
        )


def _place(modules: Mapping[str, dict[str, Tensor]], description: Description | None, findings: Findings) -> _Read:
    """Check each module and lead it to its layer, or to several where it was fused."""
    read = _Read()
    findings.total = len(modules)
    flux, flux2 = names.is_flux(modules), is_flux2(_linear_shapes(modules))
    n = (description.base.layers_per_block if description else None) or 2
    for module, held in modules.items():
        missing, misshapen = check_module(held)
        findings.missing += [f"{module}: {what}" for what in missing]
        findings.misshapen += [f"{module}: {what}" for what in misshapen]
        if missing or misshapen:
            continue
        tensors, notes = one_form(held)
        read.notes += notes
        located = names.locate(module, flux=flux, flux2=flux2, layers_per_block=n)
        problem = cannot_fall_apart(tensors, [part.rows for part in located.parts])
        taken = [part.layer for part in located.parts if part.layer in read.parameters]
        if problem:
            findings.misshapen.append(f"{module}: {problem}")
        elif taken:
            findings.unexpected.append(f"{module}: the layer {taken[0]} is there already, as {read.written[taken[0]]}")
        else:
            for part in located.parts:
                read.parameters[part.layer] = {p: cut(p, tensor, part.rows) for p, tensor in tensors.items()}
                read.written[part.layer] = module
                read.flat |= {part.layer} if located.flat else set()
    _check_evenness(read, findings)
    return read


def _linear_shapes(modules: Mapping[str, Mapping[str, Tensor]]) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the modules that are linear and whole."""
    shapes = {}
    for module, held in modules.items():
        first, last = (held.get(p, held.get("difference")) for p in ("lora_B", "lora_A"))
        if first is not None and last is not None and first.dim() == last.dim() == 2:
            shapes[module] = (first.shape[0], last.shape[1])
    return shapes


def _check_evenness(read: _Read, findings: Findings) -> None:
    """A DoRA has a magnitude in every layer of a model; a layer without one has lost it."""
    for component in {_component(layer) for layer in read.parameters}:
        layers = [layer for layer in read.parameters if _component(layer) == component]
        low_rank = [layer for layer in layers if "lora_A" in read.parameters[layer]]
        without = [layer for layer in low_rank if not any("magnitude" in p for p in read.parameters[layer])]
        if without and len(without) < len(low_rank):
            findings.missing += [f"{read.written[layer]}: its magnitude" for layer in without]
            for layer in without:
                del read.parameters[layer], read.written[layer]


def _component(layer: str) -> str:
    first = layer.partition(".")[0]
    return first if first in names.TEXT_ENCODERS else ""
