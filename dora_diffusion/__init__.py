"""DoRA and LoRA adapters for diffusion models: train them, compare them, load them anywhere."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dora_diffusion.adapters.injection import Adapter, AdapterConfig, inject_adapter
    from dora_diffusion.errors import DoraDiffusionError
    from dora_diffusion.formats.files import AdapterFile, load_adapter, read_adapter_file, save_adapter
    from dora_diffusion.generation import GenerationRequest, generate
    from dora_diffusion.models.loading import load_base
    from dora_diffusion.training.config import TrainConfig
    from dora_diffusion.training.run import train

__version__ = "0.1.0"

# Loaded on first use: `import dora_diffusion` stays quick and pulls in no pipeline and no web app.
_HOME = {
    "Adapter": "adapters.injection",
    "AdapterConfig": "adapters.injection",
    "AdapterFile": "formats.files",
    "DoraDiffusionError": "errors",
    "GenerationRequest": "generation",
    "TrainConfig": "training.config",
    "generate": "generation",
    "inject_adapter": "adapters.injection",
    "load_adapter": "formats.files",
    "load_base": "models.loading",
    "read_adapter_file": "formats.files",
    "save_adapter": "formats.files",
    "train": "training.run",
}

__all__ = [
    "Adapter",
    "AdapterConfig",
    "AdapterFile",
    "DoraDiffusionError",
    "GenerationRequest",
    "TrainConfig",
    "generate",
    "inject_adapter",
    "load_adapter",
    "load_base",
    "read_adapter_file",
    "save_adapter",
    "train",
]


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(f"dora_diffusion.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dora_diffusion' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
