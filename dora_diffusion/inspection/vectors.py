"""Changes of biases and of normalisation layers: what a file means by them, and what a program makes of them.

`Program.vectors` says which of their keys it reads; the rest is alike: the strength times the difference, beside any
magnitude, and nothing where the layer has no bias.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dora_diffusion.adapters.injection import Adapter
from dora_diffusion.adapters.layers import LoRAUpdate
from dora_diffusion.adapters.whole import BiasUpdate, ReplacementUpdate
from dora_diffusion.formats.anatomy import model_of
from dora_diffusion.inspection.formula import scale_of
from dora_diffusion.inspection.programs import Program
from dora_diffusion.inspection.reading import FileModule

__all__ = ["changes_vectors", "is_of_bias_alone", "program_bias", "true_bias", "unknown"]


def changes_vectors(adapter: Adapter) -> bool:
    """Whether the file changes biases or normalisation layers, or holds weights that stand in the base's place."""
    return any(
        u.bias_difference is not None or not u.frozen.in_shape or isinstance(u, ReplacementUpdate)
        for u in adapter.updates().values()
    )


def unknown(program: Program, adapter: Adapter, keys: Iterable[str]) -> str:
    """Why it is not known what the program makes of this file's biases and norms; empty where it is known."""
    if not changes_vectors(adapter):
        return ""
    whole = any(isinstance(update, ReplacementUpdate) for update in adapter.updates().values())
    if whole and (program.asked or not any(key.endswith(".set_weight") for key in keys)):
        return "not known here: what it makes of norms that a file has whole"
    known = program.vectors is not None and model_of(type(adapter.model).__name__) in program.vectors_of
    if not known and not program.asked:
        return "not known here: what it makes of changes of biases and of normalisation layers"
    return ""


def is_of_bias_alone(updates: Iterable[LoRAUpdate]) -> bool:
    return all(isinstance(update, BiasUpdate) for update in updates)


def true_bias(updates: Sequence[LoRAUpdate]) -> Tensor | None:
    """What is added to the bias of these layers, one after the other [out]; None where it is left as it is."""
    if all(update.bias_difference is None for update in updates):
        return None
    zeros = (torch.zeros(update.frozen.out_features) for update in updates)
    held = [z if u.bias_difference is None else u.bias_difference.detach() for u, z in zip(updates, zeros)]
    return torch.cat([tensor.double().cpu() for tensor in held])


def program_bias(
    program: Program,
    module: FileModule,
    has_bias: bool,
    strength: float,
    header_scale: float | None,
    by_other_name: bool,
) -> Tensor:
    """What the program adds to the bias [out] in the file's rows; a number, 0, where it adds nothing.

    `by_other_name` says that the module goes by diffusers' name of what is turned or a part in the checkpoint.
    Raises DoesNotFit where the program's own code would fail.
    """
    nothing = torch.zeros(())
    if module.scaled_bias is not None:
        return strength * scale_of(program, module, header_scale) * module.scaled_bias.double()
    b = module.bias
    if b is None or not has_bias or (program.loses_biases_of_parts and by_other_name):
        return nothing
    if program.biases_of_differences and module.difference is None:
        return nothing
    return strength * b.double()
