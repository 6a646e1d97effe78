"""LoKr: the Kronecker product of a small matrix and a larger one, which may be low-rank (LyCORIS).

With a magnitude it is what its users call DoKR.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dora_diffusion.adapters.frozen import FrozenLayer, FrozenLinear
from dora_diffusion.adapters.kernels import NORM_FLOOR
from dora_diffusion.adapters.whole import WholeUpdate

__all__ = ["LoKrPartUpdate", "LoKrUpdate", "factorise"]


def factorise(size: int, factor: int = -1) -> tuple[int, int]:
    """size as a product of two, the smaller first: `factor` itself where it divides, else the two that are closest to
    each other, with the smaller at most `factor` (-1: as close as can be). LyCORIS's `factorization`."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    most = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    smaller = next(m for m in range(most, 0, -1) if size % m == 0)
    return smaller, size // smaller


class LoKrUpdate(WholeUpdate):
    """W' - W0 = s kron(w1, w2).

    w1 [out_1, in_1] is lokr_w1, or lokr_w1_a [out_1, r] times lokr_w1_b [r, in_1]; w2 [out_2, in_2] (of a convolution
    [out_2, in_2, kh, kw]) is lokr_w2, or lokr_w2_a [out_2, r] times lokr_w2_b [r, in_2 kh kw], or in Tucker's form a
    core lokr_t2 [r, r, kh, kw] between lokr_w2_a [r, out_2] and lokr_w2_b [r, in_2]. out = out_1 out_2, in = in_1 in_2.
    """

    def scaled_by(self, scale: float) -> float:
        """1 with both factors whole: there is no rank then that alpha could be divided by."""
        return 1.0 if {"lokr_w1", "lokr_w2"} <= self._parameters.keys() else scale

    @staticmethod
    def start(
        frozen: FrozenLayer,
        rank: int,
        generator: torch.Generator | None,
        factor: int = -1,
        full_matrix: bool = False,
    ) -> dict[str, Tensor]:
        """As LyCORIS starts: w1 whole; w2 low-rank where that is smaller, with the half that is zero last."""
        out_1, out_2 = factorise(frozen.out_features, factor)
        in_1, in_2 = factorise(frozen.in_shape[0], factor)
        kernel = frozen.in_shape[1:]

        def uniform(*shape: int) -> Tensor:
            bound = 1 / math.sqrt(torch.Size(shape[1:]).numel())
            return torch.empty(*shape).uniform_(-bound, bound, generator=generator)

        tensors = {"lokr_w1": uniform(out_1, in_1)}
        if full_matrix or rank >= max(out_2, in_2) / 2:
            return tensors | {"lokr_w2": torch.zeros(out_2, in_2, *kernel)}
        columns = in_2 * torch.Size(kernel).numel()
        return tensors | {"lokr_w2_a": uniform(out_2, rank), "lokr_w2_b": torch.zeros(rank, columns)}

    @property
    def rank(self) -> int:
        """Of whichever factor is low-rank; of two whole ones the largest that it may be."""
        held = self._parameters
        for name in ("lokr_w2_b", "lokr_w1_b"):
            if (factor := held.get(name)) is not None:
                return int(factor.shape[0])
        return min(self.frozen.out_features, torch.Size(self.frozen.in_shape).numel())

    def _first(self) -> Tensor:
        w1: Tensor | None = self._parameters.get("lokr_w1")
        return self.get_parameter("lokr_w1_a") @ self.get_parameter("lokr_w1_b") if w1 is None else w1

    def factors(self) -> tuple[Tensor, Tensor]:
        """w1 [out_1, in_1] and w2 [out_2, in_2, ...], as they are multiplied out, without the scale."""
        w1, held = self._first(), self._parameters
        w2: Tensor | None = held.get("lokr_w2")
        if w2 is None:
            a, b, core = self.get_parameter("lokr_w2_a"), self.get_parameter("lokr_w2_b"), held.get("lokr_t2")
            w2 = a @ b if core is None else torch.einsum("ijhw,ip,jr->prhw", core, a, b)
        kernel = self.frozen.in_shape[1:]
        return w1, w2.reshape(w2.shape[0], self.frozen.in_shape[0] // w1.shape[1], *kernel)

    def product(self) -> Tensor:
        w1, w2 = self.factors()
        return torch.kron(w1.reshape(*w1.shape, *(1,) * (w2.dim() - 2)), w2.contiguous()) * self.scale

    def low_rank(self, x: Tensor) -> Tensor:
        """s x kron(w1, w2)^T; of a linear layer as small products in whichever order multiplies least."""
        if not isinstance(self.frozen, FrozenLinear):
            return super().low_rank(x)
        w1, *halves = (factor.to(x.dtype) for factor in self._chain())
        h = x.unflatten(-1, (w1.shape[1], x.shape[-1] // w1.shape[1]))  # [..., in_1, in_2]
        for half in halves[:-1]:
            h = h @ half.T  # [..., in_1, r]
        h = w1 @ h  # [..., out_1, in_2 or r]: where a token is narrowest
        return (h @ halves[-1].T).flatten(-2) * self.scale  # [..., out_1 out_2]

    def _chain(self) -> tuple[Tensor, ...]:
        """w1, and w2 whole or, where that is less work, its halves from the input's side on."""
        w1, held = self._first(), self._parameters
        a, b = held.get("lokr_w2_a"), held.get("lokr_w2_b")
        if a is None or b is None or "lokr_t2" in held:
            return self.factors()
        (out_1, in_1), out_2, (rank, in_2) = w1.shape, a.shape[0], b.shape
        by_halves = rank * (in_1 * in_2 + out_1 * in_1 + out_1 * out_2)  # multiplications of a token
        return (w1, b, a) if by_halves < out_1 * in_2 * (in_1 + out_2) else self.factors()

    def norms(self, base_squared: Tensor, by_input: bool) -> Tensor:
        """||W0 + dW||^2 = ||W0||^2 + 2 <W0, dW> + ||dW||^2 by row or column: one pass over W0, and no whole dW."""
        if not (isinstance(self.frozen, FrozenLinear) and self.frozen.is_dense):
            return super().norms(base_squared, by_input)
        w1, w2 = (factor.detach().float() for factor in self.factors())
        W0 = self.frozen.dense_weight().view(w1.shape[0], w2.shape[0], w1.shape[1], w2.shape[1])
        if by_input:
            w1, w2, W0 = w1.T, w2.T, W0.permute(2, 3, 0, 1)
        cross = torch.einsum("okmn,kn->okm", W0, w2)  # of each row (o, k), by block m of its columns
        cross = torch.einsum("okm,om->ok", cross, w1)
        own = torch.outer(w1.square().sum(1), w2.square().sum(1))
        squared = base_squared + (2 * self.scale * cross + self.scale**2 * own).flatten()
        return squared.clamp_min_(NORM_FLOOR**2).sqrt_()


class LoKrPartUpdate(LoKrUpdate):
    """Some rows of s kron(w1, w2): the product is of a fused layer of which this is a part.

    rows [ranges, 2]: from which row on and up to which, in the order of the layer's own rows.
    """

    def _ranges(self) -> list[tuple[int, int]]:
        return [(int(start), int(stop)) for start, stop in self.get_parameter("rows").tolist()]

    def product(self) -> Tensor:
        whole = LoKrUpdate.product(self)
        return torch.cat([whole[start:stop] for start, stop in self._ranges()])

    def low_rank(self, x: Tensor) -> Tensor:
        if not isinstance(self.frozen, FrozenLinear):
            return WholeUpdate.low_rank(self, x)
        whole = LoKrUpdate.low_rank(self, x)
        return torch.cat([whole[..., start:stop] for start, stop in self._ranges()], dim=-1)

    def norms(self, base_squared: Tensor, by_input: bool) -> Tensor:
        return WholeUpdate.norms(self, base_squared, by_input)
