"""What an adapter file means for each of its modules: the update of its layers, in the rows that the file has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dora_diffusion.adapters.injection import Adapter
from dora_diffusion.formats.anatomy import Anatomy, model_of
from dora_diffusion.formats.names import locate
from dora_diffusion.formats.original import TRANSFORMERS, WHOLE
from dora_diffusion.formats.original import Part as Piece
from dora_diffusion.inspection.programs import Program
from dora_diffusion.inspection.vectors import is_of_bias_alone, true_bias

__all__ = ["TrueUpdate", "is_part", "is_swapped", "pieces_of", "true_update"]


@dataclass(frozen=True)
class TrueUpdate:
    """What the file means for one module of it: W0, W' - W0 and what is added to the bias, in the file's rows."""

    weight: Tensor
    delta: Tensor
    bias: Tensor | None = None
    of_bias_alone: bool = False
    has_bias: bool = False

    def cut(self, piece: Piece) -> TrueUpdate:
        """The piece's own rows."""
        bias = None if self.bias is None else piece.rows.cut(self.bias)
        return replace(self, weight=piece.rows.cut(self.weight), delta=piece.rows.cut(self.delta), bias=bias)


def pieces_of(name: str, anatomy: Anatomy, adapter: Adapter) -> tuple[Piece, ...]:
    """The adapter's layers that a file's module of this name is; none for what is no layer."""
    return tuple(piece for piece in locate(name, anatomy).parts if piece.layer in adapter.layers)


def true_update(pieces: tuple[Piece, ...], adapter: Adapter) -> TrueUpdate:
    """The true update of a file's module, its layers put together again in the file's rows."""
    updates = [adapter.updates()[piece.layer] for piece in pieces]
    weights = [update.frozen.dense_weight().double() for update in updates]
    bias, has_bias = true_bias(updates), all(update.frozen.has_bias for update in updates)
    alone = is_of_bias_alone(updates)
    deltas = [update.delta_weight().double() for update in updates]
    if pieces[0].rows.swapped:  # changing places twice changes nothing
        return TrueUpdate(weights[0], deltas[0], bias, alone, has_bias).cut(pieces[0])
    return TrueUpdate(torch.cat(weights), torch.cat(deltas), bias, alone, has_bias)


def is_swapped(program: Program, pieces: Sequence[Piece], adapter: Adapter) -> bool:
    """Whether the program turns round the halves of this module's B A, which has the name and the rows of diffusers."""
    last = getattr(getattr(adapter.model, "config", None), "num_layers", 0) - 1
    names = program.swaps.get(model_of(type(adapter.model).__name__), ())
    return not pieces[0].rows.swapped and pieces[0].layer in {name.format(last=last) for name in names}


def is_part(pieces: Sequence[Piece], adapter: Adapter) -> bool:
    """Whether this module goes by diffusers' name of a layer that is a part of one in the checkpoint."""
    model, [piece, *others] = TRANSFORMERS.get(model_of(type(adapter.model).__name__)), pieces
    if model is None or others or piece.rows != WHOLE:
        return False
    return model.original(piece.layer) is None and model.has(piece.layer)
