"""From a file of any dialect to an `AdapterFile`: recognise, check every key, bring into one form.

Nothing is dropped in silence: a key that is missing, not expected or misshapen is named, all of them in one error.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from dora_diffusion.adapters.injection import AdapterConfig
from dora_diffusion.errors import AdapterFileError
from dora_diffusion.formats import eight_bit, kinds, names
from dora_diffusion.formats.anatomy import Anatomy
from dora_diffusion.formats.configs import read_description
from dora_diffusion.formats.content import AdapterFile, Raw
from dora_diffusion.formats.findings import Findings, counted, some
from dora_diffusion.formats.forms import forms_in
from dora_diffusion.formats.leaves import Leaf, adapter_names, dialect_of, foreign, split_keys
from dora_diffusion.formats.modules import check_module, foreign_kind, one_form
from dora_diffusion.formats.places import find_file
from dora_diffusion.formats.placing import place
from dora_diffusion.formats.storage import read_header, read_safetensors
from dora_diffusion.formats.words import Word, split_off

__all__ = ["check_adapter", "read_adapter_file", "read_what_fits", "read_with_findings", "some"]

FLOATS = ("F64", "F32", "F16", "BF16", *eight_bit.DTYPES)
WHOLE_NUMBERS = ("I64", "I32", "I16", "I8", "U8")  # some programs save alpha as one
MAY_BE_WHOLE = {
    **dict.fromkeys((".alpha", ".reshape_weight"), WHOLE_NUMBERS),
    **dict.fromkeys((".on_input", ".scaled_oft"), (*WHOLE_NUMBERS, "BOOL")),
}
SOUND_RANGE = 1e6  # no weight is near it, and products of two and their squares stay within float32


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
    file, findings = _read(path, partial, alpha)
    if findings:
        warnings.warn(f"{file.path.name}: left out: {counted(len(file.left_out))}.{findings.lines()}", stacklevel=2)
    return file


def read_what_fits(path: str | os.PathLike[str], *, partial: bool = True) -> AdapterFile:
    """`read_adapter_file` for those who say themselves what is left out (`left_out`). Raises AdapterFileError."""
    return _read(path, partial)[0]


def _read(path: str | os.PathLike[str], partial: bool, alpha: float | None = None) -> tuple[AdapterFile, Findings]:
    file, findings = read_with_findings(path, alpha=alpha)
    if findings and not (partial and file.tensors):
        raise AdapterFileError(f"{file.path} cannot be read whole.{findings.lines()}\n{findings.way_out()}")
    return file, findings


def read_with_findings(
    path: str | os.PathLike[str], *, alpha: float | None = None, anatomy: Anatomy | None = None
) -> tuple[AdapterFile, Findings]:
    """What can be read, led to the layers of a model if its anatomy is given, and what cannot.

    Raises AdapterFileError for a file that is no sound adapter at all.
    """
    found, peft_config = find_file(path)
    _check_kind(found)
    _check_dtypes(found)
    tensors, header = read_safetensors(found)
    tensors, said = _decoded(found, tensors)
    _check_one_adapter(found, tensors)
    tensors, words, loose = split_off(tensors)
    findings = Findings()
    splits = _split(tensors)
    modules, leaves = _by_module(tensors, splits, findings)
    dialect = _dialect(found, leaves, header, modules, findings)
    _check_values(found, tensors)
    sound, notes = _sound(modules, findings)
    keys = {key: split[0] if split else "" for key, split in splits.items()}
    peft_named = any(leaf.dialect == "PEFT" for leaf in leaves)
    raw = Raw(sound, keys, peft_named, peft_config, alpha, (*said, *map(_beside, words), *loose, *notes))
    file = AdapterFile(found, "unet", AdapterConfig(), {}, read_description(found, header), dialect, header, raw=raw)
    file = replace(file, words=words, beside=tuple(loose))
    return place(file, anatomy, findings), findings


def _sound(
    modules: Mapping[str, dict[str, Tensor]], findings: Findings
) -> tuple[dict[str, dict[str, Tensor]], tuple[str, ...]]:
    """The modules whose tensors go together, in one form, and what is worth saying of them."""
    findings.total = len(modules)
    sound, said = {}, []
    others = {m: kind for m, held in modules.items() if (kind := foreign_kind(held, m.startswith(names.PEFT_FOLDER)))}
    findings.add_foreign(others)
    for module, held in modules.items():
        if module in others:
            continue
        missing, misshapen = check_module(held)
        findings.missing += [f"{module}: {what}" for what in missing]
        findings.misshapen += [f"{module}: {what}" for what in misshapen]
        if not missing and not misshapen:
            sound[module], notes = one_form(held)
            said += notes
    return sound, tuple(dict.fromkeys(said))


def _check_kind(path: Path) -> None:
    if kind := kinds.file_of(read_header(path).tensors):
        raise AdapterFileError(f"{path} {kind.said()}")


def _check_dtypes(path: Path) -> None:
    wrong = [
        f"{name} ({dtype})"
        for name, (dtype, _) in read_header(path).tensors.items()
        if dtype not in (*FLOATS, *MAY_BE_WHOLE.get("." + name.rpartition(".")[2], ()))
    ]
    if wrong:
        raise AdapterFileError(
            f"{path} holds numbers of a kind that is not read here: {some(wrong)}. Adapters are read in float64, "
            "float32, float16, bfloat16 and 8-bit floats (e4m3fn, e5m2): save it again in one of these."
        )


def _decoded(path: Path, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    try:
        return eight_bit.as_float32(tensors)
    except ValueError as error:
        raise AdapterFileError(
            f"{path} is scaled to 8 bits in a way that is not read here: {error}. Get the file as it was before that, "
            "in float16 or bfloat16."
        ) from error


def _beside(word: Word) -> str:
    return f"{word} stands beside the layers: a pipeline learns it with them"


def _check_one_adapter(path: Path, keys: Collection[str]) -> None:
    found = adapter_names(keys)
    if len(found) > 1:
        raise AdapterFileError(
            f"{path} holds {len(found)} adapters in one, by the names in its keys: {some(found)}. It is the state_dict "
            "of a model with all of them in it. Save each by itself, with PEFT: "
            f"model.save_pretrained(FOLDER, selected_adapters=[{found[0]!r}])."
        )


Splits = dict[str, tuple[str, Leaf] | None]


def _split(keys: Iterable[str]) -> Splits:
    """`split_keys`, with a module's name spelt the same way in all of its keys."""
    return {key: split and (names.one_spelling(split[0]), split[1]) for key, split in split_keys(keys).items()}


def _by_module(
    raw: Mapping[str, Tensor], splits: Splits, findings: Findings
) -> tuple[dict[str, dict[str, Tensor]], set[Leaf]]:
    modules: dict[str, dict[str, Tensor]] = {}
    leaves: set[Leaf] = set()
    others: dict[str, str] = {}  # modules of a method that is not read: what else they have is none of ours
    for key, split in splits.items():
        if split is None:
            if other := foreign(key):
                others.setdefault(*other)
            else:
                findings.unexpected.append(key)
            continue
        module, leaf = split
        leaves.add(leaf)
        held = modules.setdefault(module, {})
        if leaf.holds in held:
            findings.unexpected.append(f"{key}: {module} has its {leaf.holds} twice")
        held[leaf.holds] = raw[key]
    for module in others.keys() & modules.keys():
        if not forms_in(modules[module]):
            del modules[module]
    findings.add_foreign(others)
    return modules, leaves


def _dialect(
    path: Path, leaves: set[Leaf], header: Mapping[str, str], modules: Mapping[str, object], findings: Findings
) -> str:
    if not modules:
        held = some(findings.all()) or "it has no tensors"
        raise AdapterFileError(
            f"{path} is no adapter that this version reads: {held}. "
            "Give a LoRA or DoRA file of PEFT, diffusers, kohya, LyCORIS, OneTrainer, ai-toolkit or NVlabs, another "
            "form of LyCORIS (LoHa, LoKr, GLoRA, OFT, BOFT, IA3), or differences."
        )
    try:
        return dialect_of(leaves, header, modules, names.DOTTED_PREFIXES)
    except ValueError as error:
        raise AdapterFileError(
            f"{path} mixes two dialects, {error}: no program reads both. It was put together from two files; "
            "convert each by itself."
        ) from error


def _check_values(path: Path, raw: Mapping[str, Tensor]) -> None:
    # A NaN is not within any range; min and max pass it on.
    # The alpha of two whole factors says nothing: ai-toolkit writes 1e10 there.
    whole = {f"{k.removesuffix('.lokr_w1')}.alpha" for k in raw if f"{k.removesuffix('.lokr_w1')}.lokr_w2" in raw}
    counted = {k: t if t.is_floating_point() else t.double() for k, t in raw.items() if k not in whole and t.numel()}
    broken = [k for k, t in counted.items() if not (t.abs().max().item() <= SOUND_RANGE)]
    if broken:
        raise AdapterFileError(
            f"{path} holds values that are not finite or beyond 1e6, in {some(broken)}. Its training went wrong: "
            "use an earlier checkpoint, or train again with a lower learning rate."
        )
