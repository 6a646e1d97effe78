"""What an adapter is in effect, which only the base tells: magnitudes that are none, and updates that do nothing.

A DoRA whose magnitudes are ||W0|| has those that training starts from: they were not trained, or not kept, as in the
fused formats of OneTrainer before August 2026 (OneTrainer#1666). One whose magnitudes are ||W0 + dW|| is a plain LoRA:
the factor m / n is 1. Both are told within the rounding of the file's dtype; where dW is so small that it could be
either, nothing is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dora_diffusion.adapters.fellows import SharedNormDoRAUpdate
from dora_diffusion.adapters.layers import DoRAUpdate, InputAxisDoRAUpdate, LoRAUpdate
from dora_diffusion.adapters.variants import UnscaledNormDoRAUpdate
from dora_diffusion.formats.storage import read_safetensors
from dora_diffusion.inspection.parity import attached
from dora_diffusion.models.loading import Base

__all__ = ["Effect", "effect_notes", "effect_of"]

Effect = Literal["nothing", "untrained magnitude", "plain", ""]
LEAST = 1e-4  # what float32 and a base in half precision leave of a norm


@torch.no_grad()
def effect_of(update: LoRAUpdate, tolerance: float) -> Effect:
    """What this update is in effect, its numbers being known to a relative `tolerance`."""
    if not isinstance(update, DoRAUpdate):
        return "" if update.delta_weight().any() else "nothing"
    if isinstance(update, UnscaledNormDoRAUpdate):
        return ""
    m, n, n0 = update.get_parameter(update.magnitude_name).double(), update.norm().double(), _base_norms(update)
    if not update.direction().any():
        return "nothing" if _same(m, n0, tolerance) else ""
    is_start, is_plain = _same(m, n0, tolerance), _same(m, n, tolerance)
    if is_start == is_plain:  # neither, or an update too small to tell
        return ""
    return "untrained magnitude" if is_start else "plain"


def _same(m: Tensor, norms: Tensor, tolerance: float) -> bool:
    return bool(((m - norms).abs() <= tolerance * norms.abs().clamp_min(1e-12)).all())


def _base_norms(update: DoRAUpdate) -> Tensor:
    """||W0|| along the magnitude's axis, over all parts of a fused layer where they share a norm."""
    parts = update.fellows if isinstance(update, SharedNormDoRAUpdate) else (update,)
    axis = 1 if isinstance(update, InputAxisDoRAUpdate) else 0
    weights = (part.frozen.dense_weight().detach().double().transpose(0, axis).flatten(1) for part in parts)
    return torch.stack([weight.square().sum(dim=1) for weight in weights]).sum(dim=0).sqrt()


_SAID: Mapping[Effect, str] = {
    "nothing": "do nothing: their update is zero{start}",
    "untrained magnitude": (
        "have magnitudes that are ||W0||, those that a DoRA starts from: they were not trained, or not kept (as in "
        "OneTrainer's fused formats before August 2026, OneTrainer#1666), so that this is no trained DoRA"
    ),
    "plain": "have magnitudes that are ||W0 + dW||, so that each is a plain LoRA in effect",
}


def effect_notes(path: Path, base: Base, partial: bool = False) -> Iterator[str]:
    """What is worth saying of an adapter on this base. Raises AdapterFileError, AdapterMismatchError."""
    tolerance = max(LEAST, _rounding(path))
    with attached(base, path, partial) as adapter:
        updates = adapter.updates()
        counts = Counter(effect_of(update, tolerance) for update in updates.values())
        decomposed = any(isinstance(update, DoRAUpdate) for update in updates.values())
    for effect, said in _SAID.items():
        if counts[effect]:
            start = " and the magnitudes ||W0||" if decomposed else ""
            how_many = "all" if counts[effect] == len(updates) else f"{counts[effect]} of {len(updates)}"
            yield f"{how_many} layers {said.format(start=start)}"


def _rounding(path: Path) -> float:
    """The largest relative error of a number in the file, by the coarsest dtype that its magnitudes have."""
    tensors, _ = read_safetensors(path)
    dtypes = {t.dtype for t in tensors.values() if t.is_floating_point() and t.numel() > 1}
    return max((torch.finfo(dtype).eps / 2 for dtype in dtypes), default=0.0)
