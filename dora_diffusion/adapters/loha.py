"""LoHa: the elementwise product of two low-rank matrices (Hyeon-Woo et al. 2022, FedPara; LyCORIS)."""

from __future__ import annotations

import torch
from torch import Tensor

from dora_diffusion.adapters.frozen import FrozenLayer
from dora_diffusion.adapters.whole import WholeUpdate

__all__ = ["LoHaUpdate"]


class LoHaUpdate(WholeUpdate):
    """W' - W0 = s (w1_a w1_b) * (w2_a w2_b), elementwise.

    hada_w1_a, hada_w2_a [out, r], hada_w1_b, hada_w2_b [r, in kh kw]. A convolution's Tucker form has cores hada_t1,
    hada_t2 [r, r, kh, kw] between w_a [r, out] and w_b [r, in].
    """

    @staticmethod
    def start(frozen: FrozenLayer, rank: int, generator: torch.Generator | None) -> dict[str, Tensor]:
        """As LyCORIS starts: the second product is zero, since its w2_a is."""
        columns = torch.Size(frozen.in_shape).numel()

        def normal(*shape: int, std: float) -> Tensor:
            return torch.empty(*shape).normal_(std=std, generator=generator)

        return {
            "hada_w1_a": normal(frozen.out_features, rank, std=0.1),
            "hada_w1_b": normal(rank, columns, std=1.0),
            "hada_w2_a": torch.zeros(frozen.out_features, rank),
            "hada_w2_b": normal(rank, columns, std=1.0),
        }

    @property
    def rank(self) -> int:
        return self.get_parameter("hada_w1_b").shape[0]

    def product(self) -> Tensor:
        dW = self._factor("1") * self._factor("2") * self.scale
        return dW.reshape(self.frozen.out_features, *self.frozen.in_shape)

    def _factor(self, which: str) -> Tensor:
        a, b = self.get_parameter(f"hada_w{which}_a"), self.get_parameter(f"hada_w{which}_b")
        core = self._parameters.get(f"hada_t{which}")
        return a @ b if core is None else torch.einsum("ijhw,ip,jr->prhw", core, a, b)
