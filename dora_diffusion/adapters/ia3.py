"""(IA)^3: each output, or each input, of a layer by a factor of its own (Liu et al. 2022; LyCORIS)."""

from __future__ import annotations

from torch import Tensor

from dora_diffusion.adapters.whole import WholeUpdate

__all__ = ["IA3InputUpdate", "IA3OutputUpdate"]


class IA3OutputUpdate(WholeUpdate):
    """W' = (1 + w) W0 by output: output_factor w [out]."""

    @property
    def rank(self) -> int:
        return 1

    def forward(self, x: Tensor, y0: Tensor) -> Tensor:
        return self.frozen.per_output(self.get_parameter("output_factor")).to(y0.dtype) * y0

    def product(self) -> Tensor:
        W0 = self.frozen.dense_weight()
        return self.get_parameter("output_factor").reshape(-1, *(1,) * (W0.dim() - 1)) * W0


class IA3InputUpdate(WholeUpdate):
    """W' = W0 (1 + w) by input: input_factor w [in]."""

    @property
    def rank(self) -> int:
        return 1

    def forward(self, x: Tensor, y0: Tensor) -> Tensor:
        return self.frozen.unbiased(self.frozen.per_input(self.get_parameter("input_factor")).to(x.dtype) * x)

    def product(self) -> Tensor:
        W0 = self.frozen.dense_weight()
        return self.get_parameter("input_factor").reshape(1, -1, *(1,) * (W0.dim() - 2)) * W0
