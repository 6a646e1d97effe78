"""What both suites of the web app need: a pair of adapters that visibly do something, and pictures to upload."""

from __future__ import annotations

from pathlib import Path

import torch

from dora_diffusion import AdapterConfig, inject_adapter, save_adapter
from dora_diffusion.models.loading import Base

SAMPLES = Path(__file__).parent.parent / "samples" / "openmoji"


def make_pair(base: Base, folder: Path, rank: int = 4) -> tuple[Path, Path]:
    """lora.safetensors and dora.safetensors with random values other than zero, as if trained."""
    paths = []
    for kind in ("lora", "dora"):
        torch.manual_seed(0)
        adapter = inject_adapter(base.denoiser, AdapterConfig(kind=kind, rank=rank, alpha=float(rank)))
        with torch.no_grad():
            for name, parameter in adapter.named_parameters().items():
                if name.endswith("lora_B"):
                    parameter.normal_(0, 0.1)
        paths.append(save_adapter(adapter, folder / f"{kind}.safetensors", base_name=base.name))
        adapter.eject()
    return paths[0], paths[1]


def sample_files(pictures: int, captions: bool = True) -> list[Path]:
    chosen = sorted(SAMPLES.glob("*.png"))[:pictures]
    return chosen + ([path.with_suffix(".txt") for path in chosen] if captions else [])
