"""OFT of the inputs: each block of inputs turned by a rotation of its own (Qiu et al. 2025), as OneTrainer has it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dora_diffusion.adapters.whole import WholeUpdate

__all__ = ["InputRotationUpdate"]


class InputRotationUpdate(WholeUpdate):
    """W' = W0 R^T for a linear layer, W0 R for a convolution, R block-diagonal over inputs (times kernel) and nearly
    orthogonal: the first terms of Cayley's series in Q, 1 + 2 Q + 2 Q^2 + 2 Q^3 + Q^4.

    oft_R [blocks, size (size - 1) / 2], the upper triangle of each Q, or [1, ...], shared by all blocks; oft_scaled,
    one number, is there where Q is divided by 2 sqrt(size - 1). (A linear layer's inputs are turned, of a convolution
    the weight is: so the writer does.)
    """

    @property
    def rank(self) -> int:
        return self.size

    @property
    def size(self) -> int:
        """Of a block."""
        return size_of(self.get_parameter("oft_R").shape[-1])

    def rotations(self) -> Tensor:
        """R of every block, [blocks, size, size]."""
        upper: Tensor = self.get_parameter("oft_R")
        size = self.size
        if "oft_scaled" in self._parameters:
            upper = upper / (2 * math.sqrt(size - 1))
        rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
        Q = upper.new_zeros(len(upper), size, size)
        Q[:, rows, columns] = upper
        Q = Q - Q.mT
        square = Q @ Q
        R = torch.eye(size, device=Q.device) + 2 * Q + 2 * square + 2 * square @ Q + square @ square
        return R.expand(math.prod(self.frozen.in_shape) // size, size, size)

    def _excess(self) -> Tensor:
        """R - 1, so that nothing is lost where R is nearly 1."""
        return self.rotations() - torch.eye(self.size, device=self.get_parameter("oft_R").device)

    def product(self) -> Tensor:
        W0 = self.frozen.dense_weight()
        E = self._excess() if len(self.frozen.in_shape) > 1 else self._excess().mT
        blocks = W0.flatten(1).unflatten(1, E.shape[:2])
        return torch.einsum("ork,rkc->orc", blocks, E).reshape(W0.shape)


def size_of(elements: int) -> int:
    """The size of a block whose triangle has so many elements; 0 where there is none."""
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    return size if size * (size - 1) // 2 == elements and elements else 0
