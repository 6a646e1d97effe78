"""8-bit floats of a file as float32, which holds each of their values; ComfyUI's scales beside them multiplied in."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["DTYPES", "as_float32"]

DTYPES = ("F8_E4M3", "F8_E5M2")
_TORCH = (torch.float8_e4m3fn, torch.float8_e5m2)
_SCALES = ("scale_weight", "weight_scale")  # ComfyUI's names for one number beside "….weight"
_MARK = "scaled_fp8"  # an empty tensor that says that there are scales


def as_float32(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors with those of 8 bits in float32, and what is worth saying of it.

    Raises ValueError for a scale that is not one number, or that stands beside no 8-bit tensor.
    """
    eight = [key for key, tensor in tensors.items() if tensor.dtype in _TORCH and key.rpartition(".")[2] != _MARK]
    scales = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[2] in _SCALES}
    made = {key: tensor for key, tensor in tensors.items() if key not in scales and key.rpartition(".")[2] != _MARK}
    for key in eight:
        made[key] = tensors[key].float()
    for key, scale in scales.items():
        weight = key.rpartition(".")[0] + ".weight"
        if weight not in eight or scale.numel() != 1:
            raise ValueError(f"{key} {list(scale.shape)} is no scale of an 8-bit {weight}")
        made[weight] = made[weight] * scale.float().reshape(())
    return made, [_note(len(eight), len(scales))] if eight else []


def _note(count: int, scales: int) -> str:
    scaled = f", and {scales} are multiplied by the scale beside them" if scales else ""
    return f"{count} tensors are 8-bit floats, read as the float32 of the same value{scaled}"
