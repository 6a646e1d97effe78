"""An adapter file for the commands."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dora_diffusion.adapters.injection import AdapterConfig, inject_adapter
from dora_diffusion.formats.files import save_adapter
from dora_diffusion.models.loading import Base


@pytest.fixture
def adapter_file(sd_base: Base, tmp_path: Path) -> Path:
    adapter = inject_adapter(sd_base.denoiser, AdapterConfig(rank=2, alpha=2.0), seed=0)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.1)
    return save_adapter(adapter, tmp_path / "dora.safetensors")
