"""What the rules in programs.py say of a file, beside the programs' own code where it runs here, and transcriptions."""

from __future__ import annotations

import math
import re
from pathlib import Path

import bases
import pytest
import torch
from oracles import dora_weight, lora_weight, perturb
from peft.tuners.tuners_utils import BaseTunerLayer
from programs_run import (
    assert_same,
    by_rules,
    errors_of,
    in_a1111,
    in_comfyui,
    in_diffusers,
    in_lycoris,
    in_peft,
    in_sdcpp,
    input_axis,
    layer_named,
    modules_of,
    pipeline_of_flux,
    probed,
    true_deltas,
    weights_of,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stock_diffusers import pipeline_around
from torch import Tensor

from dora_diffusion.adapters.injection import AdapterConfig, inject_adapter
from dora_diffusion.errors import ConfigError
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import load_adapter, save_adapter
from dora_diffusion.inspection.formula import DoesNotFit, program_update
from dora_diffusion.inspection.parity import RIGHT
from dora_diffusion.inspection.programs import PROGRAMS, program_named
from dora_diffusion.inspection.reading import FileModule, split_key
from dora_diffusion.inspection.repair import FORMS
from dora_diffusion.models.loading import Base

SQUARE = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"

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
    assert parity.stopped.startswith("refuses the file: The following keys have not been correctly renamed: lora_unet_")
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


# The rules as data.


def test_every_program_names_its_sources_version_and_date():
    page = (Path(__file__).parent.parent.parent / "docs" / "parity.md").read_text(encoding="utf-8")
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
