"""Checkpoints that resume to the same bits, the moving average, and the learning rate's path."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .files import write_atomically
from .muon import Together


class MovingAverage:
    """Exponential moving average of a module's parameters (buffers are not averaged)."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self._live = [p for p in module.parameters() if p.requires_grad]
        self._decay = decay
        self.values = [p.detach().clone() for p in self._live]
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Moves towards the live parameters; quicker at the start, when they are all noise."""
        self._updates += 1
        decay = min(self._decay, (1 + self._updates) / (10 + self._updates))
        torch._foreach_lerp_(self.values, [p.detach() for p in self._live], 1.0 - decay)

    @torch.no_grad()
    def reset(self) -> None:
        """Takes the live parameters as they are."""
        for live, value in zip(self._live, self.values, strict=True):
            value.copy_(live)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges live and averaged values; a second call undoes the first."""
        for live, value in zip(self._live, self.values, strict=True):
            held = live.detach().clone()
            live.copy_(value)
            value.copy_(held)

    def state_dict(self) -> dict[str, list[Tensor] | int]:
        return {"values": self.values, "updates": self._updates}

    def load_state_dict(self, state: dict[str, list[Tensor] | int]) -> None:
        self._updates = state["updates"]
        for value, saved in zip(self.values, state["values"], strict=True):
            value.copy_(saved)


def learning_rate_factor(step: int, steps: int, warmup: int, decay_steps: int) -> float:
    """Warm up, stay, and fall to nothing over the last `decay_steps` (1 - sqrt, after WSD)."""
    if step < warmup:
        return (step + 1) / warmup
    left = steps - step
    if left >= decay_steps:
        return 1.0
    return 1.0 - (1.0 - left / decay_steps) ** 0.5


@dataclass
class Training:
    """Everything a run carries from one step to the next."""

    module: nn.Module
    optimizer: torch.optim.Optimizer | Together
    average: MovingAverage
    generator: torch.Generator
    step: int = 0
    seconds: float = 0.0
    _began: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        """Seconds of training, earlier sittings counted in."""
        return self.seconds + time.monotonic() - self._began

    def set_learning_rate(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor

    def take_weights(self, pipeline: Path) -> None:
        """Starts from the weights of a pipeline's folder, by the names of its parts."""
        for name, part in self.module.named_children():
            weights = {}
            for file in sorted((pipeline / name).glob("*.safetensors")):
                weights |= {key: tensor.float() for key, tensor in load_file(file).items()}
            part.load_state_dict(weights)
        self.average.reset()

    def save(self, path: Path) -> None:
        with write_atomically(path) as temporary:
            torch.save(
                {
                    "module": self.module.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "average": self.average.state_dict(),
                    "generator": self.generator.get_state(),
                    "step": self.step,
                    "seconds": self.elapsed(),
                },
                temporary,
            )

    def load(self, path: Path) -> None:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        self.module.load_state_dict(saved["module"])
        rates = [group["base_lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved["optimizer"])
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["base_lr"] = rate  # the command line's, so that a resumed run can change it
        self.average.load_state_dict(saved["average"])
        self.generator.set_state(saved["generator"])
        self.step, self.seconds = saved["step"], saved["seconds"]
        self._began = time.monotonic()
