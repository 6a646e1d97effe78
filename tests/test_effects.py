"""What `inspect --base` says of adapters that are not what they look like, beside numpy's norms of the raw weights."""

from __future__ import annotations

from pathlib import Path

import bases
import numpy as np
import pytest
import torch
from oracles import perturb
from safetensors.torch import load_file, save_file
from stock_diffusers import pipeline_around

from dora_diffusion.adapters.injection import AdapterConfig, inject_adapter
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import save_adapter
from dora_diffusion.inspection.look import look_at
from dora_diffusion.models.loading import Base

TARGETS = (r"down_blocks\.0\..*attn[12]\.(to_q|to_v)", r"down_blocks\.1\..*(conv1|conv_shortcut)")
START = "magnitudes that are ||W0||"
PLAIN = "a plain LoRA in effect"


@pytest.fixture
def base() -> Base:
    return Base("small", pipeline_around(bases.unet()))  # type: ignore[arg-type]


def norms(weight: torch.Tensor, axis: int) -> torch.Tensor:
    others = tuple(a for a in range(weight.dim()) if a != axis)
    return torch.from_numpy(np.sqrt((weight.detach().double().numpy() ** 2).sum(others)))


def dora(base: Base, folder: Path, which: str, axis: str = "output", size: float = 0.1) -> Path:
    """A trained DoRA in kohya's keys whose magnitudes are those of W0, those of V, or its own."""
    config = AdapterConfig("dora", rank=3, alpha=6.0, norm_axis=axis, target_modules=TARGETS)  # type: ignore[arg-type]
    adapter = perturb(inject_adapter(base.denoiser, config, seed=3), seed=3, size=size)
    path = save_adapter(adapter, folder / "own.safetensors")
    adapter.eject()
    path = convert_adapter(path, folder / "kohya.safetensors", "kohya").path
    tensors = load_file(path)
    for key in [key for key in tensors if key.endswith(".dora_scale")]:
        module = key.removesuffix(".dora_scale")
        layer = next(n for n in base.denoiser.state_dict() if f"lora_unet_{n}".replace(".", "_") == f"{module}_weight")
        W0 = base.denoiser.state_dict()[layer]
        up, down = (tensors[f"{module}.lora_{which}.weight"].flatten(1) for which in ("up", "down"))
        V = W0 + (tensors[f"{module}.alpha"] / down.shape[0] * up @ down).reshape(W0.shape)
        weight = {"start": W0, "plain": V}.get(which)
        if weight is not None:
            made = norms(weight, 0 if axis == "output" else 1).float()
            tensors[key] = made.reshape(tensors[key].shape)
    save_file(tensors, path)
    return path


def notes(path: Path, base: Base | None) -> str:
    return " ".join(look_at([path], base)[0][0].notes)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("axis", ["output", "input"])
def test_magnitudes_that_are_no_trained_ones_are_said(base, tmp_path, axis, dtype):
    for which, said in (("start", START), ("plain", PLAIN), ("own", "")):
        path = dora(base, tmp_path, which, axis)
        path = convert_adapter(path, tmp_path / f"{which}.safetensors", "kohya", dtype=dtype).path
        found = notes(path, base)
        for each in (START, PLAIN):
            assert (f"all layers have {each}" in found or each in found) == (each == said), (which, found)
        if which == "start":
            assert "OneTrainer#1666" in found


def test_without_the_base_nothing_is_claimed(base, tmp_path):
    for which in ("start", "plain"):
        found = notes(dora(base, tmp_path, which), None)
        assert START not in found and PLAIN not in found


def test_some_layers_are_counted(base, tmp_path):
    path = dora(base, tmp_path, "start")
    tensors, other = load_file(path), load_file(dora(base, tmp_path, "own"))
    first = sorted(key for key in tensors if key.endswith("dora_scale"))[0]
    tensors[first] = other[first]
    save_file(tensors, path)
    count = sum(key.endswith("dora_scale") for key in tensors)
    assert f"{count - 1} of {count} layers have {START}" in notes(path, base)


def test_an_update_too_small_to_tell_is_nothing_to_claim(base, tmp_path):
    path = dora(base, tmp_path, "start", size=1e-7)
    found = notes(path, base)
    assert START not in found and PLAIN not in found


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_as_training_starts_does_nothing(base, tmp_path, kind):
    adapter = inject_adapter(base.denoiser, AdapterConfig(kind, rank=3, target_modules=TARGETS), seed=3)
    path = save_adapter(adapter, tmp_path / "zero.safetensors")
    adapter.eject()
    assert "all layers do nothing: their update is zero" in notes(path, base)
    trained = perturb(inject_adapter(base.denoiser, AdapterConfig(kind, rank=3, target_modules=TARGETS)), seed=3)
    path = save_adapter(trained, tmp_path / "trained.safetensors")
    trained.eject()
    assert "do nothing" not in notes(path, base)
