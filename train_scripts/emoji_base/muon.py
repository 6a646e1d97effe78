"""Muon: momentum whose matrices are made orthogonal before each step.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024), with the step
size matched to AdamW's as in Liu et al., "Muon is scalable for LLM training" (arXiv 2502.16982).
PyTorch's own takes no convolutions and works matrix by matrix; here equal shapes go in one batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .speed import quick_dtype


def orthogonalised(matrices: Tensor, rounds: int = 5) -> Tensor:
    """Singular values pushed to about 1 by Newton-Schulz rounds in a quick dtype: [K, rows, columns]."""
    x = matrices.to(quick_dtype(matrices.device.type))
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(rounds):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum and orthogonal updates; convolutions count as [out, in * height * width]."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
        for p in parameters:
            by_shape[(p.shape[0], p[0].numel())].append(p)
        super().__init__(
            [{"params": same} for same in by_shape.values()],
            {"lr": lr, "base_lr": lr, "momentum": momentum, "weight_decay": weight_decay},
        )

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            for p in parameters:
                if not self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            buffers = [self.state[p]["momentum"] for p in parameters]
            torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, buffers, group["momentum"])
            rows, columns = parameters[0].shape[0], parameters[0][0].numel()
            updates = orthogonalised(torch.stack([a.reshape(rows, columns) for a in ahead])).float()
            size = group["lr"] * 0.2 * max(rows, columns) ** 0.5
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, [u.reshape(p.shape) for u, p in zip(updates, parameters)], alpha=-size)


class Together:
    """Several optimizers that step as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self._optimizers = optimizers
        self.param_groups = [group for o in optimizers for group in o.param_groups]

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, list[dict[str, object]]]:
        return {"optimizers": [o.state_dict() for o in self._optimizers]}

    def load_state_dict(self, state: dict[str, list[dict[str, object]]]) -> None:
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.param_groups = [group for o in self._optimizers for group in o.param_groups]
