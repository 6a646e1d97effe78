"""What makes these small models quick to train, on CPUs above all.

bfloat16 products are many times faster than float32 ones where the CPU has matrix units (AMX), and many times slower
where it has none and emulates them: there float32 is computed in. PyTorch's CPU backward of GroupNorm (channels last)
would take over a third of a step, so it is written here as three elementwise passes and two small sums.
"""

from __future__ import annotations

from functools import cache
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dora_diffusion.models.cautions import bf16_is_emulated


def pick_device(name: str) -> torch.device:
    """The asked-for device, or the best at hand for "auto"."""
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def quick_dtype(device_type: str) -> torch.dtype:
    """What products are computed in: bfloat16, or float32 on a CPU that would emulate it."""
    return torch.float32 if device_type == "cpu" and bf16_is_emulated() else torch.bfloat16


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 autocast for forward passes, where it is quick."""
    return torch.autocast(device.type, torch.bfloat16, enabled=quick_dtype(device.type) == torch.bfloat16)


class _GroupNorm(torch.autograd.Function):
    """Group normalisation of [N, C, H, W], channels last."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        groups: int,
        eps: float,
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        n, channels, height, width = x.shape
        y, mean, rstd = torch.native_group_norm(
            x, weight.to(x.dtype), bias.to(x.dtype), n, channels, height * width, groups, eps
        )
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.groups = groups
        return y

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        n, channels, height, width = x.shape
        groups, size = ctx.groups, channels // ctx.groups
        flat = (n, height * width, channels)
        rows = x.permute(0, 2, 3, 1).reshape(flat)
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_rows = grad.permute(0, 2, 3, 1).reshape(flat)
        mean, rstd = mean.float().unsqueeze(-1), rstd.float().unsqueeze(-1)  # [N, G, 1]
        sum_g = grad_rows.sum(1, dtype=torch.float32).view(n, groups, size)
        sum_gx = (grad_rows * rows).sum(1, dtype=torch.float32).view(n, groups, size)
        w = weight.float().view(1, groups, size)
        grad_weight = ((sum_gx - mean * sum_g) * rstd).sum(0).reshape(channels)
        dot_x, dot_1 = (sum_gx * w).sum(2, keepdim=True), (sum_g * w).sum(2, keepdim=True)
        count = height * width * size
        slope = (dot_1 * mean - dot_x) * rstd**3 / count
        shift = -slope * mean - dot_1 * rstd / count
        scale, slope, shift = (
            v.expand(n, groups, size).reshape(n, 1, channels).to(x.dtype) for v in (w * rstd, slope, shift)
        )
        dx = torch.addcmul(torch.addcmul(shift, grad_rows, scale), rows, slope)
        dx = dx.view(n, height, width, channels).permute(0, 3, 1, 2)
        return dx, grad_weight, sum_g.sum(0).reshape(channels), None, None


def _forward(self: nn.GroupNorm, x: Tensor) -> Tensor:
    if x.ndim == 4 and torch.is_grad_enabled():
        return _GroupNorm.apply(x, self.weight, self.bias, self.num_groups, self.eps)
    return F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)


def quicken(module: nn.Module, device: torch.device) -> nn.Module:
    """Channels-last weights, and on a CPU the quick GroupNorm; parameters keep their names."""
    if device.type == "cpu":
        for part in module.modules():
            if isinstance(part, nn.GroupNorm):
                part.forward = MethodType(_forward, part)  # type: ignore[method-assign]
    return module.to(device, memory_format=torch.channels_last)
