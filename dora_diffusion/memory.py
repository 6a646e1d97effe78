"""Memory that did not suffice, said as what to do about it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from dora_diffusion.errors import NotEnoughMemoryError

__all__ = ["give_back", "not_enough", "ran_out", "within_memory"]

Result = TypeVar("Result")

# What PyTorch and the libraries below it say in a plain RuntimeError: a CPU's allocator, MPS, cuBLAS and cuDNN.
SAID = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")


def ran_out(error: Exception) -> bool:
    """Whether the machine's or the GPU's memory was too small for what was asked."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in SAID)


def not_enough(task: str, device: torch.device, ways: Sequence[str]) -> NotEnoughMemoryError:
    """The error that says what did not fit where, and what would need less.

    Raise it outside the `except` that caught the first error: that one's traceback holds on to all that was computed.
    """
    where = "this machine"
    if device.type == "cuda":
        torch.cuda.empty_cache()
        where = f"{device} ({torch.cuda.get_device_properties(device).total_memory / 1e9:.1f} GB)"
    elif device.type != "cpu":
        where = str(device)
    return NotEnoughMemoryError(f"not enough memory on {where} {task}. What needs less: {'; '.join(ways)}.")


def give_back() -> None:
    """Hand the system what was freed: glibc's allocator keeps it, which after a base was packed is gigabytes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def within_memory(compute: Callable[[], Result], task: str, device: torch.device, ways: Sequence[str]) -> Result:
    """What `compute` gives. Raises the error of `not_enough`, and what `compute` raises of other kinds."""
    try:
        return compute()
    except Exception as error:
        if not ran_out(error):
            raise
    raise not_enough(task, device, ways)
