"""Updates that other programs' files hold and layers.py does not: found in the world, read here, not trained here.

Each is computed as its writer computed it, never approximated by another; all add up with the rest through
`AdaptedLayer`, as W0 + w (W' - W0). `update_class` picks the class by the parameters that a file has for a layer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.frozen import FrozenLayer, device_of
from dora_diffusion.kernels import NORM_FLOOR
from dora_diffusion.layers import DoRAUpdate, LoRAUpdate

__all__ = ["DifferenceUpdate", "InputAxisDoRAUpdate", "UnscaledNormDoRAUpdate", "update_class"]


class InputAxisDoRAUpdate(DoRAUpdate):
    """W' = V (m / ||V||) with the norm of every input's column: V = W0 + s B A, input_magnitude [in].

    What OneTrainer writes by default and what older LyCORIS files hold. A convolution's norm runs over outputs and
    kernel.
    """

    def __init__(
        self,
        frozen: FrozenLayer,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(frozen, rank, scale, dropout, generator)
        del self.magnitude
        with torch.no_grad():
            self.input_magnitude = nn.Parameter(column_norms(self._weight()))

    def _weight(self) -> Tensor:
        return dense_weight(self.frozen)

    def _fresh_norm(self) -> Tensor:
        return column_norms(self._weight() + self.direction())

    def ratio(self) -> Tensor:
        """g = m / n, [in]; 0 for a column that is zero, never NaN."""
        n = self.norm()
        return torch.where(n > NORM_FLOOR, self.input_magnitude.float() / n.clamp_min(NORM_FLOOR), 0.0)

    def per_input(self, g: Tensor) -> Tensor:
        """g [in] in a shape that multiplies the layer's input; every group of a convolution sees all of it."""
        if not isinstance(self.frozen.module, nn.Conv2d):
            return g
        return g.repeat(self.frozen.module.groups)[:, None, None]

    def forward(self, x: Tensor, y0: Tensor) -> Tensor:
        """x (W' - W0)^T = ((g - 1) x) W0^T + s (g x) A^T B^T: the columns' factors go to the input."""
        g = self.ratio()
        excess = self.per_input(g - 1).to(x.dtype)
        return self.frozen.unbiased(excess * x) + self.low_rank(self.per_input(g).to(x.dtype) * x)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        W0 = self._weight()
        g = self.ratio().reshape(1, -1, *(1,) * (W0.dim() - 2))
        return g * (W0 + self.direction()) - W0


class UnscaledNormDoRAUpdate(DoRAUpdate):
    """ai-toolkit's: W' = W0 + s B A + (m / n - 1) (W0 + B A), n = ||W0 + B A|| per output, without s.

    The same as DoRA where s = 1, which it is in all files with alpha = rank. unscaled_magnitude [out].
    """

    def __init__(
        self,
        frozen: FrozenLayer,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(frozen, rank, scale, dropout, generator)
        self.unscaled_magnitude = self.magnitude
        del self.magnitude

    def _fresh_norm(self) -> Tensor:
        return (dense_weight(self.frozen) + self.direction() / self.scale).flatten(1).norm(dim=1)

    def ratio(self) -> Tensor:
        n = self.norm()
        return torch.where(n > NORM_FLOOR, self.unscaled_magnitude.float() / n.clamp_min(NORM_FLOOR), 0.0)

    def forward(self, x: Tensor, y0: Tensor) -> Tensor:
        low_rank = self.low_rank(x)
        excess = self.frozen.per_output(self.ratio() - 1).to(y0.dtype)
        return low_rank + excess * (y0 + low_rank / self.scale)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        W0, sBA = dense_weight(self.frozen), self.direction()
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


def column_norms(weight: Tensor) -> Tensor:
    """||W|| of every input, [in]; of a convolution's kernel [out, in, kh, kw] over outputs and kernel."""
    return weight.transpose(0, 1).flatten(1).norm(dim=1)


def dense_weight(frozen: FrozenLayer) -> Tensor:
    """W0 in float32, also of a layer that keeps it packed: the identity sent through it."""
    if getattr(frozen, "is_dense", True):
        return frozen.weight.detach().float()
    return frozen.times_weight(torch.eye(frozen.in_shape[0], device=device_of(frozen.module)))


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
