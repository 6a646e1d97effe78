"""Updates of every form that files hold, as one table; parametrisations.py says which of them are trained here too.

Each is computed as its writer computed it, never approximated by another; all add up with the rest through
`AdaptedLayer`, as W0 + w (W' - W0). `update_class` picks the class by the parameters that a file has for a layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache

import torch
from torch import Tensor

from dora_diffusion.adapters.fellows import SharedNormDoRAUpdate
from dora_diffusion.adapters.glora import GLoRAUpdate
from dora_diffusion.adapters.ia3 import IA3InputUpdate, IA3OutputUpdate
from dora_diffusion.adapters.input_rotation import InputRotationUpdate
from dora_diffusion.adapters.layers import DoRAUpdate, InputAxisDoRAUpdate, LoRAUpdate
from dora_diffusion.adapters.loha import LoHaUpdate
from dora_diffusion.adapters.lokr import LoKrPartUpdate, LoKrUpdate
from dora_diffusion.adapters.orthogonal import BOFTUpdate, OFTUpdate
from dora_diffusion.adapters.whole import BiasUpdate, DifferenceUpdate, ReplacementUpdate

__all__ = [
    "LOHA",
    "LOKR_W1",
    "LOKR_W2",
    "LOW_RANK",
    "UnscaledNormDoRAUpdate",
    "decomposed",
    "update_class",
    "update_of",
]


class UnscaledNormDoRAUpdate(DoRAUpdate):
    """ai-toolkit's: W' = W0 + s B A + (m / n - 1) (W0 + B A), n = ||W0 + B A|| per output, without s.

    The same as DoRA where s = 1, which it is in all files with alpha = rank. unscaled_magnitude [out].
    """

    magnitude_name = "unscaled_magnitude"

    def _fresh_norm(self) -> Tensor:
        return (self.frozen.dense_weight() + self.direction() / self.scale).flatten(1).norm(dim=1)

    def forward(self, x: Tensor, y0: Tensor) -> Tensor:
        low_rank = self.low_rank(x)
        excess = self.frozen.per_output(self.ratio() - 1).to(y0.dtype)
        return low_rank + excess * (y0 + low_rank / self.scale)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        W0, sBA = self.frozen.dense_weight(), self.direction()
        g = self.ratio().reshape(-1, *(1,) * (W0.dim() - 1))
        return sBA + (g - 1) * (W0 + sBA / self.scale)


LOW_RANK = ("lora_A", "lora_B")
BIAS = "bias_difference"  # which any form may have beside it
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
LOKR_W1 = (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
LOKR_W2 = (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"), ("lokr_w2_a", "lokr_w2_b", "lokr_t2"))
MAGNITUDES: dict[str, type[DoRAUpdate]] = {
    update.magnitude_name: update
    for update in (DoRAUpdate, InputAxisDoRAUpdate, UnscaledNormDoRAUpdate, SharedNormDoRAUpdate)
}
# By the parameters that a layer's update has beside a magnitude; of some there are several sets.
_FORMS: dict[frozenset[str], type[LoRAUpdate]] = {
    frozenset(LOW_RANK): LoRAUpdate,
    frozenset({"difference"}): DifferenceUpdate,
    frozenset({"replacement"}): ReplacementUpdate,
    frozenset(): BiasUpdate,
    **{frozenset({*LOHA, *cores}): LoHaUpdate for cores in ((), ("hada_t1", "hada_t2"))},
    **{frozenset({*w1, *w2}): LoKrUpdate for w1 in LOKR_W1 for w2 in LOKR_W2},
    **{frozenset({*w1, *w2, "rows"}): LoKrPartUpdate for w1 in LOKR_W1 for w2 in LOKR_W2},
    frozenset({"a1", "a2", "b1", "b2"}): GLoRAUpdate,
    frozenset({"oft_R"}): InputRotationUpdate,
    frozenset({"oft_R", "oft_scaled"}): InputRotationUpdate,
    frozenset({"output_factor"}): IA3OutputUpdate,
    frozenset({"input_factor"}): IA3InputUpdate,
}
_TURNS = (frozenset({"oft_blocks", "constraint"}), frozenset({"oft_blocks", "constraint", "rescale"}))


def update_of(tensors: Mapping[str, Tensor]) -> type[LoRAUpdate]:
    """The update that has exactly these parameters, and maybe a bias_difference beside them."""
    if tensors.keys() - {BIAS} in _TURNS:
        return BOFTUpdate if tensors["oft_blocks"].dim() == 4 else OFTUpdate
    return update_class(tensors)


def update_class(parameters: Iterable[str]) -> type[LoRAUpdate]:
    """The update whose parameters have exactly these names."""
    names = frozenset(parameters) - {BIAS}
    magnitudes = names & MAGNITUDES.keys()
    return decomposed(_FORMS[names - magnitudes], next(iter(magnitudes), None))  # type: ignore[arg-type]


@cache
def decomposed(form: type[LoRAUpdate], magnitude: str | None) -> type[LoRAUpdate]:
    """The form with a magnitude of this name: W' = (m / n) (W0 + dW) for any dW."""
    if magnitude is None:
        return form
    decomposition = MAGNITUDES[magnitude]
    return (
        decomposition
        if form is LoRAUpdate
        else type(f"{decomposition.__name__}Of{form.__name__}", (decomposition, form), {})
    )
