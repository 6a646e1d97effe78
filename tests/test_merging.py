"""Adapters written into a base's weights for good, beside what stock diffusers makes of the same files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from oracles import config_of, largest_difference, output_of, perturb
from safetensors.torch import load_file
from torch import nn
from typer.testing import CliRunner

from dora_diffusion.adapters.injection import Adapter, inject_adapter
from dora_diffusion.adapters.layers import AdaptedLayer
from dora_diffusion.cli import app
from dora_diffusion.errors import AdapterStateError, ConfigError
from dora_diffusion.formats.files import load_adapter, save_adapter
from dora_diffusion.models.loading import Base, load_base
from dora_diffusion.models.merging import save_merged


def put_in(model: nn.Module, kind: str, seed: int) -> Adapter:
    return perturb(inject_adapter(model, config_of(kind), name=f"{kind}_{seed}"), seed)


@pytest.fixture
def files(sd_folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A LoRA and a DoRA for the small Stable Diffusion."""
    paths = []
    for seed, kind in enumerate(("lora", "dora")):
        base = load_base(str(sd_folder), device="cpu")
        paths.append(save_adapter(put_in(base.denoiser, kind, seed), tmp_path / f"{kind}.safetensors"))
    return paths[0], paths[1]


def test_two_merged_adapters_draw_as_they_did_and_leave_plain_modules(unet):
    names = [name for name, _ in unet.named_parameters()]
    first, second = put_in(unet, "dora", 1), put_in(unet, "lora", 2)
    first.strength = 0.7
    second.fuse()  # whether one is fused already makes no difference
    before = output_of(unet)
    first.merge(second)
    assert largest_difference(output_of(unet), before) < 1e-4 * before.abs().max()
    assert not any(isinstance(module, AdaptedLayer) for module in unet.modules())
    assert [name for name, _ in unet.named_parameters()] == names
    with pytest.raises(AdapterStateError, match="was ejected"):
        first.merge()


def test_what_would_be_left_in_the_layers_is_named_and_nothing_is_written(unet):
    first, second = put_in(unet, "dora", 1), put_in(unet, "lora", 2)
    before = output_of(unet)
    with pytest.raises(AdapterStateError, match="cannot merge while lora_2 is in the same layers"):
        first.merge()
    assert torch.equal(output_of(unet), before) and second.layers and first.layers


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_merged_pipeline_has_the_weights_that_diffusers_fuses(kind, files, sd_folder, tmp_path):
    path = files[kind == "dora"]
    saved = save_merged(load_base(str(sd_folder), device="cpu"), [path], [1.0], tmp_path / "merged", torch.float32)
    stock = StableDiffusionPipeline.from_pretrained(sd_folder)
    stock.load_lora_weights(path)
    stock.fuse_lora()
    stock.unload_lora_weights()
    ours = StableDiffusionPipeline.from_pretrained(saved)
    weights = ours.unet.state_dict()
    assert weights.keys() == stock.unet.state_dict().keys()
    for name, weight in stock.unet.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-6)


def test_the_command_writes_a_pipeline_that_draws_like_its_adapters(files, sd_folder, tmp_path):
    out = tmp_path / "merged"
    command = ["merge", *map(str, files), "--base", str(sd_folder), "--strength", "0.5", "--strength", "0.8"]
    done = CliRunner().invoke(app, [*command, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert str(out) in done.output and "`lora.safetensors` at strength 0.5" in (out / "README.md").read_text()
    assert {t.dtype for t in load_file(out / "unet/diffusion_pytorch_model.safetensors").values()} == {torch.float16}
    assert not list(tmp_path.glob(".merged*"))

    def draw(pipe: DiffusionPipeline) -> np.ndarray:
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(1)
        return pipe("disc", num_inference_steps=3, width=16, height=16, generator=generator, output_type="np").images

    base = load_base(str(sd_folder), device="cpu")
    for path, strength in zip(files, (0.5, 0.8)):
        load_adapter(base, path, strength=strength)
    merged = DiffusionPipeline.from_pretrained(out, dtype=torch.float32)
    assert np.abs(draw(merged) - draw(base.pipe)).max() < 0.01
    assert np.abs(draw(load_base(str(sd_folder), device="cpu").pipe) - draw(base.pipe)).max() > 0.05


def test_what_cannot_be_written_is_said(files, sd_base: Base, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match=r"holds something already\. Give another --out"):
        save_merged(sd_base, files[:1], [1.0], tmp_path / "full")
    name, weight = next(iter(sd_base.denoiser.named_parameters()))
    with torch.no_grad():
        weight.fill_(1e6)
    with pytest.raises(ConfigError, match=f"unet: {name} has values too large for torch.float16. Use --dtype"):
        save_merged(sd_base, files[:1], [1.0], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
