"""Do the variants compute the same thing? A benchmark of different mathematics would be worthless.

Outputs are compared by what the adapter changes: the distance of two outputs as a part of the distance between the
reference's output and the base's. Gradients of all parameters are compared as one vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.factors import Factors
from benchmarks.variants import Adapted
from benchmarks.workload import Workload, drop_gradients

__all__ = ["Agreement", "check"]

# Half precision rounds every activation, so what an adapter changes is known to a few percent only.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}


@dataclass(frozen=True)
class Agreement:
    """How far a variant is from the reference of its kind (the first of that kind)."""

    reference: str
    output_error: float
    gradient_error: float | None
    tolerance: float

    @property
    def outputs_agree(self) -> bool:
        return self.output_error <= self.tolerance

    @property
    def gradients_agree(self) -> bool:
        """True too where no gradients were compared."""
        return self.gradient_error is None or self.gradient_error <= self.tolerance

    def is_same(self, other_gradients: bool) -> bool:
        """The same mathematics; `other_gradients` excuses a variant whose own definition has other ones."""
        return self.outputs_agree and (other_gradients or self.gradients_agree)


def check(workload: Workload, variants: Sequence[Adapted], mode: str) -> dict[str, Agreement]:
    """Run every variant once in this mode and compare those of a kind; the first of a kind is the reference."""
    base = _output(workload, next(a for a in variants if a.variant.kind == "base"), mode)
    references: dict[str, tuple[str, Tensor, Mapping[str, Tensor]]] = {}
    found: dict[str, Agreement] = {}
    for adapted in variants:
        kind = adapted.variant.kind
        if kind == "base":
            continue
        output = _output(workload, adapted, mode)
        gradients = _gradients(adapted.injected.factors) if mode == "training" else {}
        drop_gradients(adapted)
        name, other, theirs = references.setdefault(kind, (adapted.variant.name, output, gradients))
        found[adapted.variant.name] = Agreement(
            name,
            float((output - other).norm() / (other - base).norm()),
            _distance(gradients, theirs) if gradients else None,
            TOLERANCE[workload.dtype],
        )
    return found


def _output(workload: Workload, adapted: Adapted, mode: str) -> Tensor:
    workload.before(adapted, mode)
    return workload.run(adapted, mode).float().cpu()


def _gradients(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """By layer and factor, flat: libraries shape m differently."""
    return {
        f"{path}.{name}": parameter.grad.detach().float().flatten().cpu()
        for path, layer in factors.items()
        for name, parameter in layer.items()
        if parameter.grad is not None
    }


def _distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    if found.keys() != expected.keys():
        return float("inf")
    difference = sum(float((found[name] - expected[name]).square().sum()) for name in expected)
    size = sum(float(tensor.square().sum()) for tensor in expected.values())
    return (difference / size) ** 0.5
