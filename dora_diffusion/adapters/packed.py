"""The rows of a weight that a library keeps packed: as float32, some at a time, with no copy kept.

bitsandbytes NF4, FP4 and LLM.int8, and tensor subclasses that can dequantise themselves (torchao). A layer that
quantises its input too (LLM.int8 in eval mode, torchao's dynamic int8) gives only rough products, so the norm of
DoRA is taken from these rows. Other packed layers need nothing here: frozen.py asks them for products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dora_diffusion.errors import TargetError

__all__ = ["Rows", "float_rows", "has_gradient", "keeps_unpacked", "packed_rows"]

Rows = Callable[[], Iterator[Tensor]]  # W0 from its first row to its last, in chunks [rows, in], float32
CHUNK = 1 << 24  # values unpacked at a time: 64 MiB


def float_rows(weight: Tensor) -> Iterator[Tensor]:
    """The rows of a dense weight [out, in] in float32."""
    return (part.float() for part in weight.detach().split(_rows_at_a_time(weight.shape[1])))


def packed_rows(module: nn.Module, out_features: int, in_features: int) -> Rows | None:
    """How to read the rows of this layer's weight, or None if its packing is not known here. Unpacks nothing yet.

    Raises TargetError for a bitsandbytes layer that waits for its device before it quantises.
    """
    weight, shape = getattr(module, "weight", None), (out_features, in_features)
    if not isinstance(weight, Tensor):
        return None
    if type(weight).__name__ == "Params4bit":
        state = weight.quant_state  # type: ignore[attr-defined]
        if state is None:
            raise TargetError(
                f"cannot adapt a {type(module).__name__} that is not quantised yet: bitsandbytes does that when the "
                "layer goes to its device. Call model.to(device) first, also where the device is the CPU."
            )
        rows = _rows_of_4bit if has_gradient(module) else _rows_of_4bit_on_cpu
        return (lambda: rows(weight, state)) if tuple(state.shape) == shape else None
    if type(weight).__name__ == "Int8Params":
        codes, scales = _int8_state(module, weight)
        return None if codes is None or scales is None else (lambda: _rows_of_int8(codes, scales))
    dequantises = _dequantises(weight) and tuple(weight.shape) == shape
    # A forward of the layer's own, or a scale on its input (AWQ), may make another matrix of the same tensor.
    plain = type(module).forward is nn.Linear.forward and getattr(weight, "act_pre_scale", None) is None
    return (lambda: float_rows(weight.dequantize())) if dequantises and plain else None


def has_gradient(module: nn.Module) -> bool:
    """False for a 4-bit layer that bitsandbytes has repacked for inference on a CPU; it may even fail in training."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    return not getattr(state, "packing_format_for_cpu", False)


def keeps_unpacked(module: nn.Module) -> bool:
    """Whether autograd would keep the weight unpacked until the backward pass, as it does of torchao's."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and _dequantises(weight) and type(module).forward is nn.Linear.forward


def _dequantises(weight: Tensor) -> bool:
    return type(weight).dequantize is not Tensor.dequantize


def _rows_at_a_time(in_features: int) -> int:
    return max(1, CHUNK // in_features)


def _rows_of_4bit(weight: Tensor, state: Any) -> Iterator[Tensor]:
    from bitsandbytes import functional as bnb

    absmax, block = state.absmax, state.blocksize
    if state.nested:
        absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
    out_features, in_features = state.shape
    codes = weight.data.contiguous().view(torch.uint8).flatten()  # two values a byte
    # Where rows are no whole number of blocks, bitsandbytes' CPU code scales by the wrong blocks, and a part of the
    # matrix by others than the whole: then only the whole is what the layer multiplies with.
    step = _rows_at_a_time(in_features) if in_features % block == 0 else out_features
    for row in range(0, out_features, step):
        rows = min(step, out_features - row)
        first, last = row * in_features, (row + rows) * in_features
        part = bnb.QuantState(
            absmax=absmax[first // block : -(-last // block)].float(),
            shape=torch.Size((rows, in_features)),
            code=state.code,
            blocksize=block,
            quant_type=state.quant_type,
            dtype=torch.float32,
        )
        yield bnb.dequantize_4bit(codes[first // 2 : -(-last // 2)].view(-1, 1), part)


def _rows_of_4bit_on_cpu(weight: Tensor, state: Any) -> Iterator[Tensor]:
    """The order that the first forward without gradients leaves the codes in on a CPU with AVX512-BF16.

    A byte of 32 holds one column of a row in its low half and of the row 16 further down in its high half, columns in
    pairs; bitsandbytes' own way back would quantise the scales anew.
    """
    out_features, in_features = state.shape
    codes = weight.data.view(torch.uint8).reshape(out_features // 32, in_features // 2, 32)
    step = max(1, _rows_at_a_time(in_features) // 32)
    for part, absmax in zip(codes.split(step), state.absmax.T.split(32 * step), strict=True):
        scale = absmax.float().repeat_interleave(state.blocksize, 1)
        pairs = torch.cat((part & 15, part >> 4), -1).view(-1, in_features // 2, 32, 2)
        yield state.code[pairs.transpose(1, 2).reshape(-1, in_features).int()] * scale


def _int8_state(module: nn.Module, weight: Any) -> tuple[Tensor | None, Tensor | None]:
    """The codes and the scales of a Linear8bitLt, which its first forward moves from the weight to the state."""
    state = module.state
    return (state.CB, state.SCB) if weight.CB is None else (weight.CB, weight.SCB)  # type: ignore[union-attr, return-value]


def _rows_of_int8(codes: Tensor, scales: Tensor) -> Iterator[Tensor]:
    step = _rows_at_a_time(codes.shape[1])
    for part, scale in zip(codes.split(step), scales.float().split(step), strict=True):
        yield part.float() * (scale / 127)[:, None]
