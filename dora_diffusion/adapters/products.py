"""A layer that is known only by what it gives: its linear map, measured by sending rows through it.

Whatever such a layer does inside (a table look-up, a product of factors, a weight that comes from the disk for each
call), f(x) - f(0) is x W0^T, and that is all the formulas of layers.py need.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dora_diffusion.errors import TargetError

__all__ = ["LayerProducts", "device_of"]

IDENTITY_ROWS = 256  # sent through at a time
LARGE = {torch.bfloat16: 2.0**24, torch.float16: 2.0**6}  # the largest value sent through, far from an overflow
NOT_LINEAR = 0.2  # a layer that quantises its input misses by some hundredths, one with a ReLU inside by about a half


class LayerProducts:
    """Products with the weight of a layer that maps [n, in] to [n, out], all in float32 and without gradients."""

    def __init__(self, module: nn.Module, in_features: int, out_features: int) -> None:
        self.module = module
        self.in_features = in_features
        self.out_features = out_features
        self._bias: Tensor | None = None
        self._dtype: torch.dtype | None = None  # what the layer was last seen to take

    def bias(self) -> Tensor:
        """What the layer gives for zeros, [out], wherever it keeps that."""
        if torch.compiler.is_compiling():  # nothing can be kept then
            return self._at_zero()
        if self._bias is None:
            self._bias = self._at_zero()
        return self._bias

    def of(self, x: Tensor) -> Tensor:
        """x W0^T for x [n, in]."""
        if self._dtype is None:
            self.bias()
        scale = self._scale(x)
        y = self._raw(torch.cat((x * scale, torch.zeros_like(x[:1]))))
        return (y[:-1] - y[-1:]) / scale

    def columns(self) -> Iterator[Tensor]:
        """W0's columns from the first to the last, in chunks [n, out]: rows of the identity, sent through."""
        device = device_of(self.module)
        for first in range(0, self.in_features, IDENTITY_ROWS):
            rows = torch.zeros(min(IDENTITY_ROWS, self.in_features - first), self.in_features, device=device)
            rows.diagonal(first).fill_(1)
            yield self.of(rows)

    def check_linear(self) -> None:
        """Many modules have in_features and out_features, and not all are linear maps. Raises TargetError."""
        x = torch.randn(2, self.in_features, generator=torch.Generator().manual_seed(0)).to(device_of(self.module))
        a, b, both = self.of(torch.cat((x, x.sum(0, keepdim=True))))
        if (both - a - b).norm() > NOT_LINEAR * both.norm():
            raise TargetError(
                f"cannot put DoRA on a {type(self.module).__name__}: it is no linear map, so it has no weight to take "
                "norms of. Leave it out of target_modules, or name the linear layers inside it."
            )

    def _scale(self, x: Tensor) -> Tensor:
        """A power of two for x: in half precision a product smaller than the bias would drown in its rounding."""
        large = LARGE.get(self._dtype or torch.float32)
        return x.new_ones(()) if large is None else (large / x.abs().amax().clamp_min(1e-30)).log2().round().exp2()

    def _at_zero(self) -> Tensor:
        return self._raw(torch.zeros(1, self.in_features, device=device_of(self.module)))[0]

    @torch.no_grad()
    def _raw(self, x: Tensor) -> Tensor:
        """The layer's own output for x, computed in the most exact dtype that the layer takes."""
        own = [t.dtype for t in (*self.module.parameters(), *self.module.buffers()) if t.is_floating_point()]
        error: Exception | None = None
        for dtype in dict.fromkeys([self._dtype or torch.float32, torch.float32, *own, torch.bfloat16, torch.float16]):
            try:
                with torch.autocast(x.device.type, enabled=False):
                    y = self.module(x.to(dtype))
            except (RuntimeError, TypeError, ValueError, AssertionError) as refused:
                error = error or refused
                continue
            if isinstance(y, Tensor) and y.shape == (len(x), self.out_features):
                self._dtype = dtype
                return y.float()
            error = error or ValueError("its output has another shape")
        raise TargetError(
            f"cannot adapt a {type(self.module).__name__}: {error}. A layer of a type that is not known here must be "
            f"a module of one input that maps [n, {self.in_features}] to [n, {self.out_features}]. "
            "Leave it out of target_modules."
        ) from error


def device_of(module: nn.Module) -> torch.device:
    """Where the layer computes; accelerate's offloading leaves its weights on the meta device between calls."""
    tensors = [*module.parameters(), *module.buffers()]
    device = tensors[0].device if tensors else torch.device("cpu")
    if device.type == "meta" and (hook := getattr(module, "_hf_hook", None)) is not None:
        return torch.device(hook.execution_device)
    return device
