"""A pair of adapters and the pictures they draw, which the page shows before anything was drawn.

Both adapters learned samples/openmoji on the embedded base; docs/make_example.py makes everything here.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["EXAMPLE"]

EXAMPLE = Path(__file__).resolve().parent
