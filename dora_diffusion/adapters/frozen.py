"""What the updates ask of the frozen layer under them: one class for each kind of layer.

The formulas in layers.py need of W0 only products and row norms, so a layer that keeps its weight packed works without
code that unpacks it; only fusing wants a dense weight.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from dora_diffusion.adapters.packed import Rows, float_rows, has_gradient, keeps_unpacked, packed_rows
from dora_diffusion.adapters.products import LayerProducts, device_of
from dora_diffusion.errors import AdapterStateError

__all__ = ["FrozenConv1D", "FrozenConv2d", "FrozenLayer", "FrozenLinear", "FrozenWeight", "device_of", "freeze_view"]


class FrozenWeight(Protocol):
    """What is asked of any frozen layer: a weight [out_features, *in_shape], which fusing may write to."""

    original: Tensor | None
    out_features: int
    in_shape: tuple[int, ...]
    up_shape: tuple[int, ...]

    @property
    def module(self) -> nn.Module: ...
    @property
    def weight(self) -> Tensor: ...
    @property
    def has_bias(self) -> bool: ...
    def dense_weight(self) -> Tensor: ...


class FrozenLayer(FrozenWeight, Protocol):
    """What the updates ask of the linear map under them; one class per kind of layer."""

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor: ...
    def whole(self, x: Tensor, D: Tensor) -> Tensor: ...
    def output(self, x: Tensor) -> Tensor: ...
    def unbiased(self, x: Tensor) -> Tensor: ...
    def without_bias(self, y: Tensor) -> Tensor: ...
    def per_output(self, v: Tensor) -> Tensor: ...
    def per_input(self, v: Tensor) -> Tensor: ...
    def output_axis(self, y: Tensor) -> int: ...
    def times_weight(self, A: Tensor) -> Tensor: ...
    def transposed(self, dy: Tensor) -> Tensor: ...
    def squared_norms(self, by_input: bool = False) -> Tensor: ...


class FrozenLinear:
    """A frozen linear map: nn.Linear, a quantised layer, or anything with in_features and out_features.

    Only `weight` (needed to fuse) wants a dense matrix. Of a weight that packed.py can read the rows are read. Any
    other layer is asked for products: rows sent through it are all that the formulas need.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.original: Tensor | None = None  # W0 while an adapter is fused into module.weight
        self.in_features, self.out_features = self._sizes()
        self.in_shape: tuple[int, ...] = (self.in_features,)
        self.up_shape: tuple[int, ...] = ()
        self.products = LayerProducts(module, self.in_features, self.out_features)

    def _sizes(self) -> tuple[int, int]:
        return int(self.module.in_features), int(self.module.out_features)  # type: ignore[arg-type]

    @property
    def is_dense(self) -> bool:
        """Whether the layer is x W^T + b with a matrix [out, in] that can be read and written as it stands."""
        weight = self.module._parameters.get("weight")
        return (
            weight is not None
            and type(weight) in (Tensor, nn.Parameter)
            and weight.is_floating_point()
            and tuple(weight.shape) == (self.out_features, self.in_features)
            and not weight.is_meta  # offloaded: the layer's hook brings it back when the layer is called
            and type(self.module).forward is nn.Linear.forward
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
    def rows(self) -> Rows | None:
        """How to read W0's rows, or None for a layer that can only be asked for products."""
        if self.is_dense:
            return lambda: float_rows(self.weight)
        return packed_rows(self.module, self.out_features, self.in_features)

    @property
    def bias(self) -> Tensor | None:
        """What the layer adds to x W0^T; a layer that is not known may keep it anywhere."""
        return self.products.bias() if self.rows is None else getattr(self.module, "bias", None)

    @property
    def has_bias(self) -> bool:
        return self.bias is not None

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """x (B A)^T: [..., in] to [..., out]."""
        return F.linear(F.linear(x, A), B)

    def whole(self, x: Tensor, D: Tensor) -> Tensor:
        """x D^T for D in the shape of the weight: [..., in] to [..., out]."""
        return F.linear(x, D)

    def output(self, x: Tensor) -> Tensor:
        """The layer's own output, bias included, differentiable in x also where the layer's own code is not.

        Layers made for inference (torchao's dynamic int8, bitsandbytes' 4-bit repacked for a CPU) give an output
        without a gradient; this one's is dy W0, as if the input had not been quantised. So is that of torchao's other
        layers, which would keep W0 unpacked for it.
        """
        if not (torch.is_grad_enabled() and x.requires_grad):
            return self.module(x)  # type: ignore[no-any-return]
        with torch.set_grad_enabled(has_gradient(self.module) and not keeps_unpacked(self.module)):
            y = self.module(x)
        return y if y.requires_grad else _StraightThrough.apply(x, y, self)  # type: ignore[no-any-return]

    def unbiased(self, x: Tensor) -> Tensor:
        """x W0^T without the bias: [..., in] to [..., out]."""
        if self.is_dense:
            return F.linear(x, self.weight.to(x.dtype))
        return self.without_bias(self.output(x))

    def without_bias(self, y: Tensor) -> Tensor:
        bias = self.bias
        return y if bias is None else y - bias.detach().to(y.device, y.dtype)

    def per_output(self, v: Tensor) -> Tensor:
        return v  # [out], the last axis of y

    def per_input(self, v: Tensor) -> Tensor:
        return v  # [in], the last axis of x

    def output_axis(self, y: Tensor) -> int:
        return y.dim() - 1

    def times_weight(self, A: Tensor) -> Tensor:
        """W0 A^T [out, r], float32, from A [r, in]: exact rows, or A's rows as r extra tokens."""
        rows = self.rows
        return self.products.of(A).T if rows is None else torch.cat([F.linear(part, A) for part in rows()])

    def transposed(self, dy: Tensor) -> Tensor:
        """dy W0: [..., out] to [..., in]."""
        rows = self.rows
        if rows is None:
            return torch.cat([dy @ part.to(dy.dtype).T for part in self.products.columns()], -1)
        dx, first = torch.zeros(*dy.shape[:-1], self.in_features, dtype=dy.dtype, device=dy.device), 0
        for part in rows():
            dx += dy[..., first : first + len(part)] @ part.to(dy.dtype)
            first += len(part)
        return dx

    def squared_norms(self, by_input: bool = False) -> Tensor:
        """||W0||^2 of every output row [out], or of every input column [in], float32.

        Raises TargetError for a layer that is no linear map.
        """
        rows = self.rows
        if rows is not None:
            squares = [part.square().sum(0 if by_input else 1) for part in rows()]
            return torch.stack(squares).sum(0) if by_input else torch.cat(squares)
        self.products.check_linear()
        squares = [part.square().sum(1 if by_input else 0) for part in self.products.columns()]
        return torch.cat(squares) if by_input else torch.stack(squares).sum(0)

    def dense_weight(self) -> Tensor:
        """W0 [out, in] in float32, also of a layer that keeps it packed."""
        if self.is_dense:
            return self.weight.detach().float()
        rows = self.rows
        return torch.cat(list(self.products.columns())).T if rows is None else torch.cat(list(rows()))


class FrozenConv1D(FrozenLinear):
    """A frozen transformers Conv1D, GPT-2's linear layer: its weight is [in, out]."""

    def _sizes(self) -> tuple[int, int]:
        n_in, n_out = self.module.weight.shape  # type: ignore[union-attr, misc]
        return n_in, n_out

    @property
    def is_dense(self) -> bool:
        return False

    @property
    def weight(self) -> Tensor:
        raise AdapterStateError("cannot fuse into a Conv1D: its weight is kept transposed. Keep the adapter unfused.")

    @property
    def rows(self) -> Rows:
        return lambda: float_rows(self.module.weight.T)  # type: ignore[union-attr, operator, arg-type]


class _StraightThrough(torch.autograd.Function):
    """y of a layer that gives no gradient, with the gradient dy W0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, frozen: FrozenLinear) -> Tensor:
        ctx.frozen = frozen
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        return ctx.frozen.transposed(dy), None, None


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

    @property
    def has_bias(self) -> bool:
        return self.module.bias is not None

    def _conv(self, x: Tensor, weight: Tensor) -> Tensor:
        return self.module._conv_forward(x, weight, None)

    def low_rank(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """The convolution with B A: [batch, in, h, w] to [batch, out, h', w']."""
        if self.module.groups == 1:
            return F.conv2d(self._conv(x, A), B)
        # Every group sees its own channels only, so B A is one grouped kernel and not two convolutions.
        BA = B.flatten(1) @ A.flatten(1)
        return self._conv(x, BA.reshape(self.module.weight.shape))

    def whole(self, x: Tensor, D: Tensor) -> Tensor:
        """The convolution with D in the shape of the weight."""
        return self._conv(x, D)

    def output(self, x: Tensor) -> Tensor:
        return self.module(x)  # type: ignore[no-any-return]

    def unbiased(self, x: Tensor) -> Tensor:
        return self._conv(x, self.weight.to(x.dtype))

    def without_bias(self, y: Tensor) -> Tensor:
        bias = self.module.bias
        return y if bias is None else y - self.per_output(bias.detach().to(y.dtype))

    def per_output(self, v: Tensor) -> Tensor:
        return v[:, None, None]  # [out, 1, 1]

    def per_input(self, v: Tensor) -> Tensor:
        return v.repeat(self.module.groups)[:, None, None]  # every group has its own channels for the kernel's

    def output_axis(self, y: Tensor) -> int:
        return y.dim() - 3

    def times_weight(self, A: Tensor) -> Tensor:
        return self.weight.flatten(1).float() @ A.T

    def transposed(self, dy: Tensor) -> Tensor:
        """dy W0 for dy [..., out] and W0 as a matrix: [..., in kh kw]."""
        return dy @ self.weight.flatten(1).to(dy.dtype)

    def squared_norms(self, by_input: bool = False) -> Tensor:
        W0 = self.weight.transpose(0, 1) if by_input else self.weight
        return W0.flatten(1).float().square().sum(1)

    def dense_weight(self) -> Tensor:
        return self.weight.detach().float()


def freeze_view(module: nn.Module) -> FrozenLayer | None:
    """The view of a layer that can be adapted, or None for every other module.

    None also for the out_proj of nn.MultiheadAttention: its owner reads its weight and never calls it, so that an
    adapter on it would do nothing.
    """
    if isinstance(module, nn.Conv2d):
        return FrozenConv2d(module)
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return None
    if type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils":
        return FrozenConv1D(module)
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if all(isinstance(size, int) and size > 0 for size in sizes):
        return FrozenLinear(module)
    return None
