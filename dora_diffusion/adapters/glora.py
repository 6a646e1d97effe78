"""GLoRA: a low-rank change of the layer's input beside one of its weight (Chavan et al. 2023; LyCORIS)."""

from __future__ import annotations

import torch
from torch import Tensor

from dora_diffusion.adapters.whole import WholeUpdate

__all__ = ["GLoRAUpdate"]


class GLoRAUpdate(WholeUpdate):
    """W' - W0 = s (W0 a1 a2 + b1 b2).

    a1.weight [in, r], a2.weight [r, in] act on the input channels, b1.weight [out, r], b2.weight [r, in, ...] as B and
    A of a LoRA do (their parameters here are called a1, a2, b1, b2).
    """

    @property
    def rank(self) -> int:
        return self.get_parameter("b2").shape[0]

    def product(self) -> Tensor:
        a1, a2, b1, b2 = (self.get_parameter(name) for name in ("a1", "a2", "b1", "b2"))
        W0 = self.frozen.dense_weight()
        through_input = torch.einsum("oi...,ij->oj...", W0, a1.flatten(1) @ a2.flatten(1))
        return self.scale * (through_input + (b1.flatten(1) @ b2.flatten(1)).reshape(W0.shape))
