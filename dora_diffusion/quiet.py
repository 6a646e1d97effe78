"""Libraries' notes on optional packages and deprecations, kept off the user's screen; their errors still show."""

from __future__ import annotations

import logging
import os

__all__ = ["quieten"]

LIBRARIES = ("bitsandbytes", "diffusers", "torch.utils._pytree", "torchao", "transformers")


def quieten() -> None:
    """Best called before the libraries are imported: most notes are written then. DORA_DIFFUSION_VERBOSE shows them."""
    if "DORA_DIFFUSION_VERBOSE" in os.environ:
        return
    for library in LIBRARIES:
        logging.getLogger(library).setLevel(logging.ERROR)
    for library in ("DIFFUSERS", "TRANSFORMERS"):  # they set their own levels when they are imported
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
