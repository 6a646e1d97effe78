"""The rules for changes of biases and of norms against diffusers, PEFT and LyCORIS: what their own models then give.

ComfyUI is asked in test_comfyui.py.
"""

from __future__ import annotations

import math
from pathlib import Path

import bases
import lycoris_files
import pytest
import torch
from oracles import output_of, relative_error
from programs_run import by_rules
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stock_diffusers import pipeline_around
from torch import nn

from dora_diffusion.adapters.injection import AdapterConfig, changeable_layers, inject_adapter
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import load_adapter, save_adapter
from dora_diffusion.inspection.parity import Parity, compare_programs
from dora_diffusion.inspection.programs import program_named
from dora_diffusion.models.loading import Base


@pytest.fixture
def base() -> Base:
    return Base("small", pipeline_around(bases.unet()))  # type: ignore[arg-type]


def by_file(path: Path, strength: float) -> torch.Tensor:
    model = bases.unet()
    load_adapter(model, path, strength=strength)
    return output_of(model)


def biases(parity: Parity) -> list[float]:
    return [layer.error for layer in parity.layers if layer.is_bias]


def with_biases(base: Base, folder: Path, ending: str) -> Path:
    """A LoRA in PEFT's keys with a change of the bias of each layer."""
    config = AdapterConfig("lora", rank=4, alpha=6.0, target_modules=("to_out.0", "proj_out"))
    adapter = inject_adapter(base.denoiser, config, seed=1)
    path = save_adapter(adapter, folder / "own.safetensors")
    layers = {layer: view.out_features for layer, view in changeable_layers(base.denoiser).items()}
    names = [layer for layer in adapter.layers if layers[layer]]
    adapter.eject()
    with safe_open(path, "pt") as file:
        header = file.metadata()
    g = torch.Generator().manual_seed(1)
    keys = load_file(path) | {f"unet.{la}.{ending}": torch.randn(layers[la], generator=g) for la in names}
    keys = {k: torch.randn(t.shape, generator=g) if k.endswith("lora_B.weight") else t for k, t in keys.items()}
    save_file(keys, folder / "a.safetensors", header)
    return folder / "a.safetensors"


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_pefts_biases_are_right_in_diffusers_and_peft(base, tmp_path, strength):
    own = with_biases(base, tmp_path, "lora_B.bias")
    path = convert_adapter(own, tmp_path / "b.safetensors", "diffusers", base=base).path
    for name in ("diffusers", "peft"):
        parity = by_rules(path, base, name, strength)
        assert parity.right and parity.right_at_strength and len(biases(parity)) == len(parity.layers) / 2
    before = output_of(bases.unet())
    assert relative_error(in_diffusers(path, strength) - before, by_file(path, strength) - before) < 1e-5
    comfyui = by_rules(path, base, "comfyui")
    assert set(biases(comfyui)) == {1.0} and comfyui.dropped["lora_B.bias"] == len(biases(comfyui))


def test_diffusers_loses_biases_that_the_header_says_nothing_of(base, tmp_path):
    path = with_biases(base, tmp_path, "lora_B.bias")
    assert set(biases(by_rules(path, base, "diffusers"))) == {1.0}
    with safe_open(path, "pt") as file:
        header = file.metadata()
    bare = {key: tensor for key, tensor in load_file(path).items() if not key.endswith("lora_B.bias")}
    save_file(bare, tmp_path / "bare.safetensors", header)
    assert torch.equal(in_diffusers(path, 1.0), in_diffusers(tmp_path / "bare.safetensors", 1.0))


def in_diffusers(path: Path, strength: float) -> torch.Tensor:
    pipe = pipeline_around(bases.unet())
    pipe.load_lora_weights(str(path), adapter_name="it")
    pipe.set_adapters(["it"], [strength])
    return output_of(pipe.unet)


def in_lycoris(path: Path, strength: float) -> torch.Tensor:
    from lycoris import create_lycoris_from_weights
    from lycoris_files import preset

    model = bases.unet()
    tensors = {key.replace("lora_unet_", "lycoris_"): tensor for key, tensor in load_file(path).items()}
    preset({})
    network, _ = create_lycoris_from_weights(strength, str(path), model, tensors)
    network.apply_to()
    network.set_multiplier(strength)
    return output_of(model)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_lycoris_is_right_about_its_own_norms_and_biases(base, tmp_path, strength):
    lycoris_files.wrapped(bases.unet(), "full, norms").save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    assert {key.rpartition(".")[2] for key in load_file(tmp_path / "a.safetensors")} >= {"diff", "diff_b", "w_norm"}
    parity = by_rules(tmp_path / "a.safetensors", base, "lycoris", strength)
    assert parity.right and parity.right_at_strength and biases(parity)
    before = output_of(bases.unet())
    theirs = in_lycoris(tmp_path / "a.safetensors", strength)
    assert relative_error(theirs - before, by_file(tmp_path / "a.safetensors", strength) - before) < 1e-4


def test_lycoris_loses_biases_beside_other_forms(base, tmp_path):
    path = with_biases(base, tmp_path, "diff_b")
    made = convert_adapter(path, tmp_path / "kohya.safetensors", "kohya", base=base).path
    parity = by_rules(made, base, "lycoris")
    assert set(biases(parity)) == {1.0}
    assert parity.reasons == (f"leaves the biases of {len(biases(parity))} layers as they are",)
    bare = {key: tensor for key, tensor in load_file(made).items() if not key.endswith("diff_b")}
    save_file(bare, tmp_path / "bare.safetensors")
    assert torch.equal(in_lycoris(made, 1.0), in_lycoris(tmp_path / "bare.safetensors", 1.0))


def test_lycoris_fails_at_a_norms_difference_by_another_name(base, tmp_path):
    layer = next(la for la in changeable_layers(base.denoiser) if isinstance(norm := norm_of(base, la), nn.LayerNorm))
    keys = {f"lycoris_{layer.replace('.', '_')}.diff": torch.ones(norm.weight.shape)}
    save_file(keys, tmp_path / "a.safetensors")
    assert ".w_norm alone" in by_rules(tmp_path / "a.safetensors", base, "lycoris").stopped
    with pytest.raises(ValueError, match="not supported in Full"):
        in_lycoris(tmp_path / "a.safetensors", 1.0)


def norm_of(base: Base, layer: str) -> nn.Module:
    return base.denoiser.get_submodule(layer)


@pytest.mark.parametrize("with_weight", [True, False])
def test_a_norms_bias_is_read_beside_its_weight_alone(base, tmp_path, with_weight):
    keys = {"lora_unet_conv_norm_out.b_norm": torch.ones(base.denoiser.conv_norm_out.bias.shape)}
    if with_weight:
        keys["lora_unet_conv_norm_out.w_norm"] = keys["lora_unet_conv_norm_out.b_norm"].clone()
    save_file(keys, tmp_path / "a.safetensors")
    for parity in compare_programs(tmp_path / "a.safetensors", base):
        known = parity.program.name in ("comfyui", "forge", "lycoris", "diffusers", "peft")
        assert parity.known == known
        if parity.program.name in ("comfyui", "forge", "lycoris"):
            assert biases(parity) == [0.0 if with_weight else 1.0] and parity.right == with_weight


def test_a_weight_in_the_bases_place_is_so_at_every_strength_in_comfyui(base, tmp_path):
    own = base.denoiser.conv_norm_out.weight.detach()
    save_file({"lora_unet_conv_norm_out.set_weight": own + 1.0}, tmp_path / "a.safetensors")
    parity = by_rules(tmp_path / "a.safetensors", base, "comfyui", 0.5)
    assert parity.right and parity.layers[0].error_at_strength == pytest.approx(1.0)
    assert math.isclose(by_rules(tmp_path / "a.safetensors", base, "forge").worst.error, 1.0)
    assert not compare_programs(tmp_path / "a.safetensors", base, programs=(program_named("diffusers"),))[0].known
