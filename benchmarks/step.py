"""`python -m benchmarks.step`: whole training steps and forward passes of diffusion models."""

from __future__ import annotations

from benchmarks.cases import STEP_CASES
from benchmarks.command import Benchmark, command_of

STEP = Benchmark(
    name="step",
    about="Time training steps and inference of whole models under each library's LoRA and DoRA, side by side.",
    cases=STEP_CASES,
    defaults={
        "cpu": ("sd15-32", "sd15-64", "sdxl-32", "flux-256"),
        "cuda": ("sd15-64", "sdxl-128", "flux-4096"),
    },
    quick=("sd15slice-32",),
    rounds=7,
    quick_rounds=3,
    modes=("handling", "training", "inference"),
)

if __name__ == "__main__":
    command_of(STEP)()
