"""What a fine-tuning changed, by the paper's own analysis: magnitude, direction and spectrum of every layer.

Liu et al. 2024, section 3.2. With m the norms of a weight's vectors and V their directions, over the k vectors of W:

    magnitude change  dM = sum |m' - m0| / k
    direction change  dD = sum (1 - cos(W', W0)) / k

The paper writes a vector as a column. Here, as in the authors' code, it is what makes one output: a row of torch's
weight [out, in], for a convolution a kernel [in, kh, kw]. A norm's weight and a bias are one vector each: they are
shown, and stay out of what is said of the matrices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from dora_diffusion.inspection.changes import Change

__all__ = ["Analysis", "LayerChange", "analyse", "effective_rank", "energy_within", "fit", "layer_change"]

ENERGY_RANK = 16  # for a full fine-tuning, which has no rank of its own


@dataclass(frozen=True)
class LayerChange:
    """One layer: `relative_size` is ||dW|| / ||W0||; the spectrum is that of dW [out, in * kernel], largest first."""

    layer: str
    magnitude_change: float
    direction_change: float
    relative_size: float
    singular_values: tuple[float, ...]
    effective_rank: float
    energy: float
    is_vector: bool = False


@dataclass(frozen=True)
class Analysis:
    """All layers of one fine-tuning. `rank` is the r of each layer's `energy`, the share of ||dW||^2 in its top r."""

    name: str
    kind: str
    rank: int
    layers: tuple[LayerChange, ...]

    @property
    def correlation(self) -> float | None:
        """Pearson's r between the layers' changes of direction and of magnitude; None where it has no meaning."""
        line = fit([(layer.direction_change, layer.magnitude_change) for layer in self.matrices])
        return None if line is None else line[2]

    @property
    def matrices(self) -> list[LayerChange]:
        """The layers without norms and biases."""
        return [layer for layer in self.layers if not layer.is_vector]

    @property
    def largest(self) -> list[LayerChange]:
        """The layers that changed most, for their size, first."""
        return sorted(self.layers, key=lambda layer: -layer.relative_size)

    def only(self, layers: Iterable[str]) -> Analysis:
        wanted = set(layers)
        return Analysis(self.name, self.kind, self.rank, tuple(x for x in self.layers if x.layer in wanted))


def analyse(name: str, kind: str, rank: int | None, changes: Iterable[Change]) -> Analysis:
    """One layer after the other: no more than one dense difference is held."""
    rank = rank or ENERGY_RANK
    return Analysis(name, kind, rank, tuple(layer_change(change, rank) for change in changes))


@torch.no_grad()
def layer_change(change: Change, rank: int) -> LayerChange:
    """The analysis of one layer, in float64."""
    is_vector = change.weight.dim() == 1
    W0, dW = (t.double()[None] if is_vector else t.flatten(1).double() for t in (change.weight, change.delta()))
    magnitude, direction = _magnitude_and_direction(W0, dW)
    values = _singular_values(change, dW)
    size = W0.norm().item()
    return LayerChange(
        layer=change.layer,
        magnitude_change=magnitude,
        direction_change=direction,
        relative_size=dW.norm().item() / size if size else math.inf,
        singular_values=tuple(values.tolist()),
        effective_rank=effective_rank(values),
        energy=energy_within(values, rank),
        is_vector=is_vector,
    )


def _magnitude_and_direction(W0: Tensor, dW: Tensor) -> tuple[float, float]:
    W = W0 + dW
    m0, m = W0.norm(dim=1), W.norm(dim=1)  # [out]
    # 1 - cos is half the squared distance of the unit vectors, which small changes do not cancel out of.
    there = (m0 > 0) & (m > 0)  # a row of zeros has no direction
    apart = (W[there] / m[there, None] - W0[there] / m0[there, None]).square().sum(1) / 2
    return (m - m0).abs().mean().item(), apart.mean().item() if len(apart) else 0.0


def _singular_values(change: Change, dW: Tensor) -> Tensor:
    """Those of dW, largest first: of the small factors where dW is low-rank, else from the smaller Gram matrix."""
    if change.factors is not None:
        up, down = (factor.flatten(1).double() for factor in change.factors)
        if up.shape[1] < min(dW.shape):
            core = torch.linalg.qr(up).R @ torch.linalg.qr(down.T).R.T  # [r, r]
            return torch.linalg.svdvals(core)
    gram = dW @ dW.T if dW.shape[0] <= dW.shape[1] else dW.T @ dW
    return torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(0)


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the singular values as shares of their sum (Roy and Vetterli 2007); 0 for no change."""
    total = values.sum()
    if total <= 0:
        return 0.0
    p = values[values > 0] / total
    return math.exp(-(p * p.log()).sum().item())


def energy_within(values: Tensor, rank: int) -> float:
    """The share of ||dW||^2 in the first `rank` singular values; 1 for no change."""
    energy = values.square()
    total = energy.sum().item()
    return energy[:rank].sum().item() / total if total else 1.0


def fit(points: list[tuple[float, float]]) -> tuple[float, float, float] | None:
    """Slope, intercept and Pearson's r of a line through (x, y) by least squares; None where there is none."""
    if len(points) < 3:
        return None
    x, y = (torch.tensor(values, dtype=torch.float64) for values in zip(*points))
    dx, dy = x - x.mean(), y - y.mean()
    spread = (dx.norm() * dy.norm()).item()
    if not math.isfinite(spread) or spread < 1e-300:
        return None
    slope = ((dx * dy).sum() / dx.square().sum()).item()
    return slope, (y.mean() - slope * x.mean()).item(), (dx * dy).sum().item() / spread
