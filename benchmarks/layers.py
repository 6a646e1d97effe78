"""`python -m benchmarks.layers`: single layers of the shapes that diffusion models are made of."""

from __future__ import annotations

from benchmarks.cases import LAYER_CASES
from benchmarks.command import Benchmark, command_of

_ALL = tuple(name for name in LAYER_CASES if not name.startswith("tiny"))

LAYERS = Benchmark(
    name="layers",
    about="Time single layers under each library's LoRA and DoRA, side by side.",
    cases=LAYER_CASES,
    defaults={"cpu": _ALL, "cuda": _ALL},
    quick=("sd15-4096x320", "sd15-256x1280", "sd15-77x768", "conv-64x320"),
    rounds=11,
    quick_rounds=5,
    modes=("training", "inference"),
)

if __name__ == "__main__":
    command_of(LAYERS)()
