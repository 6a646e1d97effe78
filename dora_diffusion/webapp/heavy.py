"""torch, diffusers and what needs them: loaded after the server is up, once, and by one thread at a time.

Python lets two threads that import modules of one circle see each other's unfinished ones, so no callback imports them
by itself before `ready()` has returned.
"""

from __future__ import annotations

import importlib
import threading

__all__ = ["ready"]

MODULES = (
    "dora_diffusion.models.loading",
    "dora_diffusion.models.reading",
    "dora_diffusion.generation",
    "dora_diffusion.comparison.compare",
    "dora_diffusion.comparison.card",
    "dora_diffusion.comparison.report",
    "dora_diffusion.comparison.sweep",
    "dora_diffusion.comparison.estimate",
    "dora_diffusion.training.run",
    "dora_diffusion.demo",
    "dora_diffusion.inspection.look",
    "dora_diffusion.inspection.parity",
    "dora_diffusion.inspection.plots",
)
_lock = threading.Lock()
_loaded = threading.Event()


def ready() -> None:
    """Return when everything is loaded."""
    if _loaded.is_set():
        return
    with _lock:
        if not _loaded.is_set():
            for module in MODULES:
                importlib.import_module(module)
            _loaded.set()
