"""Which module names a program looks up in a file: prefixes, and whose name for a layer follows them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from dora_diffusion.formats.anatomy import MODELS, Anatomy, Model
from dora_diffusion.formats.original import TRANSFORMERS

__all__ = ["EVERY", "Names", "Spelling", "Whose"]

Whose = Literal["anybody", "diffusers", "checkpoint", "old diffusers"]
EVERY: tuple[Model, ...] = MODELS


@dataclass(frozen=True)
class Spelling:
    """Module names that a program looks up: one of `prefixes`, and then `whose` name of a layer.

    After a prefix that ends with an underscore the name has underscores for dots. `layers` is a regular expression for
    the names, with their dots, of those that it finds: without it all. `models` are the denoisers that it is for.
    `lost` are endings that it expects but does not find under these names: a magnitude then stays at its start, ||W0||.
    """

    prefixes: tuple[str, ...]
    whose: Whose = "anybody"
    models: tuple[Model, ...] = EVERY
    layers: str = ""
    lost: tuple[str, ...] = ()

    def finds(self, module: str, names: Names) -> bool:
        """Whether the program finds this module in the model that the names are of."""
        return names.model in self.models and any(
            self._is_one(module.removeprefix(prefix), prefix.endswith("_"), names)
            for prefix in self.prefixes
            if module.startswith(prefix)
        )

    def _is_one(self, rest: str, flat: bool, names: Names) -> bool:
        if self.whose == "anybody":
            return bool(re.fullmatch(self.layers, rest)) if self.layers else bool(rest)
        layer = names.dotted(self.whose, flat).get(rest)
        return layer is not None and (not self.layers or re.fullmatch(self.layers, layer) is not None)


class Names:
    """The names that the layers of a model have, in diffusers and in the original checkpoint."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.model = anatomy.model
        self._named: Mapping[Whose, Iterable[str]] = {
            "diffusers": anatomy.paths,
            "checkpoint": list(_originals(anatomy)),
            "old diffusers": anatomy.paths,
        }

    @functools.cache  # noqa: B019  (an object of one comparison)
    def dotted(self, whose: Whose, flat: bool) -> Mapping[str, str]:
        """The layers' names, by how they are written."""
        if whose == "old diffusers":
            return {_old(path): path for path in self._named[whose]}
        return {name.replace(".", "_") if flat else name: name for name in self._named[whose]}


def _old(path: str) -> str:
    """What ComfyUI takes for a layer's name in a file of old diffusers."""
    return re.sub(r"\.to_out\.0$", ".to_out", path).replace(".to_", ".processor.to_")


def _originals(anatomy: Anatomy) -> Iterable[str]:
    """The checkpoint's names of the model's layers, fused ones included."""
    if anatomy.model not in TRANSFORMERS:
        return anatomy.originals
    model = TRANSFORMERS[anatomy.model]
    numbers: dict[str, set[str]] = {}
    for path in anatomy.paths:
        if found := re.fullmatch(r"(.+?)\.(\d+)\..+", path):
            numbers.setdefault(found[1], set()).add(found[2])
    names = [*model.outside, *model.swapped]
    for (theirs, ours), table in model.blocks.items():
        inside = [*table, *model.fused.get((theirs, ours), {})]
        names += [f"{theirs}.{number}.{name}" for number in numbers.get(ours, ()) for name in inside]
    return [name for name in names if (parts := model.parts(name)) and all(p.layer in anatomy.paths for p in parts)]
