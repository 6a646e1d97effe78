"""What DoRA costs here and elsewhere: `python -m benchmarks.step` and `python -m benchmarks.layers`."""

import os

# Before anything imports diffusers: its advice on loading and casting is for users of pretrained weights.
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
