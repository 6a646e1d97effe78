"""Updates that other programs' files hold and layers.py does not: found in the world, read here, not trained here.

Each is computed as its writer computed it, never approximated by another; all add up with the rest through
`AdaptedLayer`, as W0 + w (W' - W0). `update_class` picks the class by the parameters that a file has for a layer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.adapters.frozen import FrozenLayer, device_of
from dora_diffusion.adapters.layers import DoRAUpdate, InputAxisDoRAUpdate, LoRAUpdate

__all__ = ["DifferenceUpdate", "UnscaledNormDoRAUpdate", "update_class"]


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


class DifferenceUpdate(LoRAUpdate):
    """The whole W' - W0, as `.diff` files hold it: difference in the shape of the weight, no rank, no scale."""

    def __init__(
        self,
        frozen: FrozenLayer,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.frozen = frozen
        self.scale = 1.0
        self.strength = 1.0
        self.dropout = nn.Dropout(0.0)
        device = device_of(frozen.module)
        self.difference = nn.Parameter(torch.zeros(frozen.out_features, *frozen.in_shape, device=device))

    @property
    def rank(self) -> int:
        return min(self.difference.flatten(1).shape)

    def forward(self, x: Tensor, y0: Tensor) -> Tensor:
        D = self.difference.to(x.dtype)
        if isinstance(self.frozen.module, nn.Conv2d):
            return self.frozen.module._conv_forward(x, D, None)
        return F.linear(x, D)

    def direction(self) -> Tensor:
        return self.difference.detach().float()


LOW_RANK = ("lora_A", "lora_B")
_CLASSES: dict[frozenset[str], type[LoRAUpdate]] = {
    frozenset(LOW_RANK): LoRAUpdate,
    frozenset({*LOW_RANK, "magnitude"}): DoRAUpdate,
    frozenset({*LOW_RANK, "input_magnitude"}): InputAxisDoRAUpdate,
    frozenset({*LOW_RANK, "unscaled_magnitude"}): UnscaledNormDoRAUpdate,
    frozenset({"difference"}): DifferenceUpdate,
}


def update_class(parameters: Iterable[str]) -> type[LoRAUpdate]:
    """The update that has exactly these parameters."""
    return _CLASSES[frozenset(parameters)]
