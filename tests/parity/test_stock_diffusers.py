"""What parity says of diffusers, beside the weights that stock diffusers has once it loaded and fused the same file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import dialect_files as files
import pytest
import torch
from dialect_files import Made, Values, fresh, values_of
from oracles import perturb
from programs_run import Deltas, by_rules, errors_of
from torch import Tensor, nn

from dora_diffusion.adapters.injection import AdapterConfig, inject_adapter
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import save_adapter
from dora_diffusion.inspection.parity import RIGHT
from dora_diffusion.inspection.programs import program_named
from dora_diffusion.inspection.repair import repair
from dora_diffusion.models.loading import Base

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = [
    *(
        f"{BLOCK}.{name}"
        for name in ("attn1.to_q", "attn1.to_k", "attn1.to_out.0", "attn2.to_v", "ff.net.0.proj", "ff.net.2")
    ),
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.1.resnets.0.conv_shortcut",
]
ATTENTION = UNET[:4]
ENCODER = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.0.self_attn.k_proj", "encoder.layers.1.mlp.fc1"]


def parts_of(pipe: object) -> dict[str, nn.Module]:
    models = {name: getattr(pipe, name, None) for name in ("unet", "transformer", "text_encoder", "text_encoder_2")}
    return {name: model for name, model in models.items() if model is not None}


def weights_of(pipe: object) -> dict[str, Tensor]:
    """Of every linear and convolutional layer, by the name that adapters have for it."""
    found = {}
    for part, model in parts_of(pipe).items():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                start = f"{part}." if part.startswith("text_encoder") else ""
                found[start + name.replace(".base_layer", "")] = module.weight.detach().double().clone()
    return found


def by_stock(path: Path, family: str) -> Deltas | str:
    """What load_lora_weights and fuse_lora change, layer by layer, or why they refuse the file."""
    pipe = fresh(family)
    before = weights_of(pipe)
    try:
        pipe.load_lora_weights(str(path), adapter_name="it")
        parts = [part for part in parts_of(pipe) if part in pipe._lora_loadable_modules]
        pipe.fuse_lora(components=parts)
    except Exception as error:
        return str(error)
    after = {n: w for n, w in weights_of(pipe).items() if n in before}
    return {n: after[n] - before[n] for n in before if not torch.equal(after[n], before[n])}


def assert_parity_is_stock(path: Path, family: str, true: Deltas) -> None:
    stock, parity = by_stock(path, family), by_rules(path, Base(family, fresh(family)), "diffusers")
    if isinstance(stock, str):
        assert parity.stopped.startswith("refuses the file: ") and not parity.right, stock
        assert " ".join(stock.split())[:60] in parity.stopped
        return
    assert not parity.stopped, parity.stopped
    measured = errors_of(stock, true, 1.0)
    said = {layer.layer: layer.error for layer in parity.layers}
    assert said.keys() == measured.keys() | (stock.keys() - true.keys())
    for layer, error in measured.items():
        assert said[layer] == pytest.approx(error, rel=1e-3, abs=RIGHT), layer
    assert parity.right == (max(measured.values()) <= RIGHT and stock.keys() <= true.keys())


# How alphas and ranks may vary over a file's layers.
SHAPES: dict[str, Callable[[int], tuple[int, float | None]]] = {
    "one alpha": lambda i: (4, 6.0),
    "alphas by layer": lambda i: (4, (6.0, 4.0, 1.0)[i % 3]),
    "ranks by layer, one alpha": lambda i: ((4, 2, 8)[i % 3], 4.0),
    "ranks and alphas by layer": lambda i: ((4, 2, 8)[i % 3], (6.0, 2.0, 1.0, 4.0)[i % 4]),
    "some without alpha": lambda i: (4, (6.0, None)[i % 2]),
    "ranks by layer, no alpha": lambda i: ((4, 2, 8)[i % 3], None),
}


def made_with(
    model: nn.Module,
    paths: list[str],
    name: Callable[[str], str],
    leaves: Callable[[Values], dict[str, Tensor]],
    delta: Callable[[Values], Tensor],
    shape: str,
    into: Made,
    deltas_behind: str = "",
) -> Made:
    """A file's modules with the ranks and alphas of this shape; a layer without alpha has alpha = rank."""
    for i, path in enumerate(paths):
        rank, alpha = SHAPES[shape](i)
        generator = torch.Generator().manual_seed(i)
        weight = model.get_submodule(path).weight
        v = values_of(weight, generator, (alpha or rank) / rank, rank)
        for leaf, tensor in leaves(v).items():
            if leaf != "alpha" or alpha is not None:
                into.tensors[name(path) + ("" if leaf.startswith("_") else ".") + leaf] = tensor
        into.deltas[deltas_behind + path] = delta(v)
    return into


def processor(path: str) -> str:
    return "unet." + path.replace("attn1.", "attn1.processor.").replace("attn2.", "attn2.processor.").removesuffix(".0")


def in_encoder(prefix: str) -> Callable[[str], str]:
    """Flat and with `text_model`, which transformers 5 has in one of the classes and not in the other."""
    return lambda path: files.flat(f"{prefix}text_model_")(path.removeprefix("text_model."))


def joined(v: Values) -> dict[str, Tensor]:
    return {"_lora.down.weight": v.A, "_lora.up.weight": v.B}


def with_alpha(leaves: Callable[[Values], dict[str, Tensor]]) -> Callable[[Values], dict[str, Tensor]]:
    return lambda v: {**leaves(v), **files.alpha(v)}


def peft_dora(v: Values) -> dict[str, Tensor]:
    shape = (-1,) if v.W0.dim() == 2 else (1, -1, 1, 1)
    return {**files.peft(v), "lora_magnitude_vector": v.by_output.reshape(shape)}


DIALECTS = {
    "kohya": (UNET, files.flat("lora_unet_"), files.kohya, files.lora_delta),
    "kohya DoRA": (UNET, files.flat("lora_unet_"), files.kohya_dora, files.dora_delta),
    "kohya DoRA by input": (UNET, files.flat("lora_unet_"), files.kohya_input_axis, files.input_axis_delta),
    "LyCORIS": (UNET, files.flat("lycoris_"), files.kohya, files.lora_delta),
    "differences": (UNET, files.flat("lora_unet_"), lambda v: {"diff": files.lora_delta(v).float()}, files.lora_delta),
    "PEFT and alphas": (UNET, files.dotted("unet."), with_alpha(files.peft), files.lora_delta),
    "a checkpoint's prefix": (UNET, files.dotted("diffusion_model."), with_alpha(files.peft), files.lora_delta),
}
# Those that save no alpha: it is the rank.
WITHOUT_ALPHA = {
    "PEFT": (UNET, files.dotted("unet."), files.peft, files.lora_delta),
    "PEFT DoRA": (UNET, files.dotted("unet."), peft_dora, files.dora_delta),
    "a PEFT folder": (UNET, files.dotted("base_model.model."), files.peft, files.lora_delta),
    "no prefix": (UNET, files.dotted(""), files.peft, files.lora_delta),
    "NVlabs": (UNET[:6], files.dotted("base_model.model."), files.nvlabs, files.dora_delta),
    "old diffusers": (ATTENTION, processor, joined, files.lora_delta),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_parity_is_what_stock_diffusers_makes_of_a_unets_file(tmp_path, dialect, shape):
    paths, name, leaves, delta = DIALECTS[dialect]
    made = made_with(fresh("sd").unet, paths, name, leaves, delta, shape, Made())
    assert_parity_is_stock(made.save(tmp_path / "a.safetensors"), "sd", made.deltas)


@pytest.mark.parametrize("dialect", WITHOUT_ALPHA)
def test_parity_is_what_stock_diffusers_makes_of_a_file_without_alphas(tmp_path, dialect):
    paths, name, leaves, delta = WITHOUT_ALPHA[dialect]
    made = made_with(fresh("sd").unet, paths, name, leaves, delta, "ranks by layer, no alpha", Made())
    assert_parity_is_stock(made.save(tmp_path / "a.safetensors"), "sd", made.deltas)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["sd", "xl"])
def test_parity_is_what_stock_diffusers_makes_of_text_encoders(tmp_path, family, kind, shape):
    pipe = fresh(family)
    leaves, delta = (files.kohya, files.lora_delta) if kind == "lora" else (files.kohya_dora, files.dora_delta)
    made = made_with(pipe.unet, ATTENTION, files.flat("lora_unet_"), leaves, delta, shape, Made())
    names = (
        {"text_encoder": "lora_te_"} if family == "sd" else {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    )
    for encoder, prefix in names.items():
        model = getattr(pipe, encoder)
        paths = [("text_model." if hasattr(model, "text_model") else "") + path for path in ENCODER]
        made_with(model, paths, in_encoder(prefix), leaves, delta, shape, made, f"{encoder}.")
    assert_parity_is_stock(made.save(tmp_path / "a.safetensors"), family, made.deltas)


FLUX = {
    "PEFT": (files.dotted("transformer."), files.peft, "ranks by layer, no alpha"),
    "PEFT and alphas": (files.dotted("transformer."), with_alpha(files.peft), "alphas by layer"),
    "OneTrainer": (files.flat("lora_transformer_"), files.kohya, "alphas by layer"),
    "LyCORIS": (files.flat("lycoris_"), files.kohya, "alphas by layer"),
}


@pytest.mark.parametrize("dialect", FLUX)
def test_parity_is_what_stock_diffusers_makes_of_flux(tmp_path, dialect):
    name, leaves, shape = FLUX[dialect]
    paths = [f"transformer_blocks.0.attn.{layer}" for layer in ("to_q", "to_v", "to_out.0", "add_k_proj")]
    paths += ["single_transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp", "norm_out.linear"]
    made = made_with(fresh("flux").transformer, paths, name, leaves, files.lora_delta, shape, Made())
    assert_parity_is_stock(made.save(tmp_path / "a.safetensors"), "flux", made.deltas)


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["sd", "xl"])
def test_own_files_are_right_in_stock_diffusers_and_repaired_ones_are(tmp_path, family, kind, stabilised):
    """Ranks and alphas by layer, text encoder and all; in kohya's layout they come out otherwise, and are repaired."""
    pipe = fresh(family)
    config = AdapterConfig(
        kind,
        rank=4,
        alpha=6.0,
        use_rslora=stabilised,
        rank_pattern={f"{BLOCK}.attn1.to_q": 2},
        alpha_pattern={f"{BLOCK}.attn1.to_q": 1.0, f"{BLOCK}.attn2.to_k": 3.0},
    )
    adapter = perturb(inject_adapter(pipe.unet, config, seed=3, text_encoders={"text_encoder": pipe.text_encoder}))
    true = {layer: update.delta_weight().double() for layer, update in adapter.updates().items()}
    path = save_adapter(adapter, tmp_path / "own.safetensors")
    assert_parity_is_stock(path, family, true)
    base = Base(family, fresh(family))
    assert by_rules(path, base, "diffusers").right
    kohya = convert_adapter(path, tmp_path / "kohya.safetensors", "kohya").path
    assert_parity_is_stock(kohya, family, true)
    found = by_rules(kohya, base, "diffusers")
    assert not found.right and any("another alpha / rank" in reason for reason in found.reasons)
    made = repair(kohya, base, program_named("diffusers"), tmp_path / "repaired.safetensors")
    stock = by_stock(made.path, family)
    assert not isinstance(stock, str), stock
    assert max(errors_of(stock, true, 1.0).values()) < RIGHT
