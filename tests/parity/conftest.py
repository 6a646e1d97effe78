"""A small UNet and adapter files for it."""

from __future__ import annotations

from pathlib import Path

import bases
import pytest
from oracles import perturb
from stock_diffusers import pipeline_around

from dora_diffusion.adapters.injection import AdapterConfig, inject_adapter
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import save_adapter
from dora_diffusion.models.loading import Base

TARGETS = (
    r"down_blocks\.0\.attentions\.0\..*attn[12]\.(to_q|to_out\.0)",
    r"down_blocks\.0\..*ff\.net\.\d(\.proj)?",
    r"down_blocks\.1\..*(conv1|conv_shortcut)",
)


@pytest.fixture
def base() -> Base:
    return Base("small", pipeline_around(bases.unet()))  # type: ignore[arg-type]


@pytest.fixture
def peft_file(base: Base, tmp_path: Path):  # type: ignore[no-untyped-def]
    """A DoRA or LoRA in PEFT's keys, as if trained, alpha not equal to the rank, other ranks and alphas in a layer."""

    def make(kind: str = "dora", name: str = "adapter", **options: object) -> Path:
        config = AdapterConfig(kind, rank=4, alpha=6.0, target_modules=TARGETS, **options)  # type: ignore[arg-type]
        adapter = perturb(inject_adapter(base.denoiser, config, seed=3), seed=3)
        path = save_adapter(adapter, tmp_path / f"{name}.safetensors")
        adapter.eject()
        return path

    return make


@pytest.fixture
def kohya_file(peft_file, tmp_path: Path):  # type: ignore[no-untyped-def]
    """The same in kohya's keys, magnitudes [out, 1]."""

    def make(kind: str = "dora", **options: object) -> Path:
        return convert_adapter(peft_file(kind, **options), tmp_path / f"{kind}_kohya.safetensors", "kohya").path

    return make
