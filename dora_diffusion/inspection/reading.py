"""What a program finds in a file: the keys it reads, grouped by module, and the keys it drops."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from dora_diffusion.formats.anatomy import Anatomy
from dora_diffusion.formats.names import locate
from dora_diffusion.formats.original import Part as Piece
from dora_diffusion.inspection.directions import ENDINGS, form_of
from dora_diffusion.inspection.programs import Program
from dora_diffusion.inspection.spelling import Names

__all__ = ["FileModule", "Reading", "is_magnitude", "read_as", "split_key"]

# Every ending that some dialect uses, the longest first, so that a module's name ends where its parameter's begins.
_ENDINGS = sorted(
    (
        *("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "diff", "diff_b"),
        *("lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_B.default.weight", "lora_A", "lora_B"),
        *("lora.down.weight", "lora.up.weight", "lora_magnitude_vector.weight", "lora_magnitude_vector"),
        *("w_norm", "b_norm", "set_weight", "lora_B.bias"),
        *("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        *("magnitude", "weight_m_wdecomp.weight"),
        *(ending for form in ENDINGS.values() for ending in form if ending != "weight"),
    ),
    key=len,
    reverse=True,
)
_PARTS = ("down", "up", "core", "magnitude", "difference", "bias", "scaled_bias", "replacement")
_JOINED = ("_lora.down.weight", "_lora.up.weight")


@dataclass(frozen=True)
class FileModule:
    """What a program took from a file for one module; `pieces` are its layers in diffusers, and their rows in it.

    `untrained` says that the program makes a magnitude of its own, ||W0||, and loses the file's. `others` are the
    tensors of a form that is not B A, by the endings of their keys. `scaled_bias` is B's own, which s multiplies too;
    `of_norm` says that the difference has LyCORIS's name for a norm's.
    """

    name: str
    pieces: tuple[Piece, ...]
    down: Tensor | None = None
    up: Tensor | None = None
    core: Tensor | None = None
    alpha: float | None = None
    magnitude: Tensor | None = None
    difference: Tensor | None = None
    replacement: Tensor | None = None
    bias: Tensor | None = None
    scaled_bias: Tensor | None = None
    of_norm: bool = False
    untrained: bool = False
    others: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        whole = (self.difference, self.replacement, self.bias)
        return any(tensor is not None for tensor in whole) or bool(self.form)

    @property
    def form(self) -> str:
        """lora, or what else it is; empty for a difference, and for what is not whole."""
        return form_of(self.others) or ("lora" if self.down is not None and self.up is not None else "")


@dataclass(frozen=True)
class Reading:
    """The modules that a program takes up, the endings of the keys that it drops with their number, and why it gave up
    on the whole file, if it did. `by_layer`: the modules are the model's layers by their names, not the file's."""

    modules: tuple[FileModule, ...]
    dropped: Mapping[str, int] = field(default_factory=dict)
    refused: str = ""
    by_layer: bool = False


def split_key(key: str) -> tuple[str, str]:
    """A key's module and its ending: `lora_unet_x.alpha` is `lora_unet_x` and `alpha`.

    Old diffusers joined the two with an underscore: `to_q_lora.down.weight` is `to_q` and `_lora.down.weight`.
    """
    for joined in _JOINED:
        if key.endswith(joined):
            return key[: -len(joined)], joined
    for ending in _ENDINGS:
        if key.endswith("." + ending):
            return key[: -len(ending) - 1], ending
    module, _, ending = key.rpartition(".")
    return module, ending


def is_magnitude(ending: str) -> bool:
    return ending == "dora_scale" or "magnitude" in ending or ending == "weight_m_wdecomp.weight"


def read_as(program: Program, tensors: Mapping[str, Tensor], anatomy: Anatomy) -> Reading:
    """What the program reads of a file with these tensors, for a base with this anatomy."""
    names = Names(anatomy)
    if program.alone and 0 < sum(key.startswith(program.alone) for key in tensors) < len(tensors):
        return Reading((), {}, f"refuses the file: some of its keys begin with {program.alone}, and some do not")
    found: dict[str, dict[str, Tensor]] = {}
    untrained: set[str] = set()
    dropped: Counter[str] = Counter()
    parts_read = {**program.parts, **(program.vectors or {})}
    for key, tensor in tensors.items():
        module, ending = split_key(key)
        part = parts_read.get(ending)
        spelling = next((s for s in program.spellings if s.finds(module, names)), None)
        if part is not None and spelling is not None and ending not in spelling.lost:
            is_row = part == "magnitude by output" and tensor.dim() == 1
            name = part.removesuffix(" by output")
            found.setdefault(module, {})[name] = tensor.reshape(-1, 1) if is_row else tensor
            continue
        if program.strict and re.fullmatch(program.strict, module) and ending != "dora_scale":
            return Reading((), {ending: 1}, f"refuses the file: it does not know the key {key!r}")
        dropped[ending] += 1
        if part == "magnitude" and spelling is not None:
            untrained.add(module)
    modules = []
    for module, parts in found.items():
        pieces = locate(module, anatomy).parts
        of_norm = _join_norm(parts, dropped)
        alpha = parts.pop("alpha", None)
        scale = None if alpha is None else float(alpha)
        others = {part: parts.pop(part) for part in list(parts) if part not in _PARTS}
        others_held = {"untrained": module in untrained, "others": others, "of_norm": of_norm}
        made = FileModule(module, pieces, alpha=scale, **others_held, **parts)  # type: ignore[arg-type]
        if made.complete and (made.form in ("", "lora") or made.form in program.forms):
            modules.append(made)
            if made.magnitude is not None and made.form and made.form not in program.decomposes:
                return Reading((), {}, f"refuses the file: it has no magnitudes of a {made.form} ({module})")
        else:
            dropped.update(parts.keys() | others.keys())
    if dropped and 1 - sum(dropped.values()) / len(tensors) < program.least:
        return Reading((), dict(dropped), "takes none of a file of which it does not know half of the keys")
    return Reading(tuple(modules), dict(dropped))


def _join_norm(parts: dict[str, Tensor], dropped: Counter[str]) -> bool:
    """A norm's difference as any other, and whether there is one; that of its bias is looked for beside it alone."""
    bias = parts.pop("norm_bias", None)
    if "norm" in parts:
        parts.setdefault("difference", parts.pop("norm"))
        if bias is not None:
            parts.setdefault("bias", bias)
        return True
    if bias is not None:
        dropped["b_norm"] += 1
    return False
