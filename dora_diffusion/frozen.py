"""What the updates ask of the frozen layer under them: one class for each kind of layer.

The formulas in layers.py need of W0 only products and row norms, so a layer that keeps its weight packed works without
code that unpacks it; only fusing wants a dense weight.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.errors import AdapterStateError

__all__ = ["FrozenConv2d", "FrozenLayer", "FrozenLinear", "device_of", "freeze_view"]


class FrozenLayer(Protocol):
    """What the updates ask of the frozen layer under them; one class per kind of layer."""

    original: Tensor | None
    out_features: int
    in_shape: tuple[int, ...]
    up_shape: tuple[int, ...]

    @property
    def module(self) -> nn.Module: ...
    @property
    def weight(self) -> Tensor: ...
    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor: ...
    def unbiased(self, x: Tensor) -> Tensor: ...
    def without_bias(self, y: Tensor) -> Tensor: ...
    def per_output(self, v: Tensor) -> Tensor: ...
    def times_weight(self, A: Tensor) -> Tensor: ...
    def squared_norms(self) -> Tensor: ...


class FrozenLinear:
    """A frozen linear map: nn.Linear, a quantised subclass of it, or anything with in_features and out_features.

    Only `weight` (needed to fuse) wants a dense matrix. What the formulas need of W0 is got by sending rows through
    the layer itself, so a layer that keeps its weight packed works without code that unpacks it.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original: Tensor | None = None  # W0 while an adapter is fused into module.weight
        self.in_features = int(module.in_features)  # type: ignore[arg-type]
        self.out_features = int(module.out_features)  # type: ignore[arg-type]
        self.in_shape: tuple[int, ...] = (self.in_features,)
        self.up_shape: tuple[int, ...] = ()

    @property
    def is_dense(self) -> bool:
        weight = getattr(self.module, "weight", None)
        return (
            isinstance(weight, Tensor)
            and weight.is_floating_point()
            and tuple(weight.shape) == (self.out_features, self.in_features)
            and type(weight) in (Tensor, nn.Parameter)
        )

    @property
    def weight(self) -> Tensor:
        if self.original is not None:
            return self.original
        if not self.is_dense:
            raise AdapterStateError(
                f"cannot fuse into a {type(self.module).__name__}: its weight is packed, not a dense matrix. "
                "Keep the adapter unfused, or load the base without quantisation."
            )
        return self.module.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.module, "bias", None)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """x (B A)^T: [..., in] to [..., out]."""
        return F.linear(F.linear(x, A), B)

    def unbiased(self, x: Tensor) -> Tensor:
        """x W0^T without the bias: [..., in] to [..., out]."""
        if self.is_dense:
            return F.linear(x, self.weight.to(x.dtype))
        return self.without_bias(self.module(x))

    def without_bias(self, y: Tensor) -> Tensor:
        return y if self.bias is None else y - self.bias.detach().to(y.dtype)

    def per_output(self, v: Tensor) -> Tensor:
        return v  # [out], the last axis of y

    def times_weight(self, A: Tensor) -> Tensor:
        """W0 A^T [out, r], float32, from A [r, in]: A's rows as r extra tokens."""
        if self.is_dense:
            return F.linear(A, self.weight.float()).T
        return self.unbiased(A).float().T

    def squared_norms(self) -> Tensor:
        """||W0||^2 of every output row, [out], float32."""
        if self.is_dense:
            return self.weight.float().square().sum(1)
        eye = torch.eye(self.in_features, device=device_of(self.module))
        chunks = (self.unbiased(rows).float().square().sum(0) for rows in eye.split(256))  # no dense copy is kept
        return torch.stack(list(chunks)).sum(0)


class FrozenConv2d:
    """A frozen nn.Conv2d. A has the base's kernel, B is 1x1; the norm runs over input channels and kernel."""

    def __init__(self, module: nn.Conv2d) -> None:
        self.module: nn.Conv2d = module
        self.original: Tensor | None = None
        self.out_features = module.out_channels
        self.in_shape: tuple[int, ...] = (module.in_channels // module.groups, *module.kernel_size)
        self.up_shape: tuple[int, ...] = (1, 1)

    @property
    def weight(self) -> Tensor:
        return self.module.weight if self.original is None else self.original

    def _conv(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.module._conv_forward(x, weight, None)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """The convolution with B A: [batch, in, h, w] to [batch, out, h', w']."""
        if self.module.groups == 1:
            return F.conv2d(self._conv(x, A), B)
        # Every group sees its own channels only, so B A is one grouped kernel and not two convolutions.
        BA = B.flatten(1) @ A.flatten(1)
        return self._conv(x, BA.reshape(self.module.weight.shape))

    def unbiased(self, x: Tensor) -> Tensor:
        return self._conv(x, self.weight.to(x.dtype))

    def without_bias(self, y: Tensor) -> Tensor:
        bias = self.module.bias
        return y if bias is None else y - self.per_output(bias.detach().to(y.dtype))

    def per_output(self, v: Tensor) -> Tensor:
        return v[:, None, None]  # [out, 1, 1]

    def times_weight(self, A: Tensor) -> Tensor:
        return self.weight.flatten(1).float() @ A.T

    def squared_norms(self) -> Tensor:
        return self.weight.flatten(1).float().square().sum(1)


def freeze_view(module: nn.Module) -> FrozenLayer | None:
    """The view of a layer that can be adapted, or None for every other module."""
    if isinstance(module, nn.Conv2d):
        return FrozenConv2d(module)
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return FrozenLinear(module)
    return None


def device_of(module: nn.Module) -> torch.device:
    tensors = [*module.parameters(), *module.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")
