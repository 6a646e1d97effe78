"""What other programs make of a file: by the rules in programs.py, and by the programs' own code where it runs here.

PEFT, diffusers and LyCORIS are run. ComfyUI, Forge, A1111, InvokeAI and stable-diffusion.cpp are transcribed in float64
from the sources named at each; the last two are run as well by whoever has them (docs/parity.md says how).
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import bases
import numpy as np
import pytest
import torch
from oracles import dora_weight, lora_weight, perturb
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stock_diffusers import pipeline_around
from test_cli import run  # noqa: F401 (a fixture)
from torch import Tensor, nn

from dora_diffusion.errors import AdapterFileError, ConfigError
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import load_adapter, save_adapter
from dora_diffusion.injection import AdapterConfig, inject_adapter
from dora_diffusion.inspection.formula import DoesNotFit, program_update
from dora_diffusion.inspection.look import look_at
from dora_diffusion.inspection.parity import RIGHT, Parity, compare_programs
from dora_diffusion.inspection.programs import PROGRAMS, program_named
from dora_diffusion.inspection.reading import FileModule, split_key
from dora_diffusion.inspection.repair import FORMS, Unrepairable, repair
from dora_diffusion.models.loading import Base

Deltas = dict[str, Tensor]
TARGETS = (
    r"down_blocks\.0\.attentions\.0\..*attn[12]\.(to_q|to_out\.0)",
    r"down_blocks\.0\..*ff\.net\.\d(\.proj)?",
    r"down_blocks\.1\..*(conv1|conv_shortcut)",
)
SQUARE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


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
    from lycoris import LycorisNetwork, create_lycoris_from_weights

    model = bases.unet()
    before = weights_of(model)
    tensors = {key.replace("lora_unet_", "lycoris_"): tensor for key, tensor in load_file(path).items()}
    LycorisNetwork.apply_preset({"lora_prefix": "lycoris"})  # it lasts for the process
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

    Forge's backend/patcher/lora.py at commit cea9f37 has the same two.
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
    return {
        layer: ((found.get(layer, nothing) - strength * t).norm() / (strength * t).norm()).item()
        for layer, t in true.items()
    }


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


# Rules against the programs' own code.


def test_both_spellings_of_a_magnitude_are_read_in_a_unet(base, peft_file):
    path = peft_file()
    spelt = {k + ".weight" if k.endswith("magnitude_vector") else k: t for k, t in load_file(path).items()}
    with safe_open(path, framework="pt") as file:
        save_file(spelt, path, file.metadata())
    assert by_rules(path, base, "diffusers").right
    renamed = {k.removesuffix(".weight") if "magnitude" in k else k: t for k, t in spelt.items()}
    save_file(renamed, other := path.with_name("plain.safetensors"))
    true = true_deltas(other, base)
    assert max(errors_of(in_diffusers(path, 1.0), true, 1.0).values()) < RIGHT


@pytest.mark.parametrize("kind", ["dora", "lora"])
@pytest.mark.parametrize("program", ["diffusers", "peft"])
def test_peft_files_in_diffusers_and_peft_are_as_the_rules_say(base, peft_file, kind, program):
    path = peft_file(kind)
    load = in_diffusers if program == "diffusers" else in_peft
    real = {w: load(path, w) for w in (1.0, 0.5)}
    parity = by_rules(path, base, program, 0.5)
    assert_same(parity, real, true_deltas(path, base))
    assert parity.read == len(parity.layers) and not parity.dropped
    assert parity.right
    # PEFT's strength acts inside the norm, and not on the magnitude.
    assert parity.right_at_strength == (kind == "lora")
    if kind == "dora":
        assert parity.total_at_strength > 0.1


def test_kohya_files_in_diffusers_lose_their_magnitudes_as_the_rules_say(base, kohya_file):
    path = kohya_file()
    parity = by_rules(path, base, "diffusers", 0.5)
    assert_same(parity, {w: in_diffusers(path, w) for w in (1.0, 0.5)}, true_deltas(path, base))
    assert parity.dropped == {"dora_scale": len(parity.layers)}
    assert parity.reasons == ("drops the magnitudes, which leaves a plain LoRA",)
    assert parity.worst.error > 0.1


def test_kohya_loras_in_diffusers_are_right(base, kohya_file):
    path = kohya_file("lora")
    parity = by_rules(path, base, "diffusers")
    assert_same(parity, {1.0: in_diffusers(path, 1.0)}, true_deltas(path, base))
    assert parity.right


def test_diffusers_refuses_a_file_of_differences_as_the_rules_say(base, peft_file, tmp_path):
    path = convert_adapter(peft_file(), tmp_path / "diff.safetensors", "diff", base=base).path
    with pytest.raises(ValueError, match="have not been correctly renamed"):
        in_diffusers(path, 1.0)
    parity = by_rules(path, base, "diffusers")
    assert parity.stopped.startswith("refuses the file: it does not know the key 'lora_unet_")
    assert not parity.right and parity.read == 0


@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_kohya_files_in_lycoris_are_as_the_rules_say(base, kohya_file, kind):
    path = kohya_file(kind)
    parity = by_rules(path, base, "lycoris", 0.5)
    assert_same(parity, {w: in_lycoris(path, w) for w in (1.0, 0.5)}, true_deltas(path, base))
    assert parity.right and parity.right_at_strength == (kind == "lora")


def test_lycoris_fails_at_magnitudes_along_the_inputs_as_the_rules_say(base, kohya_file):
    path = input_axis(kohya_file(), base)
    with pytest.raises(RuntimeError, match=r"match the broadcast shape|must match"):
        in_lycoris(path, 1.0)
    parity = by_rules(path, base, "lycoris")
    assert parity.stopped.startswith("fails at ") and not parity.right


def test_lycoris_needs_an_alpha_as_the_rules_say(base, kohya_file):
    path = kohya_file("lora")
    save_file({k: t for k, t in load_file(path).items() if not k.endswith(".alpha")}, path)
    with pytest.raises(TypeError, match="NoneType"):
        in_lycoris(path, 1.0)
    assert "needs an alpha" in by_rules(path, base, "lycoris").stopped


def test_a_file_of_differences_is_exact_in_lycoris(base, peft_file, tmp_path):
    path = peft_file()
    made = convert_adapter(path, tmp_path / "diff.safetensors", "diff", base=base).path
    parity = by_rules(made, base, "lycoris", 0.5)
    true = true_deltas(path, base)
    assert_same(parity, {w: in_lycoris(made, w) for w in (1.0, 0.5)}, true)
    assert parity.right_at_strength


def test_tucker_cores_are_read_as_lycoris_reads_them(base, kohya_file):
    path = kohya_file("lora")
    tensors = load_file(path)
    g = torch.Generator().manual_seed(1)
    for key in [k for k in tensors if k.endswith("conv1.lora_down.weight")]:
        r, n = tensors[key].shape[:2]
        tensors[key] = torch.randn(r, n, 1, 1, generator=g)
        tensors[key.replace("lora_down", "lora_mid")] = 0.1 * torch.randn(r, r, 3, 3, generator=g)
    save_file(tensors, path)
    real = in_lycoris(path, 1.0)
    adapter = load_adapter(base.pipe, path)
    true = {name: update.delta_weight().double() for name, update in adapter.updates().items()}
    adapter.eject()
    parity = by_rules(path, base, "lycoris")
    assert parity.right
    assert max(errors_of(real, true, 1.0).values()) < RIGHT


# Rules against transcriptions.


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize(
    "program, transcribed",
    [("comfyui", in_comfyui), ("forge", in_comfyui), ("a1111", in_a1111), ("invokeai", in_a1111)],
)
def test_kohya_doras_in_the_user_interfaces_are_as_their_sources_say(base, kohya_file, axis, program, transcribed):
    path = kohya_file() if axis == "output" else input_axis(kohya_file(), base)
    parity = by_rules(path, base, program, 0.5)
    assert_same(parity, {w: transcribed(path, base, w) for w in (1.0, 0.5)}, true_deltas(path, base))
    assert parity.right == parity.right_at_strength == (axis == "input")
    if axis == "output":
        assert parity.worst.error > 0.02
        assert any("norm" in reason or "divides" in reason for reason in parity.reasons)


@pytest.mark.parametrize("size, error", [(0.1, 0.08), (0.3, 0.18), (0.6, 0.35)])
def test_comfyuis_norm_costs_what_the_size_of_the_update_says(size, error):
    """What dividing by ||W0|| costs where m has moved little: about 8, 18 and 35 % of the update."""
    g = torch.Generator().manual_seed(0)
    W0 = torch.randn(320, 320, generator=g)
    A, B = torch.randn(16, 320, generator=g), torch.randn(320, 16, generator=g)
    s = size * W0.norm().item() / (B @ A).norm().item()
    m = W0.norm(dim=1) * (1 + 0.03 * torch.randn(320, generator=g))
    module = FileModule("x", (), A, B, alpha=16 * s, magnitude=m[:, None])
    true = dora_weight(W0, A, B, m, s) - W0.double()
    found = program_update(program_named("comfyui"), module, W0)
    assert ((found - true).norm() / true.norm()).item() == pytest.approx(error, rel=0.5)


@pytest.mark.parametrize("shape", [(6, 6), (6, 4), (6, 4, 3, 3)])
@pytest.mark.parametrize("magnitude", ["[out]", "[out, 1]", "[out, 1, ...]", "[1, in, ...]"])
@pytest.mark.parametrize("program", ["comfyui", "a1111"])
def test_magnitudes_of_every_shape_go_through_torchs_broadcasting(shape, magnitude, program):
    """The statements of the sources themselves, run on tensors of these shapes; what fails there does not fit here."""
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=g, dtype=torch.float64)
    down, up = torch.randn(2, *shape[1:], generator=g).double(), torch.randn(shape[0], 2, generator=g).double()
    ones = (1,) * (len(shape) - 2)
    m_shape = {"[out]": (6,), "[out, 1]": (6, 1), "[out, 1, ...]": (6, 1, *ones), "[1, in, ...]": (1, shape[1], *ones)}
    m = 1 + torch.rand(m_shape[magnitude], generator=g).double()
    calc = weight + (up @ down.flatten(1)).reshape(shape)
    by_row = program == "comfyui" and m.shape[0] == shape[0]
    norm = (
        weight.flatten(1).norm(dim=1, keepdim=True).reshape(-1, 1, *ones)
        if by_row
        else calc.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *ones)
    )
    module = FileModule("x", (), down, up.reshape(shape[0], 2, *ones), alpha=2.0, magnitude=m)
    try:
        expected = calc.clone()
        expected *= m / (norm + (2.0**-23 if program == "comfyui" else 0))
    except RuntimeError:
        with pytest.raises(DoesNotFit):
            program_update(program_named(program), module, weight)
    else:
        found = program_update(program_named(program), module, weight)
        assert torch.allclose(found, expected - weight, rtol=1e-12, atol=1e-12)


def test_a_magnitude_with_one_axis_is_skipped_or_silently_wrong_in_comfyui(base, kohya_file):
    path = kohya_file()
    tensors = {k: t.flatten() if k.endswith("dora_scale") else t for k, t in load_file(path).items()}
    save_file(tensors, path)
    parity = by_rules(path, base, "comfyui")
    by_layer = {layer.layer: layer for layer in parity.layers}
    square = by_layer[SQUARE]
    assert square.note == "" and square.error > 0.3  # torch spreads it over a matrix, and nobody is told
    skipped = [layer for layer in parity.layers if layer.note]
    assert skipped and all(layer.error == 1 for layer in skipped)
    assert f"leaves out {len(skipped)} layers whose shapes it cannot compute" in parity.reasons


@pytest.mark.parametrize("kind", ["dora", "lora"])
@pytest.mark.parametrize("file", ["peft", "kohya"])
def test_stable_diffusion_cpp_takes_every_file_for_a_lora_as_its_source_says(base, peft_file, kohya_file, file, kind):
    path = peft_file(kind) if file == "peft" else kohya_file(kind)
    parity = by_rules(path, base, "stable-diffusion.cpp", 0.5)
    assert_same(parity, {w: in_sdcpp(path, base, w) for w in (1.0, 0.5)}, true_deltas(path, base))
    assert parity.right == parity.right_at_strength == (file == "kohya" and kind == "lora")
    assert ("drops the magnitudes, which leaves a plain LoRA" in parity.reasons) == (kind == "dora")
    assert ("does not read alpha from the header" in parity.reasons) == (file == "peft")


def test_invokeai_refuses_peft_keys_of_a_unet(base, peft_file):
    """_group_state cuts keys at the first dot, so that all of them are one module, `unet`, of no known kind."""
    parity = by_rules(peft_file(), base, "invokeai")
    assert parity.stopped.startswith("refuses the file: it does not know the key 'unet.") and not parity.read


def test_a1111_and_lycoris_read_no_peft_keys_of_a_unet(base, peft_file):
    for program in ("a1111", "lycoris"):
        parity = by_rules(peft_file(), base, program)
        assert parity.read == 0 and parity.total == 1.0
        assert parity.reasons == ("reads none of it: the pictures are the base's",)


@pytest.mark.parametrize("program", ["comfyui", "forge"])
@pytest.mark.parametrize("kind", ["dora", "lora"])
def test_comfyui_and_forge_read_peft_keys_of_a_unet_beside_the_attention(base, peft_file, kind, program):
    """model_lora_keys_unet: `.to_` becomes `.processor.to_` in each name, and nothing else is changed."""
    path = peft_file(kind)
    parity = by_rules(path, base, program)
    products = {}
    for module, parts in modules_of(path).items():
        if ".to_" not in module:
            layer = layer_named(module, base)
            shape = weights_of(base.denoiser)[layer].shape
            B, A = (parts[f"lora_{which}.weight"].double().flatten(1) for which in "BA")
            products[layer] = (B @ A).reshape(shape)
    assert 0 < parity.read == len(products) < len(parity.layers)
    assert_same(parity, {1.0: products}, true_deltas(path, base))
    assert f"does not read {len(parity.layers) - len(products)} layers" in parity.reasons
    assert ("drops the magnitudes, which leaves a plain LoRA" in parity.reasons) == (kind == "dora")


def test_a_row_of_zeros_is_not_finite_in_peft_and_right_in_comfyui(base, peft_file, tmp_path):
    with torch.no_grad():
        base.denoiser.get_submodule(SQUARE).weight[0] = 0
    path = peft_file()
    tensors = load_file(path)
    tensors[f"unet.{SQUARE}.lora_B.weight"][0] = 0
    with safe_open(path, framework="pt") as file:
        save_file(tensors, path, file.metadata())
    parity = by_rules(path, base, "peft")
    assert parity.worst.layer == SQUARE and parity.worst.error == math.inf
    assert not parity.right and parity.total == math.inf


@pytest.mark.parametrize("ending", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_diffusers_loses_a_text_encoders_magnitudes_without_weight_as_the_rules_say(tmp_path, ending):
    pipe = bases.stable_diffusion()
    tensors, true = text_encoder_dora(pipe)
    name = "text_encoder.text_model.encoder.layers.0.self_attn.v_proj"
    path = tmp_path / "peft.safetensors"
    endings = {"down": "lora_A.weight", "up": "lora_B.weight", "magnitude": ending}
    save_file({f"{name}.{endings[part]}": tensor for part, tensor in tensors.items()}, path)
    parity = by_rules(path, Base("small", pipe), "diffusers", 0.5)
    W0 = next(iter(weights_of(pipe.text_encoder.encoder.layers[0].self_attn.v_proj).values()))
    for strength, said in ((1.0, parity.total), (0.5, parity.total_at_strength)):
        stock = bases.stable_diffusion()
        stock.load_lora_weights(str(path), adapter_name="it")
        stock.set_adapters(["it"], [strength])
        adapted = next(m for m in stock.text_encoder.modules() if isinstance(m, BaseTunerLayer))
        measured = (probed(adapted, W0) - strength * true).norm() / (strength * true).norm()
        assert said == pytest.approx(measured.item(), rel=1e-3, abs=2e-5)
    assert parity.right == (ending == "lora_magnitude_vector.weight")
    assert by_rules(path, Base("small", pipe), "peft").right


def test_text_encoders_in_kohyas_keys_are_compared_like_the_denoiser(tmp_path):
    pipe = bases.stable_diffusion()
    tensors, true = text_encoder_dora(pipe)
    A, B, m = tensors["down"], tensors["up"], tensors["magnitude"]
    name = "lora_te_text_model_encoder_layers_0_self_attn_v_proj"
    parts = {"lora_down.weight": A, "lora_up.weight": B, "alpha": torch.tensor(2.0), "dora_scale": m[:, None].clone()}
    path = tmp_path / "kohya.safetensors"
    save_file({f"{name}.{key}": tensor for key, tensor in parts.items()}, path)
    base = Base("small", pipe)
    assert by_rules(path, base, "lycoris").right
    W0 = next(iter(weights_of(pipe.text_encoder.encoder.layers[0].self_attn.v_proj).values()))
    comfyui = lora_weight(W0, A, B, 1.0) * (m.double() / W0.norm(dim=1))[:, None] - W0
    expected = ((comfyui - true).norm() / true.norm()).item()
    assert by_rules(path, base, "comfyui").total == pytest.approx(expected, rel=1e-4)


def text_encoder_dora(pipe: object) -> tuple[dict[str, Tensor], Tensor]:
    """A, B and m for one layer of the text encoder, and the true update with s = 1."""
    W0 = pipe.text_encoder.encoder.layers[0].self_attn.v_proj.weight.detach().double()  # type: ignore[attr-defined]
    g = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, W0.shape[1], generator=g), 0.1 * torch.randn(len(W0), 2, generator=g)
    m = (W0.norm(dim=1) * (0.7 + 0.6 * torch.rand(len(W0), generator=g))).float()
    return {"down": A, "up": B, "magnitude": m}, dora_weight(W0, A, B, m, 1.0) - W0


# SD3 and FLUX.


def test_comfyui_reads_a_transformers_peft_keys_without_header_and_magnitudes(tmp_path):
    model = bases.sd3_transformer()
    base = Base("sd3", pipeline_around(model))  # type: ignore[arg-type]
    for kind in ("dora", "lora"):
        adapter = perturb(inject_adapter(model, AdapterConfig(kind, rank=4, alpha=6.0), seed=1))
        path = save_adapter(adapter, tmp_path / f"{kind}.safetensors")
        parts = {n: (u.lora_A.detach().double(), u.lora_B.detach().double()) for n, u in adapter.updates().items()}
        true = {n: u.delta_weight().double() for n, u in adapter.updates().items()}
        adapter.eject()
        parity = by_rules(path, base, "comfyui")
        # Without alpha in the keys ComfyUI's scale is 1: the update is B A.
        measured = errors_of({n: B @ A for n, (A, B) in parts.items()}, true, 1.0)
        assert {x.layer: x.error for x in parity.layers} == pytest.approx(measured, rel=1e-4)
        assert "does not read alpha from the header" in parity.reasons
        assert ("drops the magnitudes, which leaves a plain LoRA" in parity.reasons) == (kind == "dora")
        assert by_rules(path, base, "a1111").read == len(parity.layers)


def test_fused_flux_layers_are_computed_as_one_and_cut(tmp_path):
    model = bases.flux_transformer()
    base = Base("flux", pipeline_of_flux(model))  # type: ignore[arg-type]
    g = torch.Generator().manual_seed(0)
    block = model.transformer_blocks[0].attn
    W0 = torch.cat([block.to_q.weight, block.to_k.weight, block.to_v.weight]).detach()
    A, B = torch.randn(2, W0.shape[1], generator=g), 0.1 * torch.randn(len(W0), 2, generator=g)
    m = W0.norm(dim=1) * (0.7 + 0.6 * torch.rand(len(W0), generator=g))
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {"lora_down.weight": A, "lora_up.weight": B, "alpha": torch.tensor(3.0), "dora_scale": m[:, None]}
    path = tmp_path / "flux.safetensors"
    save_file({f"{name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}, path)
    parity = by_rules(path, base, "comfyui")
    true = dora_weight(W0, A, B, m, 1.5) - W0.double()
    V = lora_weight(W0, A, B, 1.5)
    found = V * (m.double() / W0.double().norm(dim=1))[:, None] - W0.double()
    for layer, part, truth in zip(("to_q", "to_k", "to_v"), found.chunk(3), true.chunk(3)):
        said = next(x for x in parity.layers if x.layer == f"transformer_blocks.0.attn.{layer}")
        assert said.error == pytest.approx(((part - truth).norm() / truth.norm()).item(), rel=1e-4)
    assert by_rules(path, base, "lycoris").right


def pipeline_of_flux(model: nn.Module) -> object:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(transformer=model, scheduler=FlowMatchEulerDiscreteScheduler(), **nothing)


# Repair: what was written, in the program itself.


RUN = {"diffusers": in_diffusers, "peft": in_peft, "lycoris": in_lycoris}
TRANSCRIBED = {
    "comfyui": in_comfyui,
    "forge": in_comfyui,
    "a1111": in_a1111,
    "invokeai": in_a1111,
    "stable-diffusion.cpp": in_sdcpp,
}
# The form that a repaired file has, by the axis of the norm; ComfyUI's and Forge's otherwise.
REPAIRED = {
    "output": {
        "diffusers": "diffusers",
        "peft": "diffusers",
        "lycoris": "kohya",
        "a1111": "diff",
        "invokeai": "diff",
        "stable-diffusion.cpp": "diff",
    },
    "input": {"diffusers": "full-rank", "peft": "full-rank", "lycoris": "diff", "stable-diffusion.cpp": "diff"},
}


@pytest.mark.parametrize("axis", ["output", "input"])
@pytest.mark.parametrize("program", [program.name for program in PROGRAMS])
def test_a_repaired_file_is_right_in_the_program(base, peft_file, kohya_file, tmp_path, program, axis):
    path = peft_file() if axis == "output" else input_axis(kohya_file(), base)
    true = true_deltas(path, base)
    before = {name: weight.clone() for name, weight in weights_of(base.denoiser).items()}
    made = repair(path, base, program_named(program), tmp_path / "repaired.safetensors")
    found = RUN[program](made.path, 1.0) if program in RUN else TRANSCRIBED[program](made.path, base, 1.0)
    assert max(errors_of(found, true, 1.0).values()) < RIGHT
    assert made.form.name == REPAIRED[axis].get(program, "compensated" if axis == "output" else "kohya")
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(base.denoiser).items())


@pytest.mark.parametrize("program, form", [("diffusers", "full-rank"), ("lycoris", "diff"), ("comfyui", "compensated")])
def test_a_file_repaired_for_a_strength_is_right_at_it(base, peft_file, tmp_path, program, form):
    path = peft_file()
    made = repair(path, base, program_named(program), tmp_path / "repaired.safetensors", strength=0.4)
    assert made.form.name == form
    for w in (1.0, 0.4):
        found = RUN[program](made.path, w) if program in RUN else in_comfyui(made.path, base, w)
        assert max(errors_of(found, true_deltas(path, base), w).values()) < RIGHT


def test_a_file_for_comfyui_alone_says_so_and_is_not_taken_for_another(base, peft_file, tmp_path):
    made = repair(peft_file(), base, program_named("comfyui"), tmp_path / "comfyui.safetensors")
    with safe_open(made.path, framework="pt") as file:
        mark = json.loads(file.metadata()["dora_diffusion_made_for"])
    assert mark["program"] == "ComfyUI" and "9c0cf36" in mark["version"]
    with pytest.raises(AdapterFileError, match=r"was made for one program alone .*ComfyUI"):
        compare_programs(made.path, base)
    with pytest.raises(AdapterFileError, match="was made for one program alone"):
        repair(made.path, base, program_named("lycoris"), tmp_path / "again.safetensors")
    with pytest.raises(AdapterFileError, match="was made for one program alone"):
        look_at([made.path], base)
    assert "wrong in every other" in look_at([made.path])[0][0].notes[-1]


def test_the_form_can_be_chosen_and_a_wrong_one_is_refused_with_its_error(base, peft_file, tmp_path):
    path = peft_file()
    made = repair(path, base, program_named("comfyui"), tmp_path / "diff.safetensors", form="diff")
    assert max(errors_of(in_comfyui(made.path, base, 1.0), true_deltas(path, base), 1.0).values()) < RIGHT
    out = tmp_path / "never.safetensors"
    with pytest.raises(Unrepairable, match=r"ComfyUI .*kohya: relative error 0\.\d+ in the worst layer"):
        repair(path, base, program_named("comfyui"), out, form="kohya")
    assert not out.exists()
    with pytest.raises(ConfigError, match=r"no form 'difference'.*the forms are diffusers, kohya, .*full-rank"):
        repair(path, base, program_named("comfyui"), out, form="difference")


def test_none_can_is_said_where_none_can(tmp_path):
    model = bases.sd3_transformer()
    base = Base("sd3", pipeline_around(model))  # type: ignore[arg-type]
    adapter = perturb(inject_adapter(model, AdapterConfig("dora", rank=2, alpha=2.0), seed=1))
    path = save_adapter(adapter, tmp_path / "dora.safetensors")
    adapter.eject()
    with pytest.raises(Unrepairable, match="no file of this adapter comes out right in LyCORIS"):
        repair(path, base, program_named("lycoris"), tmp_path / "x.safetensors")


# The rules as data.


def test_every_program_names_its_sources_version_and_date():
    page = (Path(__file__).parent.parent / "docs" / "parity.md").read_text(encoding="utf-8")
    for program in PROGRAMS:
        assert program.sources and all(source.startswith("https://github.com/") for source in program.sources)
        assert re.fullmatch(r"20\d\d-\d\d-\d\d", program.read_on)
        assert all(source in page for source in program.sources)
        assert program.version in page and program.read_on in page
    assert all(f"`{form.name}`" in page for form in FORMS)


def test_an_unknown_program_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'comfui'; there are rules for diffusers, peft, .* Did you mean 'comfyui'"):
        program_named("comfui")


@pytest.mark.parametrize(
    "key, module, ending",
    [
        ("unet.a.to_q.lora_magnitude_vector.weight", "unet.a.to_q", "lora_magnitude_vector.weight"),
        ("lora_unet_a_to_q.alpha", "lora_unet_a_to_q", "alpha"),
        ("unet.a.to_q.lora.down.weight", "unet.a.to_q", "lora.down.weight"),
        ("lora_unet_x.strange", "lora_unet_x", "strange"),
    ],
)
def test_a_key_falls_into_a_module_and_an_ending(key, module, ending):
    assert split_key(key) == (module, ending)


# The command.


def test_the_command_compares_repairs_and_refuses(run, tmp_path):  # noqa: F811
    from dora_diffusion.models.loading import load_base

    emoji = load_base("emoji", device="cpu")
    config = AdapterConfig("dora", rank=2, alpha=3.0, target_modules=(r"mid_block\..*to_[qkv]",))
    adapter = perturb(inject_adapter(emoji.denoiser, config, seed=0), size=0.02)
    count = len(adapter.layers)
    path = save_adapter(adapter, tmp_path / "dora.safetensors")
    adapter.eject()
    table = run("parity", path, "--base", "emoji", "--strength", "0.5")
    assert table.status == 0 and "ComfyUI" in table.out and "right at strength 1" in table.flat
    repaired = run("parity", path, "--repair", "lycoris", "--out", tmp_path / "lycoris.safetensors")
    assert repaired.status == 0 and "kohya" in repaired.flat
    found = json.loads(run("parity", tmp_path / "lycoris.safetensors", "--json").out)
    by_name = {entry["program"]: entry for entry in found}
    assert by_name["lycoris"]["right"] and not by_name["comfyui"]["right"]
    assert by_name["diffusers"]["dropped_keys"] == {"dora_scale": count}
    assert len(by_name["a1111"]["layers"]) == count and by_name["a1111"]["worst"] > 0.1
    assert run("parity", path, "--repair", "comfyui").status == 1
    unknown = run("parity", path, "--repair", "comfy", "--out", tmp_path / "x.safetensors")
    assert unknown.status == 1 and "Did you mean 'comfyui'" in unknown.flat
