"""The way in: what the rest of the package and its users call of the adapter files."""

from __future__ import annotations

from dora_diffusion.formats.content import AdapterFile
from dora_diffusion.formats.loading import Fit, attach, attach_trainable, check_fits, denoiser_of, fit_of, load_adapter
from dora_diffusion.formats.reading import check_adapter, read_adapter_file, read_what_fits
from dora_diffusion.formats.writing import save_adapter

__all__ = [
    "AdapterFile",
    "Fit",
    "attach",
    "attach_trainable",
    "check_adapter",
    "check_fits",
    "denoiser_of",
    "fit_of",
    "load_adapter",
    "read_adapter_file",
    "read_what_fits",
    "save_adapter",
]
