"""The rules for ComfyUI against ComfyUI: its own models, its own loader, its own patched weights.

It is run by the Python that COMFYUI_PYTHON names (docs/parity.md says how to make one); without it these tests are
skipped, and test_rules.py holds the rules to transcriptions of the sources. Every model here begins as one of
ComfyUI's, small, with random weights. diffusers' converters of checkpoints make diffusers' model of it, this project
makes adapter files for that, ComfyUI loads them, and the same converters bring the changed weights back.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import bases
import pytest
import torch
from comfyui_families import FAMILIES, Family, Weights
from oracles import perturb
from programs_run import Deltas, assert_same, by_rules, error_of
from safetensors.torch import load_file, save_file
from torch import nn

from dora_diffusion.adapters.injection import AdapterConfig, adaptable_layers, changeable_layers, inject_adapter
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import save_adapter
from dora_diffusion.models.loading import Base

COMFYUI = os.environ.get("COMFYUI_PYTHON")
pytestmark = pytest.mark.skipif(not COMFYUI, reason="COMFYUI_PYTHON names no Python that has ComfyUI")

STRENGTHS = (1.0, 0.5)
# What ComfyUI of 2026 finds, by its sources, and version 0.3.75 of November 2025 did not find yet.
LATER = {
    ("flux2", "PEFT"): "single_transformer_blocks.",
    ("flux2", "kohya"): "single_transformer_blocks.",
    ("flux2", "input"): "single_transformer_blocks.",
    ("flux2", "diff"): "single_transformer_blocks.",
    ("z-image", "PEFT"): "",
}


def run_comfyui(folder: Path, *arguments: str) -> None:
    script = Path(__file__).with_name("stock_comfyui.py")
    done = subprocess.run([str(COMFYUI), script, folder, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def random_weights(name: str, comfyui: tuple[str, dict[str, object]], folder: Path) -> Weights:
    """Of ComfyUI's model, by ComfyUI's names."""
    (folder / "models.json").write_text(json.dumps({name: comfyui}))
    run_comfyui(folder)
    return load_file(folder / f"{name}.safetensors")


@dataclass(frozen=True)
class Loaded:
    """What ComfyUI makes of a file: the changes of its weights at each strength, and the keys that it says it lacks."""

    changed: dict[float, Weights]
    unread: list[str]


def changes(name: str, files: list[Path], folder: Path) -> list[Loaded]:
    """What ComfyUI changes for each file, at each strength."""
    jobs = [{"model": name, "file": str(path), "strength": w} for path in files for w in STRENGTHS]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    run_comfyui(folder)
    loaded = iter([load_file(folder / f"{n}.safetensors") for n in range(len(jobs))])
    unread = [json.loads((folder / f"{n}.json").read_text()) for n in range(0, len(jobs), len(STRENGTHS))]
    return [Loaded({w: next(loaded) for w in STRENGTHS}, keys) for keys in unread]


def adapter_files(base: Base, folder: Path, **modules: object) -> dict[tuple[str, str], tuple[Path, Deltas]]:
    """A LoRA and a DoRA in every form, and a DoRA by input, each with the change that it means."""
    found = {}
    targets = (*base.family.target_modules, *base.family.convolutions)
    for kind, axis in (("lora", "output"), ("dora", "output"), ("dora", "input")):
        config = AdapterConfig(kind, rank=4, alpha=6.0, norm_axis=axis, target_modules=targets)
        adapter = perturb(inject_adapter(base.denoiser, config, seed=3, **modules), seed=3)
        true = {layer: update.delta_weight().double() for layer, update in adapter.updates().items()}
        path = save_adapter(adapter, folder / f"{kind}_{axis}.safetensors")
        adapter.eject()
        if axis == "input":
            found[kind, axis] = path, true
            own = convert_adapter(path, folder / "input_comfyui.safetensors", "comfyui", base=base).path
            found[kind, "comfyui, input"] = own, true
            continue
        kohya = convert_adapter(path, folder / f"{kind}_kohya.safetensors", "kohya").path
        own = convert_adapter(path, folder / f"{kind}_comfyui.safetensors", "comfyui", base=base).path
        diff = convert_adapter(path, folder / f"{kind}_diff.safetensors", "diff", base=base).path
        files = {"PEFT": path, "kohya": kohya, "comfyui": own, "diff": diff}
        found |= {(kind, form): (file, true) for form, file in files.items()}
    return found


def of_diffusers(family: Family, model: nn.Module, weights: Weights, changed: Weights) -> Deltas:
    """ComfyUI's changes of weights as changes of diffusers' layers."""
    before = family.convert({name: weight.clone() for name, weight in weights.items()}, model)
    after = family.convert({name: weight + changed.get(name, 0) for name, weight in weights.items()}, model)
    names = [name for name in after if not torch.equal(after[name], before[name])]
    return {name.removesuffix(".weight"): (after[name] - before[name]).double() for name in names}


@pytest.mark.parametrize("name", FAMILIES)
def test_comfyui_computes_what_the_rules_say(name, tmp_path):
    family = FAMILIES[name]
    weights, model = random_weights(name, family.comfyui, tmp_path), family.model()
    model.load_state_dict(family.convert({n: weight.clone() for n, weight in weights.items()}, model))
    pipeline = family.pipeline()
    pipeline.register_modules(**{"unet" if "unet" in pipeline.components else "transformer": model})
    base = Base(name, pipeline)
    files = adapter_files(base, tmp_path)
    found = changes(name, [file for file, _ in files.values()], tmp_path)
    for ((kind, form), (file, true)), loaded in zip(files.items(), found):
        real = {w: of_diffusers(family, model, weights, loaded.changed[w]) for w in STRENGTHS}
        if form.startswith("comfyui"):
            assert loaded.unread == []
        parity = by_rules(file, base, "comfyui", 0.5)
        if (tmp_path / "version.txt").read_text() == "0.3.75" and (name, form) in LATER:
            unread = {layer for layer in true if layer.startswith(LATER[name, form])}
            assert unread == true.keys() - real[1.0].keys()
            true = {layer: delta for layer, delta in true.items() if layer not in unread}
            parity = replace(parity, layers=tuple(x for x in parity.layers if x.layer not in unread))
        assert_same(parity, real, true)
        if form in ("diff", "input", "comfyui, input") or (kind, form) in (("lora", "kohya"), ("lora", "comfyui")):
            assert parity.right and parity.right_at_strength


VECTORS = ("sd1", "sd3", "flux", "chroma", "flux2", "qwen", "z-image")


@pytest.mark.parametrize("name", VECTORS)
def test_comfyui_makes_of_biases_and_norms_what_the_rules_say(name, tmp_path):
    family = FAMILIES[name]
    weights, model = random_weights(name, family.comfyui, tmp_path), family.model()
    model.load_state_dict(family.convert({n: weight.clone() for n, weight in weights.items()}, model))
    pipeline = family.pipeline()
    pipeline.register_modules(**{"unet" if "unet" in pipeline.components else "transformer": model})
    base = Base(name, pipeline)
    if (tmp_path / "version.txt").read_text() == "0.3.75":
        pytest.skip("its names for norms are not those of 0.33.0, which the rules are of")
    files = vector_files(base, tmp_path)
    for (path, true), loaded in zip(files, changes(name, [path for path, _ in files], tmp_path)):
        real = {w: of_diffusers(family, model, weights, loaded.changed[w]) for w in STRENGTHS}
        parity = by_rules(path, base, "comfyui", 0.5)
        assert parity.known and not parity.stopped
        assert_same(parity, real, true)
        if path.stem == "comfyui":
            assert parity.right and parity.right_at_strength and loaded.unread == []


def vector_files(base: Base, folder: Path) -> list[tuple[Path, Deltas]]:
    """Differences of all weights and biases, by either side's names, and weights in the place of the base's."""
    g = torch.Generator().manual_seed(5)
    prefix = "unet." if "unet" in base.pipe.components else "transformer."
    differences, wholes, true = {}, {}, {}
    for layer in changeable_layers(base.denoiser):
        module = base.denoiser.get_submodule(layer)
        for end, key, name in (("weight", "diff", layer), ("bias", "diff_b", f"{layer}.bias")):
            own = module._parameters.get(end)
            if own is not None:
                true[name] = 0.05 * torch.randn(own.shape, generator=g)
                differences[f"{prefix}{layer}.{key}"] = true[name]
        wholes[f"{prefix}{layer}.set_weight"] = module.weight.detach() + true[layer]
    save_file(differences, folder / "theirs.safetensors")
    save_file(wholes, folder / "wholes.safetensors")
    true = {name: delta.double() for name, delta in true.items()}
    of_weights = {name: delta for name, delta in true.items() if f"{prefix}{name}.set_weight" in wholes}
    files = [(folder / "theirs.safetensors", true), (folder / "wholes.safetensors", of_weights)]
    for to in ("comfyui", "diff", "kohya"):
        made = convert_adapter(folder / "theirs.safetensors", folder / f"{to}.safetensors", to, base=base).path
        files.append((made, true))
    made = convert_adapter(
        folder / "wholes.safetensors", folder / "whole_comfyui.safetensors", "comfyui", base=base
    ).path
    return [*files, (made, of_weights)]


# One layer more than the pipeline has: ComfyUI reads the last but one.
TEXT = {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
ENCODERS = {"text_encoder": "clip_l.transformer.", "text_encoder_2": "clip_g.transformer."}


def test_comfyui_changes_text_encoders_as_the_rules_say(tmp_path):
    pipeline = bases.stable_diffusion_xl()
    sizes = {f"clip_{which}_model_config": TEXT for which in "lg"}
    weights = random_weights("clip", ("SDXLClipModel", {"model_options": sizes}), tmp_path)
    for encoder, prefix in ENCODERS.items():
        for name, parameter in getattr(pipeline, encoder).named_parameters():
            if ".layers." in name:
                theirs = prefix + "text_model." + name.removeprefix("text_model.")
                parameter.data.copy_(weights[theirs])
    base = Base("sdxl", pipeline)
    files = adapter_files(base, tmp_path, text_encoders={encoder: getattr(pipeline, encoder) for encoder in ENCODERS})
    for (file, true), loaded in zip(files.values(), changes("clip", [f for f, _ in files.values()], tmp_path)):
        encoders = {layer: delta for layer, delta in true.items() if layer.startswith("text_encoder")}
        parity = by_rules(file, base, "comfyui", 0.5)
        parity = replace(parity, layers=tuple(x for x in parity.layers if x.layer in encoders))
        real = {
            w: {of_transformers(name, encoders): d.double() for name, d in loaded.changed[w].items()} for w in STRENGTHS
        }
        assert_same(parity, real, encoders)


def of_transformers(name: str, layers: Deltas) -> str:
    """ComfyUI's name of a text encoder's weight as the layer's, which may have no `text_model` in it."""
    name = name.removesuffix(".weight")
    for encoder, prefix in ENCODERS.items():
        if name.startswith(prefix):
            name = f"{encoder}.{name.removeprefix(prefix)}"
    return name if name in layers else name.replace(".text_model.", ".")


T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 1, "vocab_size": 64}
T5 |= {"is_gated_act": False, "dense_act_fn": "relu"}  # the pipeline's


def test_comfyui_loads_every_key_of_a_t5(tmp_path):
    pipeline = bases.flux()
    options = {"model_options": {"t5xxl_model_config": T5, "clip_l_model_config": {**TEXT, "num_hidden_layers": 1}}}
    random_weights("t5", ("FluxClipModel", options), tmp_path)
    layers = adaptable_layers(pipeline.text_encoder_2)
    g = torch.Generator().manual_seed(2)
    keys, true = {}, {}
    for layer, frozen in layers.items():
        A, B = (torch.randn(shape, generator=g) for shape in ((4, *frozen.in_shape), (frozen.out_features, 4)))
        name = f"text_encoder_2.{layer}"
        keys |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
        true[f"t5xxl.transformer.{layer}.weight"] = B.double() @ A.double()
    save_file(keys, tmp_path / "peft.safetensors")
    made = convert_adapter(tmp_path / "peft.safetensors", tmp_path / "a.safetensors", "comfyui", base=pipeline).path
    [loaded] = changes("t5", [made], tmp_path)
    assert loaded.unread == [] and loaded.changed[1.0].keys() == true.keys() and len(true) == 6
    for strength, changed in loaded.changed.items():
        assert all(error_of(changed[n].double(), strength * delta) < 1e-5 for n, delta in true.items())


FORMS = ("loha", "loha tucker", "loha dora", "loha dora by input", "lokr", "lokr, both low-rank", "lokr tucker")
FORMS += ("lokr whole", "lokr dora", "lokr dora by input", "glora", "oft", "oft, constrained and rescaled")
FORMS += ("boft", "boft, rescaled")
# What ComfyUI computes otherwise than LyCORIS: a norm of W0, and OFT's limit and rescaling.
OTHERWISE = ("loha dora", "lokr dora", "oft, constrained and rescaled")
FAILS_AT_CONVOLUTIONS = "lokr tucker"


@pytest.mark.parametrize("name", ["sd1", "qwen"])
def test_comfyui_computes_what_the_rules_say_of_lycoris_forms(name, tmp_path):
    from lycoris_files import write

    family = FAMILIES[name]
    weights, model = random_weights(name, family.comfyui, tmp_path), family.model()
    model.load_state_dict(family.convert({n: weight.clone() for n, weight in weights.items()}, model))
    pipeline = family.pipeline()
    pipeline.register_modules(**{"unet" if "unet" in pipeline.components else "transformer": model})
    base = Base(name, pipeline)
    files, true = [], []
    forms = [form for form in FORMS if name == "sd1" or "boft" not in form]  # it has no butterfly for Qwen's sizes
    for form in forms:
        written = write(model, form, tmp_path / f"{form}.lycoris.safetensors")
        files.append(convert_adapter(written.path, tmp_path / f"{form}.safetensors", "comfyui", base=base).path)
        true.append({layer: delta.double() for layer, delta in written.deltas.items()})
    for form, file, deltas, loaded in zip(forms, files, true, changes(name, files, tmp_path)):
        assert loaded.unread == [], form
        real = {w: of_diffusers(family, model, weights, loaded.changed[w]) for w in STRENGTHS}
        parity = by_rules(file, base, "comfyui", 0.5)
        assert_same(parity, real, deltas)
        fails = form == FAILS_AT_CONVOLUTIONS and name == "sd1"
        assert parity.right == (form not in OTHERWISE and not fails), form
