"""Peak memory of one variant, in a process of its own.

`python -m benchmarks.memory CASE VARIANT RANK MODE DEVICE DTYPE` does two steps and prints the peak in MB. On the CPU
it is the process's largest resident size, on CUDA the allocator's peak. The difference to the frozen base's own
process is what a variant costs.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import torch

__all__ = ["peak_in_own_process"]

ROOT = Path(__file__).parent.parent


def peak_in_own_process(case: str, variant: str, rank: int, mode: str, device: str, dtype: str, threads: int) -> float:
    """Peak MB. Raises RuntimeError with the process's own words when it fails, such as for want of memory."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", case, variant, str(rank), mode, device, dtype],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or [f"ended by signal {-done.returncode}"]
        raise RuntimeError(f"measuring the memory of {variant} in {case} failed: {last[0]}")
    return float(done.stdout.split()[-1])


def _peak_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():
        # Linux hands a process its parent's ru_maxrss at the start; VmHWM is its own.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _main(case_name: str, variant: str, rank: str, mode: str, device_name: str, dtype_name: str) -> None:
    from benchmarks.cases import LAYER_CASES, STEP_CASES
    from benchmarks.variants import VARIANTS, adapt, preload
    from benchmarks.workload import prepare

    preload()  # every process imports the same libraries, whichever of them it runs
    case = {**STEP_CASES, **LAYER_CASES}[case_name]
    device, dtype = torch.device(device_name), getattr(torch, dtype_name)
    workload = prepare(case, device, dtype)
    adapted = adapt(VARIANTS[variant], workload.base, case.targets, workload.layers, int(rank))
    workload.enter(adapted, mode)
    for _ in range(2):
        workload.before(adapted, mode)
        workload.run(adapted, mode)
    print(_peak_mb(device))


if __name__ == "__main__":
    _main(*sys.argv[1:])
