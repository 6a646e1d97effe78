"""One case, ready to run: the frozen base, its inputs, and the two things that are timed.

A training step is forward, loss and backward, without an optimizer; gradients are dropped outside the timing. In half
precision it runs as training scripts run it: frozen weights in that dtype, adapters in float32, under autocast.
Inference is one forward pass without gradients and without autocast, in eval mode.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Case, Inputs
from benchmarks.variants import Adapted

__all__ = ["Workload", "adapted_layers", "prepare"]


@dataclass
class Workload:
    """A case on a device. `base` is frozen; `layers` are the full names of those to adapt."""

    case: Case
    base: nn.Module
    inputs: Inputs
    wanted: Tensor
    layers: tuple[str, ...]
    device: torch.device
    dtype: torch.dtype

    @property
    def is_half(self) -> bool:
        return self.dtype != torch.float32

    def training_step(self, adapted: Adapted) -> Tensor:
        """Forward, mean squared error, backward. The base alone runs backward to its inputs."""
        inputs = self.inputs if adapted.trainable else self._differentiable()
        precision = torch.autocast(self.device.type, self.dtype) if self.is_half else contextlib.nullcontext()
        with precision:
            output: Tensor = adapted.model(**inputs)[0]
            loss = F.mse_loss(output.float(), self.wanted)
        loss.backward()
        return output.detach()

    @torch.no_grad()
    def inference(self, adapted: Adapted) -> Tensor:
        output: Tensor = adapted.model(**self.inputs)[0]
        return output

    def before(self, adapted: Adapted, mode: str) -> None:
        """What has to happen before a run and is not part of it."""
        if mode == "training":
            drop_gradients(adapted)
            adapted.touch()

    def run(self, adapted: Adapted, mode: str) -> Tensor:
        return self.training_step(adapted) if mode == "training" else self.inference(adapted)

    def enter(self, adapted: Adapted, mode: str) -> None:
        """Bring a variant into the state of this mode."""
        drop_gradients(adapted)
        adapted.train(mode == "training")
        adapted.cast(torch.float32 if mode == "training" else self.dtype)
        if adapted.variant.fused and adapted.injected.adapter is not None:
            adapted.injected.adapter.fuse()

    def _differentiable(self) -> Inputs:
        names = self.case.differentiable
        return {k: v.detach().requires_grad_() if k in names else v for k, v in self.inputs.items()}  # type: ignore[attr-defined]


def drop_gradients(adapted: Adapted) -> None:
    for parameter in adapted.trainable:
        parameter.grad = None


def prepare(case: Case, device: torch.device, dtype: torch.dtype) -> Workload:
    """Build the case's model with random weights, the same for every process."""
    torch.manual_seed(0)
    with torch.device(device):
        base = case.build().requires_grad_(False).to(dtype)
    inputs = {name: _placed(value, device, dtype) for name, value in case.inputs().items()}
    with torch.no_grad():
        shape = base.eval()(**inputs)[0].shape
    wanted = torch.randn(shape).to(device)
    return Workload(case, base, inputs, wanted, adapted_layers(base, case.targets), device, dtype)


def adapted_layers(model: nn.Module, targets: tuple[str, ...]) -> tuple[str, ...]:
    """The full names of the layers whose names end like a target, in the model's order."""
    return tuple(
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and any(f".{path}".endswith(f".{target}") for target in targets)
    )


def _placed(value: object, device: torch.device, dtype: torch.dtype) -> object:
    if isinstance(value, Tensor):
        return value.to(device, dtype) if value.is_floating_point() else value.to(device)
    if isinstance(value, Mapping):
        return {name: _placed(part, device, dtype) for name, part in value.items()}
    return value
