"""What costs more on this machine than people expect of it, said before the start.

Measured on Stable Diffusion 1.5 at 256 pixels, batch 1, on two cores: the most memory, and the time of a step.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from dora_diffusion.models.quantising import Packing

__all__ = ["bf16_is_emulated", "cautions"]

# What Linux calls the units: of Intel and AMD; of ARM.
BF16_UNITS = frozenset({"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"})
SLOWER = 3.0  # than float32, from which on bf16 is certainly not computed by units of its own


def cautions(
    device: torch.device, packing: Packing | None, *, precision: str = "no", trains: bool = False
) -> tuple[str, ...]:
    """Sentences, none where all is as expected.

    `precision` is the mixed precision that was asked for; `trains` says what the base is loaded for.
    """
    found = []
    if packing == "int8" and trains and device.type == "cpu":
        found.append(
            "quantise = 'int8': a training on a CPU needs no less memory with it than without (5.3 GB and 5.2); nf4 "
            "needs 4.7."
        )
    if precision == "bf16" and device.type == "cpu" and bf16_is_emulated():
        found.append(
            "mixed_precision = 'bf16': this CPU has no units for bf16 and emulates it, so that a step took 19 times as "
            "long (190 seconds instead of 10). 'auto' computes in float32 here."
        )
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        found.append(f"{torch.cuda.get_device_name(device)} has no units for bf16 and emulates it, which is slow.")
    return tuple(found)


def bf16_is_emulated(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether this CPU computes bf16 without units of its own: as Linux says, elsewhere by a short measurement."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()}
    if flags:
        return not flags & BF16_UNITS
    return _seconds(torch.bfloat16) > SLOWER * _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    """The least of three products of 256 x 256 numbers."""
    a = torch.randn(256, 256).to(dtype)
    spent = []
    for _ in range(3):
        began = time.perf_counter()
        a @ a
        spent.append(time.perf_counter() - began)
    return min(spent)
