"""Numbers that are none any more: found in the step where they come up, and said with what to try."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from dora_diffusion.adapters.labels import Kind
from dora_diffusion.errors import TrainingError
from dora_diffusion.training.config import TrainConfig

__all__ = ["all_finite", "diverged"]


def all_finite(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether every weight is a number."""
    most = torch._foreach_norm([parameter.detach() for parameter in parameters], float("inf"))
    return bool(torch.stack(most).isfinite().all())


def diverged(config: TrainConfig, precision: str, kind: Kind, made: int, what: str) -> TrainingError:
    """`what` is no number any more, though `made` steps were made; `precision` is what accelerate computes in."""
    if made == 0 and config.start_from is None:  # the adapter adds exact zeros as yet
        return TrainingError(
            f"{config.label(kind)}: {what} before any step was made, so it is the base that gives no numbers on these "
            f"pictures. mixed_precision is {precision!r}: try 'no' or 'bf16', or another base."
        )
    ways = [f"a learning_rate below {config.learning_rate:g}"]
    if config.text_encoder_learning_rate:
        ways.append(f"a text_encoder_learning_rate below {config.text_encoder_learning_rate:g}")
    if precision == "fp16":
        ways.append("mixed_precision = 'bf16'")
    if config.max_grad_norm > 1:
        ways.append("max_grad_norm = 1")
    return TrainingError(f"{config.label(kind)}: {what} at step {made}: the run has diverged. Try {' or '.join(ways)}.")
