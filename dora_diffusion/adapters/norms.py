"""Normalisation layers, whose weights and biases files change too; nothing trains them here.

A file holds what it adds to the weight and to the bias of a LayerNorm, GroupNorm or RMSNorm. The layer is run with
the changed parameters, by its own code, so that a norm of any make is computed as it computes itself.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dora_diffusion.adapters.layers import AdaptedLayer, LoRAUpdate, bias_shift

__all__ = ["AdaptedNorm", "FrozenNorm", "freeze_norm"]


class FrozenNorm:
    """A frozen normalisation layer: weight [n], and often bias [n]."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original: Tensor | None = None
        self.out_features = int(module._parameters["weight"].numel())  # type: ignore[union-attr]
        self.in_shape: tuple[int, ...] = ()
        self.up_shape: tuple[int, ...] = ()

    @property
    def weight(self) -> Tensor:
        return self.module.weight if self.original is None else self.original  # type: ignore[return-value]

    @property
    def has_bias(self) -> bool:
        return self.module._parameters.get("bias") is not None

    def dense_weight(self) -> Tensor:
        return self.weight.detach().float()


def freeze_norm(module: nn.Module) -> FrozenNorm | None:
    """The view of a normalisation layer with a weight, or None for every other module.

    Known by what it is: a module named so, without parts, with one vector for a weight and at most one for a bias.
    """
    parameters = {name: p for name, p in module._parameters.items() if p is not None}
    weight = parameters.get("weight")
    if (
        "norm" in type(module).__name__.lower()
        and weight is not None
        and weight.dim() == 1
        and parameters.keys() <= {"weight", "bias"}
        and not module._modules
    ):
        return FrozenNorm(module)
    return None


class AdaptedNorm(AdaptedLayer):
    """A frozen normalisation layer with the updates of its weight and bias: the layer itself, with
    W0 + sum_k w_k (W'_k - W0) for its weight, and the same for its bias."""

    @property
    def weight(self) -> Tensor:
        """What the layer computes with: a model may read it and not call the layer."""
        return self._changed(self._active())["weight"]

    @property
    def bias(self) -> Tensor | None:
        return self._changed(self._active()).get("bias")

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None:
                raise
            return getattr(base, name)  # eps, num_groups and the like, which models look at

    def forward(self, x: Tensor, *values: object, **options: object) -> Tensor:
        if torch.compiler.is_compiling():
            changed = self._changed_traced([u for name, u in self.updates.items() if name not in self.fused])  # type: ignore[misc]
            return functional_call(self.base, changed, (x, *values), options)  # type: ignore[arg-type, no-any-return]
        active = self._active()
        if not active:
            return self.base(x, *values, **options)  # type: ignore[no-any-return]
        if "forward" in self.base.__dict__:  # accelerate's and diffusers' offloading puts its own there
            return self._offloaded(active, x, *values, **options)
        return functional_call(self.base, self._changed(active), (x, *values), options)  # type: ignore[arg-type, no-any-return]

    def _active(self) -> list[LoRAUpdate]:
        return [u for name, u in self.updates.items() if name not in self.fused and u.strength != 0]  # type: ignore[misc]

    def _changed(self, active: list[LoRAUpdate]) -> dict[str, Tensor]:
        """The base's parameters with these updates, in its dtype; its own where nothing changes them."""
        own = {name: p for name, p in self.base.named_parameters() if p is not None}
        added = self._added(active)
        return {name: (p.float() + added[name]).to(p.dtype) if name in added else p for name, p in own.items()}

    def _added(self, active: list[LoRAUpdate]) -> dict[str, Tensor]:
        """sum_k w_k (W'_k - W0) and the same of the bias, float32, where something is added."""
        changes = [update.strength * self._difference(update) for update in active]
        added = {"weight": torch.stack(changes).sum(0) if changes else None, "bias": bias_shift(active)}
        return {name: change for name, change in added.items() if change is not None}

    @staticmethod
    def _difference(update: LoRAUpdate) -> Tensor:
        """W' - W0 of one update [n], float32, differentiable."""
        return update.product()  # type: ignore[operator, no-any-return]

    def _changed_traced(self, updates: list[LoRAUpdate]) -> dict[str, Tensor]:
        """`_changed` with the strengths as tensors, so that no number is compiled in."""
        changed: dict[str, Tensor] = dict(self.base.named_parameters())
        for update in updates:
            w = update.strength_tensor
            added = {"weight": self._difference(update), "bias": update.bias_difference}
            for name, change in added.items():
                if change is not None:
                    own = changed[name]
                    changed[name] = torch.where(w == 0, own, (own.float() + w * change).to(own.dtype))
        return changed

    def _offloaded(self, active: list[LoRAUpdate], x: Tensor, *values: object, **options: object) -> Tensor:
        """For a layer whose weight only its own hook brings back: its output, and what the added parameters give.

        A norm's output is linear in its parameters but for a constant (some take 1 + weight), which is taken off.
        """
        y = self.base(x, *values, **options)
        bare = _without_hook(self.base)
        own = dict(self.base.named_parameters())
        zeros = {name: torch.zeros(p.shape, dtype=p.dtype, device=x.device) for name, p in own.items()}
        added = {name: t.to(x.device, own[name].dtype) for name, t in self._added(active).items()}
        with_added = _call(bare, zeros | added, x, *values, **options)
        return y + (with_added - _call(bare, zeros, x, *values, **options))  # type: ignore[no-any-return]


def _call(module: nn.Module, parameters: Mapping[str, Tensor], *values: object, **options: object) -> Tensor:
    return functional_call(module, dict(parameters), values, options)  # type: ignore[arg-type, no-any-return]


def _without_hook(module: nn.Module) -> nn.Module:
    """A copy that shares the module's state but for what offloading has hung on to it."""
    bare = copy.copy(module)
    for name in ("forward", "_hf_hook", "_old_forward", "_diffusers_hook"):
        bare.__dict__.pop(name, None)
    return bare
