"""Layers whose rows have another order in the checkpoints that ComfyUI loads, and layers that it finds by no such name.

`calculate_weight` and `weight_decompose` of ComfyUI, with the `swap_scale_shift` of its maps of names, transcribed in
float64 from comfy/utils.py, comfy/lora.py and comfy/weight_adapter/ at commit a125cd8.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bases
import pytest
import torch
from oracles import perturb
from programs_run import Deltas, assert_same, by_rules, errors_of
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_diffusion.adapters.injection import AdapterConfig, inject_adapter
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import save_adapter
from dora_diffusion.inspection.parity import RIGHT
from dora_diffusion.inspection.programs import program_named
from dora_diffusion.inspection.repair import Unrepairable, repair
from dora_diffusion.models.loading import Base

# Where scale and shift have changed places: swap_scale_shift in mmdit_to_diffusers and flux_to_diffusers.
# SD3's layers are written by the checkpoint's own names, which lead to no such map.
SWAPPED: dict[str, set[str]] = {"sd3": set(), "flux": {"norm_out.linear"}}
CHECKPOINTS = {
    "norm_out.linear": "lora_unet_final_layer_adaLN_modulation_1",
    **{
        f"transformer_blocks.{i}.{ours}.linear": f"lora_unet_joint_blocks_{i}_{theirs}_block_adaLN_modulation_1"
        for i in range(2)
        for ours, theirs in (("norm1", "x"), ("norm1_context", "context"))
    },
}
TURNED = ("norm_out.linear", "transformer_blocks.1.norm1_context.linear")  # in the checkpoint, of SD3
MAKE: dict[str, Callable[[], object]] = {"sd3": bases.stable_diffusion_3, "flux": bases.flux}
TARGETS = ("to_q", "norm_out.linear", "norm1_context.linear", "norm1.linear")


def swap(tensor: Tensor) -> Tensor:
    return torch.cat(tensor.chunk(2)[::-1])


def in_comfyui(path: Path, model: nn.Module, swapped: set[str], strength: float) -> Deltas:
    tensors, found = load_file(path), {}
    for layer, module in model.named_modules():
        names = (*(f"{prefix}{layer.replace('.', '_')}" for prefix in PREFIXES), CHECKPOINTS.get(layer, ""))
        name = next((name for name in names if _has(tensors, name)), None)
        if name is None:
            continue
        by_checkpoint = name == CHECKPOINTS.get(layer)
        order = swap if layer in swapped or (by_checkpoint and layer in TURNED) else lambda t: t
        mapped = (lambda t: t) if by_checkpoint else order  # what comes by diffusers' name is turned round
        weight = order(module.weight.detach().double())  # as the checkpoint has it
        if f"{name}.diff" in tensors:
            found[layer] = order(mapped(strength * tensors[f"{name}.diff"].double()))
            continue
        down, up = (tensors[f"{name}.lora_{which}.weight"].double() for which in ("down", "up"))
        product = mapped(tensors[f"{name}.alpha"].double() / len(down) * (up @ down))
        if f"{name}.dora_scale" not in tensors:
            found[layer] = strength * order(product)
            continue
        scale, whole = tensors[f"{name}.dora_scale"].double(), weight + product
        by_output = scale.shape[0] == whole.shape[0]
        norm = weight.norm(dim=1, keepdim=True) if by_output else whole.norm(dim=0, keepdim=True)
        found[layer] = order(strength * (whole * (scale / (norm + 2.0**-23)) - weight))
    return found


PREFIXES = ("lora_transformer_", "lycoris_")


def _has(tensors: dict[str, Tensor], name: str) -> bool:
    return f"{name}.lora_down.weight" in tensors or f"{name}.diff" in tensors


def written(name: str, folder: Path, kind: str, axis: str = "output") -> tuple[Base, Path, Deltas]:
    """A trained adapter of these layers in kohya's keys, and the change that it means."""
    base = Base(name, MAKE[name]())  # type: ignore[arg-type]
    config = AdapterConfig(kind, rank=4, alpha=6.0, norm_axis=axis, target_modules=TARGETS)  # type: ignore[arg-type]
    adapter = perturb(inject_adapter(base.denoiser, config, seed=3), seed=3)
    true = {layer: update.delta_weight().double() for layer, update in adapter.updates().items()}
    path = save_adapter(adapter, folder / "own.safetensors")
    adapter.eject()
    return base, convert_adapter(path, folder / "kohya.safetensors", "kohya").path, true


@pytest.mark.parametrize("program", ["comfyui", "forge"])
@pytest.mark.parametrize("kind, axis", [("lora", "output"), ("dora", "output"), ("dora", "input")])
@pytest.mark.parametrize("name", MAKE)
def test_halves_change_places_in_the_product_and_not_in_a_magnitude(tmp_path, name, kind, axis, program):
    base, path, true = written(name, tmp_path, kind, axis)
    if name == "sd3" and program == "forge":
        # It has no map of diffusers' names for SD3: what has the checkpoint's is read.
        parity = by_rules(path, base, program)
        assert parity.read == len(CHECKPOINTS) and not parity.right
        return
    assert SWAPPED[name] < true.keys()
    parity = by_rules(path, base, program, 0.5)
    real = {w: in_comfyui(path, base.denoiser, SWAPPED[name], w) for w in (1.0, 0.5)}
    assert_same(parity, real, true)
    assert parity.right == ((kind, axis) != ("dora", "output"))
    errors = {layer.layer: layer.error for layer in parity.layers}
    if SWAPPED[name] and (kind, axis) == ("dora", "output"):
        others = max(error for layer, error in errors.items() if layer not in SWAPPED[name])
        assert all(errors[layer] > 1.2 * others for layer in SWAPPED[name])
        assert any("turns round the halves" in reason for reason in parity.reasons)


@pytest.mark.parametrize("form", ["compensated", "diff", None])
@pytest.mark.parametrize("name", MAKE)
def test_a_repaired_file_is_right_in_these_layers_too(tmp_path, name, form):
    base, path, true = written(name, tmp_path, "dora")
    made = repair(path, base, program_named("comfyui"), tmp_path / "repaired.safetensors", form=form)
    assert made.form.name == form or made.form.name == "compensated"
    for w in (1.0, 0.5):
        found = in_comfyui(made.path, base.denoiser, SWAPPED[name], w)
        assert max(errors_of(found, true, w).values()) < RIGHT


def test_chromas_guidance_layer_is_found_by_the_checkpoints_name_alone(tmp_path):
    base = Base("chroma", bases.chroma())
    config = AdapterConfig("lora", rank=4, target_modules=("to_q", "distilled_guidance_layer.in_proj"))
    adapter = perturb(inject_adapter(base.denoiser, config, seed=3), seed=3)
    own = save_adapter(adapter, tmp_path / "own.safetensors")
    adapter.eject()
    kohya = convert_adapter(own, tmp_path / "kohya.safetensors", "kohya").path
    for path in (own, kohya):
        parity = by_rules(path, base, "comfyui")
        unread = [layer.layer for layer in parity.layers if layer.error == 1]
        assert unread == ["distilled_guidance_layer.in_proj"] and not parity.right
        assert "does not read 1 layers" in parity.reasons
    made = repair(own, base, program_named("comfyui"), tmp_path / "repaired.safetensors")
    assert made.form.name == "comfyui" and by_rules(made.path, base, "comfyui").right
    with pytest.raises(Unrepairable, match=r"in distilled_guidance_layer\.in_proj, the worst layer"):
        repair(own, base, program_named("comfyui"), tmp_path / "never.safetensors", form="kohya")
    assert not (tmp_path / "never.safetensors").exists()
    ending = "distilled_guidance_layer_in_proj"
    renamed = {key.replace(f"lycoris_{ending}", f"lora_unet_{ending}"): t for key, t in load_file(kohya).items()}
    save_file(renamed, tmp_path / "renamed.safetensors")
    assert by_rules(tmp_path / "renamed.safetensors", base, "comfyui").right


@pytest.mark.parametrize("make", [bases.flux, bases.stable_diffusion_3, bases.chroma])
def test_diffusers_names_behind_a_checkpoints_prefix_are_not_found(tmp_path, make):
    base = Base("base", make())
    adapter = perturb(inject_adapter(base.denoiser, AdapterConfig("lora", rank=4, alpha=4.0, target_modules=("to_q",))))
    own = save_adapter(adapter, tmp_path / "own.safetensors")
    adapter.eject()
    for prefix in ("transformer.", "diffusion_model."):
        renamed = {prefix + key.removeprefix("transformer."): t for key, t in load_file(own).items()}
        save_file(renamed, tmp_path / "renamed.safetensors")
        parity = by_rules(tmp_path / "renamed.safetensors", base, "comfyui")
        assert parity.right == (prefix == "transformer.") and (parity.read > 0) == parity.right
