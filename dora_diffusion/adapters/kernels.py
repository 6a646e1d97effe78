"""The formulas of layers.py as fused functions: the same numbers, quicker, and with less kept for the backward.

The plain formula costs a DoRA layer several passes over its output and an activation more than LoRA. Written by hand
(names as in layers.py; h = x A^T, g = m / n, y0 = x W0^T):

    y  = y0 + (g - 1) y0 + h (s g B)^T + b
    dx = (g dy) W0 + dh A             dh = dy (s g B)
    dA = dh^T x                       dB = s g (dy^T h)            dm = sum_t dy (y - b) / m

The last needs nothing but the output, which attention keeps anyway (n is a constant: Liu et al. 2024, section 4.3).
LoRA is g = 1, without dm. Where tokens far outnumber the rank, in float32, one product with the merged weight
g (W0 + s B A) replaces all that; in half precision merging would round small updates away. layers.py decides when
these functions apply; tests/test_kernels.py holds them to float64 arithmetic. docs/engine.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = [
    "adapted_linear",
    "column_norms",
    "linear_without_gradients",
    "norm_ratio",
    "pays_to_merge",
    "row_norms",
]

# Below this a row counts as zero; it keeps m / n finite where a row of W0 is zero and B still is.
NORM_FLOOR = 1e-12

Context = Any  # torch.autograd.function.FunctionCtx, on which PyTorch's own stubs allow nothing to be set


def row_norms(base_squared: Tensor, W0_At: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """||W0 + s B A|| of every output row without building B A.

    base_squared [out] is ||W0||^2 per row, W0_At [out, r] is W0 A^T, A [r, in], B [out, r]; all float32. Returns [out].
    The square of a sum, written out: ||W0||^2 + 2 s <W0, BA> + s^2 ||BA||^2 = ||W0||^2 + <(2 s W0 + s^2 BA) A^T, B>.
    """
    growth = torch.addmm(W0_At, B, A @ A.T, beta=2 * s, alpha=s * s)  # [out, r]
    return (base_squared + (growth * B).sum(1)).clamp_min_(0).sqrt_()


def column_norms(base_squared: Tensor, Bt_W0: Tensor, A: Tensor, B: Tensor, s: float) -> Tensor:
    """||W0 + s B A|| of every input column without building B A.

    base_squared [in] is ||W0||^2 per column, Bt_W0 [r, in] is B^T W0, A [r, in], B [out, r]; of a convolution A
    [r, in, kh, kw], Bt_W0 [r, in kh kw], and the norm runs over the kernel too. All float32. Returns [in].
    """
    flat = A.flatten(1)
    growth = torch.addmm(Bt_W0, B.T @ B, flat, beta=2 * s, alpha=s * s)
    grown = (growth * flat).sum(0).reshape(A.shape[1], -1).sum(1)
    return (base_squared + grown).clamp_min_(0).sqrt_()


def norm_ratio(m: Tensor, n: Tensor) -> Tensor:
    """g = m / n, float32; 0 for a row or column that is zero, never NaN."""
    return torch.where(n > NORM_FLOOR, m.float() / n.clamp_min(NORM_FLOOR), 0.0)


def pays_to_merge(x: Tensor, W0: Tensor) -> bool:
    """Whether making the merged weight, once forward and once backward, costs less than low-rank products by token.

    x [tokens, in], W0 [out, in]. Never in half precision.
    """
    return x.dtype in (torch.float32, torch.float64) and len(x) * sum(W0.shape) > 2 * W0.numel()


def _scaled_up(B: Tensor, s: float, g: Tensor | None) -> Tensor:
    """s g B, [out, r]."""
    return B * s if g is None else B * (s * g)[:, None]


def _stretched(v: Tensor, g: Tensor | None, unbiased: Tensor | None = None) -> Tensor:
    """v + (g - 1) v: g v, rounded less in half precision, and v's own bits where g is 1."""
    return v if g is None else torch.addcmul(v, v if unbiased is None else unbiased, (g - 1).to(v.dtype))


class _AdaptedLinear(torch.autograd.Function):
    """y = g (x (W0 + s B A)^T) + b over rows x [tokens, in]; m and base_squared are None for LoRA, where g = 1."""

    @staticmethod
    def forward(
        ctx: Context,
        x: Tensor,
        W0: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        m: Tensor | None,
        base_squared: Tensor | None,
        s: float,
    ) -> Tensor:
        ctx.s, ctx.merges = s, pays_to_merge(x, W0)
        y, g, h = (_merged_forward if ctx.merges else _split_forward)(x, W0, bias, A, B, m, base_squared, s)
        ctx.save_for_backward(x, W0, bias, A, B, m, g, h, None if m is None else y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W0, bias, A, B, m, g, h, y = ctx.saved_tensors
        A_, up = A.to(x.dtype), _scaled_up(B, ctx.s, g).to(x.dtype)
        dh = dy @ up  # [tokens, r]
        dA = (dh.T @ x).to(A.dtype)
        h = x @ A_.T if h is None else h
        dB = _scaled_up((dy.T @ h).to(B.dtype), ctx.s, g)
        dm = _magnitude_gradient(dy, y, bias, m) if ctx.needs_input_grad[5] else None
        dx = None
        if ctx.needs_input_grad[0] and ctx.merges:
            dx = dy @ torch.addmm(W0 if g is None else W0 * g[:, None], up, A_)
        elif ctx.needs_input_grad[0]:
            dx = (_stretched(dy, g) @ W0).addmm_(dh, A_)
        return dx, None, None, dA, dB, dm, None, None


Forward = tuple[Tensor, Tensor | None, Tensor | None]  # y, g and, if it was made, h


def _merged_forward(
    x: Tensor, W0: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, m: Tensor | None, squared: Tensor | None, s: float
) -> Forward:
    V = torch.addmm(W0, B, A, alpha=s)  # [out, in]
    if m is None:
        return F.linear(x, V, bias), None, None
    n = V.square().sum(1).sqrt()  # summed as ||W0|| is, so that the start has the base's bits
    g = norm_ratio(m, n)
    return F.linear(x, V.mul_(g[:, None]), bias), g, None


def _split_forward(
    x: Tensor, W0: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, m: Tensor | None, squared: Tensor | None, s: float
) -> Forward:
    A_ = A.to(x.dtype)
    h = x @ A_.T  # [tokens, r]
    if m is None or squared is None:
        y = F.linear(x, W0, bias)
        return y.addmm_(h, _scaled_up(B, s, None).to(x.dtype).T), None, h
    if x.dtype == torch.float32 and bias is None:
        # A's rows as further tokens: W0, which is what a product of few rows waits for, is read once.
        tokens = x.shape[0]
        y, W0_At = F.linear(torch.cat((x, A)), W0).split((tokens, A.shape[0]))
    else:
        y, W0_At = F.linear(x, W0, bias), F.linear(A.float(), W0.float())
    n = row_norms(squared, W0_At.T, A.float(), B.float(), s)
    g = norm_ratio(m, n)
    y = _stretched(y, g, None if bias is None else y - bias)
    return y.addmm_(h, _scaled_up(B, s, g).to(x.dtype).T), g, h


def _magnitude_gradient(dy: Tensor, y: Tensor, bias: Tensor | None, m: Tensor) -> Tensor:
    """sum_t dy (y - b) / m, [out]. 0 where m is 0: on a CPU layers.py keeps such a layer away from here, on a GPU
    looking for one would make it wait."""
    total = (dy * (y if bias is None else y - bias)).sum(0, dtype=torch.float32)
    return torch.where(m == 0, 0.0, total / m).to(m.dtype)


def adapted_linear(
    x: Tensor,
    W0: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    s: float,
    m: Tensor | None = None,
    base_squared: Tensor | None = None,
) -> Tensor:
    """x [..., in] through a linear layer with one adapter at strength 1: [..., out], differentiable in x, A, B and m.

    W0 [out, in] and bias [out] are frozen; A [r, in], B [out, r]; for DoRA m [out] and ||W0||^2 [out], float32. Under
    autocast the products run in its dtype, and the norm in float32.
    """
    dtype = _compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        bias = None if bias is None else bias.to(dtype)
        y = _AdaptedLinear.apply(rows, W0.to(dtype), bias, A, B, m, base_squared, s)
    return y.view(*x.shape[:-1], y.shape[-1])


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a product with x runs in, autocast heeded."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def linear_without_gradients(
    x: Tensor, W0: Tensor, bias: Tensor | None, changes: Sequence[tuple[Tensor, Tensor, Tensor | None]]
) -> Tensor:
    """x [..., in] through a linear layer with any number of adapters at any strengths: [..., out].

    A change is (A [r, in], w s g B [out, r], w (g - 1) [out] or None for LoRA), at strength w.
    """
    dtype = _compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        rows, W0 = x.reshape(-1, x.shape[-1]).to(dtype), W0.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        stretches = [stretch for _, _, stretch in changes if stretch is not None]
        stretch = torch.stack(stretches).sum(0).to(dtype) if stretches else None  # sum_k w_k (g_k - 1)
        if pays_to_merge(rows, W0):
            W = W0.clone() if stretch is None else torch.addcmul(W0, W0, stretch[:, None])
            for A, B, _ in changes:
                W.addmm_(B.to(dtype), A.to(dtype))
            y = F.linear(rows, W, bias)
        else:
            y = F.linear(rows, W0, bias)
            if stretch is not None:
                y.addcmul_(y if bias is None else y - bias, stretch)
            for A, B, _ in changes:
                y.addmm_(rows @ A.to(dtype).T, B.to(dtype).T)
    return y.view(*x.shape[:-1], y.shape[-1])
