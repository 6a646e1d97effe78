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
from dora_diffusion.inspection.programs import Program

__all__ = ["FileModule", "Reading", "is_magnitude", "read_as", "split_key"]

# Every ending that some dialect uses, the longest first, so that a module's name ends where its parameter's begins.
_ENDINGS = sorted(
    (
        *("lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale", "diff", "diff_b"),
        *("lora_A.weight", "lora_B.weight", "lora_A.default.weight", "lora_B.default.weight", "lora_A", "lora_B"),
        *("lora.down.weight", "lora.up.weight", "lora_magnitude_vector.weight", "lora_magnitude_vector"),
        *("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        *("magnitude", "weight_m_wdecomp.weight"),
    ),
    key=len,
    reverse=True,
)
_JOINED = ("_lora.down.weight", "_lora.up.weight")


@dataclass(frozen=True)
class FileModule:
    """What a program took from a file for one module; `pieces` are its layers in diffusers, and their rows in it.

    `untrained` says that the program makes a magnitude of its own, ||W0||, and loses the file's.
    """

    name: str
    pieces: tuple[Piece, ...]
    down: Tensor | None = None
    up: Tensor | None = None
    core: Tensor | None = None
    alpha: float | None = None
    magnitude: Tensor | None = None
    difference: Tensor | None = None
    untrained: bool = False

    @property
    def complete(self) -> bool:
        return self.difference is not None or (self.down is not None and self.up is not None)


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
    spellings = [(re.compile(s.pattern), s) for s in program.spellings if anatomy.model in s.models]
    found: dict[str, dict[str, Tensor]] = {}
    untrained: set[str] = set()
    dropped: Counter[str] = Counter()
    for key, tensor in tensors.items():
        module, ending = split_key(key)
        part = program.parts.get(ending)
        spelling = next((s for pattern, s in spellings if pattern.fullmatch(module)), None)
        if part is not None and spelling is not None and ending not in spelling.lost:
            found.setdefault(module, {})[part] = tensor
            continue
        if program.strict and re.fullmatch(program.strict, module) and ending != "dora_scale":
            return Reading((), {ending: 1}, f"refuses the file: it does not know the key {key!r}")
        dropped[ending] += 1
        if part == "magnitude" and spelling is not None:
            untrained.add(module)
    modules = []
    for module, parts in found.items():
        pieces = locate(module, anatomy).parts
        alpha = parts.pop("alpha", None)
        scale = None if alpha is None else float(alpha)
        made = FileModule(module, pieces, alpha=scale, untrained=module in untrained, **parts)
        if made.complete:
            modules.append(made)
    return Reading(tuple(modules), dict(dropped))
