"""What programs make of an adapter file, found out without the rules of this project.

PEFT, diffusers and LyCORIS are run. ComfyUI, Forge, A1111, InvokeAI and stable-diffusion.cpp are transcribed in float64
from the sources named at each; ComfyUI, InvokeAI and stable-diffusion.cpp are run as well by whoever has them
(docs/parity.md says how).
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import bases
import numpy as np
import pytest
import torch
from oracles import dora_weight, lora_weight
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stock_diffusers import pipeline_around
from torch import Tensor, nn

from dora_diffusion.inspection.parity import Parity, compare_programs
from dora_diffusion.inspection.programs import program_named
from dora_diffusion.inspection.reading import split_key
from dora_diffusion.models.loading import Base

Deltas = dict[str, Tensor]


def input_axis(path: Path, base: Base, seed: int = 0) -> Path:
    """The file with magnitudes along the inputs, [1, in], as OneTrainer has, up to 30 % off the columns' norms."""
    tensors = load_file(path)
    g = torch.Generator().manual_seed(seed)
    for key in [key for key in tensors if key.endswith("dora_scale")]:
        W0 = weights_of(base.denoiser)[layer_named(split_key(key)[0], base)]
        norms = W0.transpose(0, 1).flatten(1).norm(dim=1)
        m = norms * (0.7 + 0.6 * torch.rand(norms.shape, generator=g))
        tensors[key] = m.float().reshape(1, -1, *(1,) * (W0.dim() - 2))
    out = path.with_name("input_axis.safetensors")
    save_file(tensors, out)
    return out


# The truth, from the raw tensors in float64.


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {
        n: m.weight.detach().clone().double() for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)
    }


def layer_named(module: str, base: Base) -> str:
    flat = module.removeprefix("lora_unet_").removeprefix("unet.").replace(".", "_")
    return next(name for name in weights_of(base.denoiser) if name.replace(".", "_") == flat)


def modules_of(path: Path) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in load_file(path).items():
        module, ending = split_key(key)
        found.setdefault(module, {})[ending] = tensor
    return found


def true_deltas(path: Path, base: Base, scale: float | None = 1.5) -> Deltas:
    """W' - W0 of every layer; `scale` is alpha / rank of a file that has no alpha in its keys."""
    deltas = {}
    for module, parts in modules_of(path).items():
        layer = layer_named(module, base)
        W0 = weights_of(base.denoiser)[layer]
        A = parts.get("lora_A.weight", parts.get("lora_down.weight"))
        B = parts.get("lora_B.weight", parts.get("lora_up.weight"))
        s = parts["alpha"].item() / A.shape[0] if "alpha" in parts else scale
        m = parts.get("lora_magnitude_vector", parts.get("dora_scale"))
        if m is None:
            W = lora_weight(W0, A, B, s)
        elif "dora_scale" in parts and m.shape[0] == 1:
            V = lora_weight(W0, A, B, s)
            n = V.transpose(0, 1).flatten(1).norm(dim=1)
            W = V * (m.double().flatten() / n).reshape(1, -1, *(1,) * (V.dim() - 2))
        else:
            W = dora_weight(W0, A, B, m.flatten(), s)
        deltas[layer] = W - W0
    return deltas


# The programs themselves.


def probed(module: nn.Module, W0: Tensor) -> Tensor:
    """The linear map that a layer computes now, minus W0: its output for the identity, its bias taken away."""
    with torch.no_grad():
        if W0.dim() == 2:
            y = module(torch.eye(W0.shape[1]))
            return (y - module(torch.zeros(1, W0.shape[1]))).double().T - W0
        # A convolution's kernel is its answer to single points, mirrored; centred for odd kernels with padding.
        n, kh, kw = W0.shape[1:]
        x = torch.zeros(n, n, 2 * kh + 1, 2 * kw + 1)
        for i in range(n):
            x[i, i, kh, kw] = 1
        y = module(x) - module(torch.zeros_like(x[:1]))
        y = y[:, :, kh - kh // 2 : kh - kh // 2 + kh, kw - kw // 2 : kw - kw // 2 + kw].flip(2, 3)
        return y.transpose(0, 1).double() - W0


def in_diffusers(path: Path, strength: float) -> Deltas:
    pipe = pipeline_around(bases.unet())
    before = weights_of(pipe.unet)
    pipe.load_lora_weights(str(path), adapter_name="it")
    pipe.set_adapters(["it"], [strength])
    return {n: probed(m, before[n]) for n, m in pipe.unet.named_modules() if isinstance(m, BaseTunerLayer)}


def in_peft(path: Path, strength: float) -> Deltas:
    model = bases.unet()
    before = weights_of(model)
    with safe_open(path, framework="pt") as file:
        config = json.loads(file.metadata()["lora_adapter_metadata"])
    inject_adapter_in_model(LoraConfig(**{key.removeprefix("unet."): value for key, value in config.items()}), model)
    state = {key.removeprefix("unet."): tensor for key, tensor in load_file(path).items()}
    assert not set_peft_model_state_dict(model, state).unexpected_keys
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    for module in layers.values():
        module.set_scale("default", strength)
    return {n: probed(m, before[n]) for n, m in layers.items()}


def in_lycoris(path: Path, strength: float) -> Deltas:
    """LyCORIS's own loader for any model, which names modules `lycoris_` where sd-scripts says `lora_unet_`."""
    from lycoris import create_lycoris_from_weights
    from lycoris_files import preset

    model = bases.unet()
    before = weights_of(model)
    tensors = {key.replace("lora_unet_", "lycoris_"): tensor for key, tensor in load_file(path).items()}
    preset({})
    network, _ = create_lycoris_from_weights(strength, str(path), model, tensors)
    deltas = {}
    for module in network.loras:
        name = next(n for n, m in model.named_modules() if m is module.org_module[0])
        module.multiplier = strength
        module.apply_to()
        deltas[name] = probed(module.org_module[0], before[name])
    return deltas


def in_comfyui(path: Path, base: Base, strength: float) -> Deltas:
    """weight_decompose of comfy/weight_adapter/base.py at ComfyUI's commit 9c0cf36, and calculate_weight beside it.

    Forge's backend/patcher/lora.py at commit cea9f37 has the same two, and Forge Neo's at commit 419825e.
    """
    deltas = {}
    for module, parts in modules_of(path).items():
        layer = layer_named(module, base)
        weight = weights_of(base.denoiser)[layer].numpy()
        if "diff" in parts:
            deltas[layer] = torch.from_numpy(strength * parts["diff"].double().numpy())
            continue
        down, up = (parts[f"lora_{which}.weight"].double().flatten(1).numpy() for which in ("down", "up"))
        alpha = parts["alpha"].item() / down.shape[0]
        calc = weight + alpha * (up @ down).reshape(weight.shape)
        if "dora_scale" not in parts:
            deltas[layer] = torch.from_numpy(strength * (calc - weight))
            continue
        dora_scale = parts["dora_scale"].double().numpy()
        if dora_scale.shape[0] == calc.shape[0]:
            norm = np.sqrt((weight.reshape(len(weight), -1) ** 2).sum(1)).reshape(-1, *(1,) * (weight.ndim - 1))
        else:
            others = tuple(axis for axis in range(weight.ndim) if axis != 1)
            norm = np.sqrt((calc**2).sum(others, keepdims=True))
        calc = calc * (dora_scale / (norm + 2.0**-23))
        deltas[layer] = torch.from_numpy(strength * (calc - weight))
    return deltas


def in_a1111(path: Path, base: Base, strength: float) -> Deltas:
    """finalize_updown and apply_weight_decompose of extensions-builtin/Lora/network.py in A1111 1.10 (with #16151).

    DoRALayer and FullLayer of InvokeAI 6.14.2 have the same arithmetic.
    """
    deltas = {}
    for module, parts in modules_of(path).items():
        layer = layer_named(module, base)
        weight = weights_of(base.denoiser)[layer]
        if "diff" in parts:
            deltas[layer] = strength * parts["diff"].double()
            continue
        down, up = (parts[f"lora_{which}.weight"].double().flatten(1) for which in ("down", "up"))
        updown = (up @ down).reshape(weight.shape) * parts["alpha"].item() / down.shape[0]
        if "dora_scale" in parts:
            merged = updown + weight
            norm = merged.square().sum([a for a in range(weight.dim()) if a != 1], keepdim=True).sqrt()
            updown = merged * (parts["dora_scale"].double() / norm) - weight
        deltas[layer] = strength * updown
    return deltas


def in_sdnext(path: Path, base: Base, strength: float) -> Deltas:
    """apply_weight_decompose and finalize_updown of modules/lora/network.py in SD.Next at commit d11a619."""
    deltas = {}
    for module, parts in modules_of(path).items():
        layer = layer_named(module, base)
        weight = weights_of(base.denoiser)[layer]
        if "diff" in parts:
            deltas[layer] = strength * parts["diff"].double()
            continue
        down, up = (parts[f"lora_{which}.weight"].double().flatten(1) for which in ("down", "up"))
        updown = (up @ down).reshape(weight.shape) * parts["alpha"].item() / down.shape[0]
        if "dora_scale" in parts:
            merged, scale = updown + weight, parts["dora_scale"].double()
            by_output = scale.shape[0] == len(weight) and scale.numel() == len(weight)
            kept = 0 if by_output else 1
            norm = merged.square().sum([a for a in range(weight.dim()) if a != kept], keepdim=True).sqrt()
            updown = merged * (scale / norm) - weight
        deltas[layer] = strength * updown
    return deltas


def in_sdcpp(path: Path, base: Base, strength: float) -> Deltas:
    """get_lora_weight_diff and get_raw_weight_diff of src/lora.hpp in stable-diffusion.cpp: `.dora_scale` is a TODO."""
    deltas = {}
    for module, parts in modules_of(path).items():
        layer = layer_named(module, base)
        if "diff" in parts:
            deltas[layer] = strength * parts["diff"].double()
            continue
        down = parts.get("lora_down.weight", parts.get("lora_A.weight"))
        up = parts.get("lora_up.weight", parts.get("lora_B.weight"))
        scale = parts["alpha"].item() / down.shape[0] if "alpha" in parts else 1.0
        updown = (up.double().flatten(1) @ down.double().flatten(1)).reshape(weights_of(base.denoiser)[layer].shape)
        deltas[layer] = strength * scale * updown
    return deltas


def errors_of(found: Deltas, true: Deltas, strength: float) -> dict[str, float]:
    nothing = torch.zeros(1, dtype=torch.float64)
    return {layer: error_of(found.get(layer, nothing), strength * t) for layer, t in true.items()}


def error_of(found: Tensor, true: Tensor) -> float:
    """The relative error; of what is nothing (an OFT in blocks of one output turns none) nothing is right."""
    if not true.any():
        return math.inf if found.any() else 0.0
    return ((found - true).norm() / true.norm()).item()


def by_rules(path: Path, base: Base, program: str, strength: float = 1.0) -> Parity:
    return compare_programs(path, base, strength, (program_named(program),))[0]


def assert_same(parity: Parity, real: dict[float, Deltas], true: Deltas) -> None:
    """The rules give the errors that the program's own updates have, at strength 1 and at parity.strength."""
    assert {layer.layer for layer in parity.layers} == set(true)
    for strength, deltas in real.items():
        measured = errors_of(deltas, true, strength)
        for layer in parity.layers:
            said = layer.error if strength == 1 else layer.error_at_strength
            assert said == pytest.approx(measured[layer.layer], rel=1e-3, abs=2e-5), (layer.layer, strength)


def pipeline_of_flux(model: nn.Module) -> object:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), **nothing)


RUN = {"diffusers": in_diffusers, "peft": in_peft, "lycoris": in_lycoris}
TRANSCRIBED = {
    "comfyui": in_comfyui,
    "forge": in_comfyui,
    "forge-neo": in_comfyui,
    "a1111": in_a1111,
    "invokeai": in_a1111,
    "stable-diffusion.cpp": in_sdcpp,
    "sdnext": in_sdnext,
}
