"""OFT and BOFT: outputs turned by rotations, in blocks (Qiu et al. 2023) or in a butterfly of blocks (Liu et al. 2024).

A rotation of the outputs needs nothing of the weight: x (R W0)^T = (x W0^T) R^T. As LyCORIS writes and computes them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dora_diffusion.adapters.whole import WholeUpdate

__all__ = ["BOFTUpdate", "OFTUpdate"]


class OFTUpdate(WholeUpdate):
    """W' = c R^T W0, R block-diagonal and orthogonal by Cayley: R = (1 + Q) (1 - Q)^-1, Q = P - P^T.

    oft_blocks P [blocks, size, size]; rescale c [out], where the file has it; constraint, one number: where it is above
    0, ||Q|| is at most constraint times the number of outputs.
    """

    @property
    def rank(self) -> int:
        return self.get_parameter("oft_blocks").shape[-1]

    def rotations(self) -> Tensor:
        """R of every block, in the shape of oft_blocks."""
        P = self.get_parameter("oft_blocks")
        Q = P - P.mT
        limit = self.get_parameter("constraint") * self.frozen.out_features
        norm = Q.norm() + 1e-8
        Q = torch.where((limit > 0) & (norm > limit), Q * (limit / norm), Q)
        one = torch.eye(P.shape[-1], device=P.device)
        return (one + Q) @ torch.linalg.inv(one - Q)

    def turned(self, y: Tensor) -> Tensor:
        """Row vectors y [..., out], each with its blocks turned."""
        R = self.rotations().to(y.dtype)
        return torch.einsum("...kn,knm->...km", y.unflatten(-1, R.shape[:2]), R).flatten(-2)

    def difference(self, y: Tensor) -> Tensor:
        """c R^T y - y for row vectors y [..., out]."""
        turned, c = self.turned(y), self._parameters.get("rescale")
        return (turned if c is None else turned * c.to(y.dtype)) - y

    def forward(self, x: Tensor, y0: Tensor) -> Tensor:
        axis = self.frozen.output_axis(y0)
        return self.difference(y0.movedim(axis, -1)).movedim(-1, axis)

    def product(self) -> Tensor:
        return self.difference(self.frozen.dense_weight().movedim(0, -1)).movedim(-1, 0)


class BOFTUpdate(OFTUpdate):
    """W' = c R_m ... R_1 W0: each factor's blocks couple outputs twice as far apart as those of the one before.

    oft_blocks [factors, blocks, size, size].
    """

    def turned(self, y: Tensor) -> Tensor:
        R = self.rotations().to(y.dtype)
        size = R.shape[-1]
        for i, factor in enumerate(R):
            far = 2**i * size // 2
            pairs = y.unflatten(-1, (-1, 2, far)).transpose(-1, -2)  # [..., out / 2 far, far, 2]
            blocks = pairs.flatten(-3).unflatten(-1, (-1, size))
            blocks = torch.einsum("...bj,bij->...bi", blocks, factor)
            y = blocks.flatten(-2).unflatten(-1, (-1, far, 2)).transpose(-1, -2).flatten(-3)
        return y
