"""Updates whose W' - W0 is made whole from a few tensors, and not as B A: what LoHa, LoKr and others have in common.

With a magnitude W' = (m / n) (W0 + dW) holds for any dW, so `DoRAUpdate` goes before each of them as it does before
`LoRAUpdate` (`variants.py` joins them). A form says what dW is; one that has a cheaper way to x dW^T or to the norms
than through the whole matrix says that too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dora_diffusion.adapters.frozen import FrozenLayer
from dora_diffusion.adapters.layers import LoRAUpdate

__all__ = ["BiasUpdate", "DifferenceUpdate", "ReplacementUpdate", "WholeUpdate"]


class WholeUpdate(LoRAUpdate):
    """W' - W0 = s dW, with dW in the shape of the weight."""

    @staticmethod
    def start(frozen: FrozenLayer, rank: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        raise NotImplementedError("this form is read from files and not trained")

    def product(self) -> Tensor:
        """s dW in the shape of the weight, float32, differentiable in the parameters."""
        raise NotImplementedError

    def low_rank(self, x: Tensor) -> Tensor:
        """s x dW^T: [..., in] to [..., out]."""
        with torch.autocast(x.device.type, enabled=False):  # rounded once, when it is whole
            D = self.product()
        return self.frozen.whole(x, D.to(x.dtype))

    def direction(self) -> Tensor:
        with torch.no_grad(), torch.autocast(next(self.parameters()).device.type, enabled=False):
            return self.product().detach()

    def norms(self, base_squared: Tensor, by_input: bool) -> Tensor:
        W0, D = self.frozen.dense_weight(), self.direction()
        grown = torch.addcmul(D * D, W0, D, value=2)  # so that where D is 0 the norm is the base's to the bit
        grown = (grown.transpose(0, 1) if by_input else grown).flatten(1).sum(1)
        return (base_squared + grown).clamp_min_(0).sqrt_()


class DifferenceUpdate(WholeUpdate):
    """The whole W' - W0, as `.diff` files hold it: difference in the shape of the weight, no rank, no scale."""

    @staticmethod
    def start(frozen: FrozenLayer, rank: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        return {"difference": torch.zeros(frozen.out_features, *frozen.in_shape)}

    @property
    def rank(self) -> int:
        D = self.get_parameter("difference")
        return 1 if D.dim() == 1 else min(D.flatten(1).shape)

    def product(self) -> Tensor:
        return self.get_parameter("difference")


class ReplacementUpdate(WholeUpdate):
    """A weight that stands in the place of the base's, whatever that is: W' itself, replacement in its shape.

    As FLUX's control adapters have the weights of their norms, and ComfyUI writes `set_weight`.
    """

    @property
    def rank(self) -> int:
        W = self.get_parameter("replacement")
        return 1 if W.dim() == 1 else min(W.flatten(1).shape)

    def product(self) -> Tensor:
        return self.get_parameter("replacement") - self.frozen.dense_weight()


class BiasUpdate(WholeUpdate):
    """W' = W0: an update of a layer's bias alone, bias_difference [out]."""

    @property
    def rank(self) -> int:
        return 1

    def product(self) -> Tensor:
        device = self.get_parameter("bias_difference").device
        return torch.zeros(self.frozen.out_features, *self.frozen.in_shape, device=device)

    def forward(self, x: Tensor, y0: Tensor) -> Tensor:
        return y0.new_zeros(())
