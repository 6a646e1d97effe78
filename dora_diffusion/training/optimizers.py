"""The optimizers that a run can take, and what of them a checkpoint must keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn
from torch.optim import AdamW, Optimizer

from dora_diffusion.errors import ConfigError

__all__ = ["Numbers", "OptimizerName", "group_numbers", "make_optimizer", "set_group_numbers", "step_size"]

OptimizerName = Literal["adamw", "prodigy"]
Numbers = dict[str, float]


def make_optimizer(
    name: OptimizerName, by_rate: Mapping[float, Sequence[nn.Parameter]], weight_decay: float, warmup: bool
) -> Optimizer:
    """AdamW, or Prodigy, which finds its step size itself; `by_rate` has the parameters of each learning rate.

    Raises ConfigError where Prodigy is not installed.
    """
    groups = [{"params": list(parameters), "lr": rate, "initial_lr": rate} for rate, parameters in by_rate.items()]
    if name == "adamw":
        return AdamW(groups, weight_decay=weight_decay)
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise ConfigError("optimizer = 'prodigy' needs prodigyopt: pip install 'dora-diffusion[prodigy]'.") from error
    # As its authors advise for diffusion models.
    return Prodigy(groups, weight_decay=weight_decay, use_bias_correction=True, safeguard_warmup=warmup)


def step_size(optimizer: Optimizer) -> float:
    """What a step is scaled by: the learning rate, times the distance that Prodigy estimates."""
    group = optimizer.param_groups[0]
    return float(group["lr"] * group.get("d", 1.0))


def group_numbers(optimizer: Optimizer) -> list[Numbers]:
    """The numbers that belong to no parameter: Prodigy's estimates are among them."""
    return [
        {key: value for key, value in group.items() if isinstance(value, int | float)}
        for group in optimizer.param_groups
    ]


def set_group_numbers(optimizer: Optimizer, numbers: Sequence[Numbers]) -> None:
    """What `group_numbers` gave, back in its place."""
    for group, held in zip(optimizer.param_groups, numbers):
        group.update(held)
