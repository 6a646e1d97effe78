"""The rules for programs that cannot be installed beside this project, against the programs themselves.

Each is run by a Python of its own, which an environment variable names (docs/parity.md says how to make one); without
it these tests are skipped, and test_rules.py holds the rules to transcriptions of the same sources.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel, UNet2DConditionModel
from oracles import perturb
from PIL import Image
from programs_run import Deltas, assert_same, by_rules, input_axis, pipeline_of_flux, true_deltas, weights_of
from safetensors.torch import load_file, save_file
from stock_diffusers import pipeline_around
from transformers import CLIPTextConfig, CLIPTextModel

from dora_diffusion.adapters.injection import AdapterConfig, inject_adapter
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import save_adapter
from dora_diffusion.models.loading import Base

SDCPP = os.environ.get("SDCPP_PYTHON")
needs_sdcpp = pytest.mark.skipif(not SDCPP, reason="SDCPP_PYTHON names no Python that has stable-diffusion-cpp-python")
INVOKEAI = os.environ.get("INVOKEAI_PYTHON")
needs_invokeai = pytest.mark.skipif(not INVOKEAI, reason="INVOKEAI_PYTHON names no Python that has invokeai")


def in_invokeai(folder: Path, weights: Deltas, jobs: list[dict[str, object]]) -> list[Deltas | str]:
    """For each job the changes of the layers, or why the file is refused."""
    save_file({f"{name}.weight": weight.float() for name, weight in weights.items()}, folder / "weights.safetensors")
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("stock_invokeai.py")
    subprocess.run([str(INVOKEAI), script, folder], check=True, cwd=folder, env={"HF_HUB_OFFLINE": "1"})
    found: list[Deltas | str] = []
    for n in range(len(jobs)):
        if (folder / f"{n}.txt").exists():
            found.append((folder / f"{n}.txt").read_text())
        else:
            changes = load_file(folder / f"{n}.safetensors")
            found.append({name.removesuffix(".weight"): change for name, change in changes.items()})
    return found


@needs_invokeai
def test_invokeai_computes_what_the_rules_say(base, peft_file, kohya_file, tmp_path):
    dora, lora, peft = kohya_file("dora"), kohya_file("lora"), peft_file("dora")
    difference = convert_adapter(peft, tmp_path / "diff.safetensors", "diff", base=base).path
    files = [dora, lora, input_axis(dora, base), difference, peft]
    jobs = [{"file": str(file), "strength": w, "base": "sd-1"} for file in files for w in (1.0, 0.5)]
    found = in_invokeai(tmp_path, weights_of(base.denoiser), jobs)
    for n, file in enumerate(files[:4]):
        true = true_deltas(peft if file == difference else file, base)
        parity = by_rules(file, base, "invokeai", 0.5)
        assert_same(parity, dict(zip((1.0, 0.5), found[2 * n : 2 * n + 2])), true)
        assert parity.right == (file != dora)
    assert all("Unsupported lora format" in refused for refused in found[-2:])
    assert by_rules(peft, base, "invokeai").stopped.startswith("refuses the file")


# Layers of FLUX.1 that are one in the original model, which InvokeAI loads: where they are there, and in which rows.
QKV = ("to_q", "to_k", "to_v")
FLUX_LAYERS = {
    "double_blocks.0.img_attn.qkv": [f"transformer_blocks.0.attn.{name}" for name in QKV],
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.txt_attn.qkv": [f"transformer_blocks.0.attn.add_{which}_proj" for which in "qkv"],
    "double_blocks.0.txt_attn.proj": ["transformer_blocks.0.attn.to_add_out"],
    "single_blocks.0.linear1": [
        *(f"single_transformer_blocks.0.attn.{name}" for name in QKV),
        "single_transformer_blocks.0.proj_mlp",
    ],
}


@needs_invokeai
def test_invokeai_computes_what_the_rules_say_of_flux(tmp_path):
    """One block of each kind, in FLUX.1's own width, which InvokeAI cuts its fused layers by."""
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, joint_attention_dim=32, pooled_projection_dim=32)
    flux = Base("flux", pipeline_of_flux(model))  # type: ignore[arg-type]
    whole = weights_of(model)
    fused = {theirs: torch.cat([whole[ours] for ours in layers]) for theirs, layers in FLUX_LAYERS.items()}
    files, true = [], []
    for kind in ("lora", "dora"):
        config = AdapterConfig(kind, rank=4, alpha=6.0, target_modules=flux.family.target_modules)
        adapter = perturb(inject_adapter(model, config, seed=3), seed=3)
        peft = save_adapter(adapter, tmp_path / f"{kind}.safetensors")
        deltas = {layer: update.delta_weight().double() for layer, update in adapter.updates().items()}
        adapter.eject()
        kohya = convert_adapter(peft, tmp_path / f"{kind}_kohya.safetensors", "kohya").path
        difference = convert_adapter(peft, tmp_path / f"{kind}_diff.safetensors", "diff", base=flux).path
        files += [peft, kohya, difference]
        true += [deltas] * 3
    found = in_invokeai(tmp_path, fused, [{"file": str(f), "strength": 1.0, "base": "flux"} for f in files])
    for file, changes, deltas in zip(files, found, true):
        parity = by_rules(file, flux, "invokeai")
        if isinstance(changes, str):
            assert parity.stopped, (file.name, changes)
            continue
        cut = {
            layer: rows
            for theirs, change in changes.items()
            for layer, rows in zip(FLUX_LAYERS[theirs], change.split([len(whole[n]) for n in FLUX_LAYERS[theirs]]))
        }
        assert_same(parity, {1.0: cut}, deltas)
        assert parity.right == (file.stem in ("lora_kohya", "lora_diff", "dora_diff"))
    assert [isinstance(changes, str) for changes in found] == [file.stem == "dora" for file in files]


def stable_diffusion_1(folder: Path) -> UNet2DConditionModel:
    """Random weights of the published sizes, the only ones that stable-diffusion.cpp takes, in diffusers' layout."""
    torch.manual_seed(0)
    cross, plain = ("CrossAttnDownBlock2D",) * 3, ("CrossAttnUpBlock2D",) * 3
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=768,
        down_block_types=(*cross, "DownBlock2D"),
        up_block_types=("UpBlock2D", *plain),
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    config = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12, vocab_size=49408)
    for name, part in (("unet", unet), ("vae", vae), ("text_encoder", CLIPTextModel(config))):
        part.save_pretrained(folder / name)
    # transformers 5 leaves out what all published checkpoints have before these names.
    encoder = folder / "text_encoder" / "model.safetensors"
    save_file({f"text_model.{name}": tensor for name, tensor in load_file(encoder).items()}, encoder)
    return unet


def in_sdcpp(folder: Path, jobs: list[dict[str, str]]) -> list[npt.NDArray[np.float64]]:
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("stock_sdcpp.py")
    subprocess.run([str(SDCPP), script, folder], check=True, cwd=folder)
    return [np.asarray(Image.open(folder / f"{n}.png"), np.float64) for n in range(len(jobs))]


def with_changes(folder: Path, stock: Path, deltas: Deltas) -> Path:
    """The stock model with these changes in its UNet's weights."""
    weights = load_file(stock / "unet" / "diffusion_pytorch_model.safetensors")
    for layer, delta in deltas.items():
        weights[f"{layer}.weight"] += delta
    (folder / "unet").mkdir(parents=True)
    save_file(weights, folder / "unet" / "diffusion_pytorch_model.safetensors")
    for part in ("vae", "text_encoder"):
        (folder / part).symlink_to(stock / part)
    return folder


@needs_sdcpp
def test_stable_diffusion_cpp_draws_what_the_rules_say(tmp_path):
    """LoRAs and files of differences draw what the changed weights draw; a DoRA draws what its B A alone would."""
    unet, stock = stable_diffusion_1(tmp_path / "stock"), tmp_path / "stock"
    loaded = Base("sd1", pipeline_around(unet))  # type: ignore[arg-type]
    jobs = {"stock": (stock, "")}
    for kind in ("lora", "dora"):
        config = AdapterConfig(kind, rank=4, alpha=4.0, target_modules=(r"(down|mid)_block.*attn[12]\.to_[qkv]",))
        adapter = perturb(inject_adapter(unet, config, seed=3), seed=3, size=0.2)
        peft = save_adapter(adapter, tmp_path / f"{kind}.safetensors")
        updates = adapter.updates()
        true = {layer: update.delta_weight() for layer, update in updates.items()}
        jobs[f"{kind}, true"] = with_changes(tmp_path / kind, stock, true), ""
        products = {layer: (update.lora_B @ update.lora_A).detach() for layer, update in updates.items()}
        jobs[f"{kind}, B A"] = with_changes(tmp_path / f"{kind}_product", stock, products), ""
        adapter.eject()
        kohya = convert_adapter(peft, tmp_path / f"{kind}_kohya.safetensors", "kohya").path
        difference = convert_adapter(peft, tmp_path / f"{kind}_diff.safetensors", "diff", base=loaded).path
        for name, file in (("PEFT", peft), ("kohya", kohya), ("diff", difference)):
            jobs[f"{kind}, {name}"] = stock, file
    ordered = sorted(jobs, key=lambda name: str(jobs[name][0]))  # so that no model is loaded twice
    written = [{"model": str(jobs[name][0]), "file": str(jobs[name][1])} for name in ordered]
    pictures = dict(zip(ordered, in_sdcpp(tmp_path, written)))

    def apart(one: str, other: str) -> float:  # of 255
        return float(np.abs(pictures[one] - pictures[other]).mean())

    for name in ("lora, PEFT", "lora, kohya", "lora, diff"):
        assert apart(name, "lora, true") < 0.05 < 0.5 < apart(name, "stock")
    assert apart("dora, diff", "dora, true") < 0.05
    for name in ("dora, PEFT", "dora, kohya"):
        assert apart(name, "dora, B A") < 0.05 < 0.3 < apart(name, "dora, true")
