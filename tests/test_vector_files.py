"""Files that change biases and normalisation layers: ComfyUI's extraction, LyCORIS's train_norm and full, PEFT's
lora_bias and BFL's control adapters. What is expected is computed by ComfyUI's rule, W0 + strength * difference, in
float64 on the original checkpoint, which diffusers itself then converts; or by LyCORIS and PEFT themselves."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path

import bases
import lycoris_files
import peft
import pytest
import torch
from diffusers.loaders import single_file_utils
from oracles import output_of, relative_error
from safetensors.torch import load_file, save_file
from test_norm_names import TRANSFORMER_MODELS, original_checkpoint
from test_vectors import RUNS as ALL_RUNS
from test_vectors import Run, by_hand, differences, of_model, of_pipeline, sd35
from torch import Tensor, nn

from dora_diffusion.adapters.injection import changeable_layers
from dora_diffusion.errors import AdapterFileError, AdapterMismatchError, AdapterStateError
from dora_diffusion.formats.anatomy import anatomy_of
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import load_adapter, read_adapter_file, save_adapter
from dora_diffusion.formats.loading import attach_trainable
from dora_diffusion.inspection.look import look_at
from dora_diffusion.models.loading import load_base

RUNS: dict[str, Callable[[], Run]] = {
    "unet": lambda: of_model(bases.unet()),
    "sd3": lambda: of_model(sd35()),
    "flux2": lambda: of_pipeline(bases.flux2_klein()),
    "z-image": lambda: of_pipeline(bases.z_image()),
}


def checkpoint_of(family: str, model: nn.Module) -> dict[str, Tensor]:
    """The model's parameters as its original checkpoint has them; ComfyUI's prefix is left out."""
    if family != "unet":
        return original_checkpoint(family, model)
    originals = {ours: theirs for theirs, ours in anatomy_of(model, changeable_layers(model)).originals.items()}
    state = model.state_dict()
    return {f"{originals[key.rpartition('.')[0]]}.{key.rpartition('.')[2]}": tensor for key, tensor in state.items()}


def converted(family: str, model: nn.Module, checkpoint: dict[str, Tensor]) -> nn.Module:
    """The model of this checkpoint, by diffusers' conversion."""
    if family == "unet":
        given = {f"model.diffusion_model.{key}": tensor for key, tensor in checkpoint.items()}
        state = single_file_utils.convert_ldm_unet_checkpoint(given, dict(model.config))
    else:
        state = getattr(single_file_utils, TRANSFORMER_MODELS[family][1])(dict(checkpoint))
    made = copy.deepcopy(model)
    made.load_state_dict({**made.state_dict(), **state})
    return made


def extracted(checkpoint: dict[str, Tensor], whole: bool = False) -> dict[str, Tensor]:
    """What ComfyUI's LoraSave writes, with random changes: `.diff` of norms (or of every weight), `.diff_b` of biases,
    low-rank matrices without an alpha of the rest."""
    g, keys = torch.Generator().manual_seed(7), {}
    for key, W in checkpoint.items():
        module, _, end = key.rpartition(".")
        name = f"diffusion_model.{module}"
        if end == "bias":
            keys[f"{name}.diff_b"] = (0.1 * torch.randn(W.shape, generator=g)).half()
        elif end == "scale" or (W.dim() == 1 and end == "weight"):
            keys[f"{name}{'.scale' if end == 'scale' else ''}.diff"] = (0.1 * torch.randn(W.shape, generator=g)).half()
        elif end == "weight" and whole:
            keys[f"{name}.diff"] = (0.03 * torch.randn(W.shape, generator=g)).half()
        elif end == "weight":
            out, n_in, *kernel = W.shape
            ones = (1,) * len(kernel)
            keys[f"{name}.lora_up.weight"] = (0.1 * torch.randn(out, 2, *ones, generator=g)).half()
            keys[f"{name}.lora_down.weight"] = (0.1 * torch.randn(2, n_in, *kernel, generator=g)).half()
    return keys


def by_comfys_rule(checkpoint: dict[str, Tensor], keys: dict[str, Tensor], strength: float) -> dict[str, Tensor]:
    """W0 + strength * difference, in float64."""
    made = {}
    for key, W in checkpoint.items():
        module, _, end = key.rpartition(".")
        name = "diffusion_model." + (key if end == "scale" else module)
        change: Tensor | float = 0.0
        if end == "bias":
            change = keys[f"{name}.diff_b"].double()
        elif f"{name}.diff" in keys:
            change = keys[f"{name}.diff"].double()
        elif f"{name}.lora_up.weight" in keys:
            B, A = keys[f"{name}.lora_up.weight"].double(), keys[f"{name}.lora_down.weight"].double()
            change = (B.flatten(1) @ A.flatten(1)).reshape(W.shape)
        made[key] = (W.double() + strength * change).to(W.dtype)
    return made


@pytest.mark.parametrize("whole", [False, True], ids=["standard", "full_diff"])
@pytest.mark.parametrize("family", RUNS)
def test_comfyuis_extraction_is_the_checkpoint_with_its_differences(tmp_path, family, whole):
    run = RUNS[family]()
    base, checkpoint = copy.deepcopy(run.model), checkpoint_of(family, run.model)
    keys = extracted(checkpoint, whole)
    save_file(keys, tmp_path / "a.safetensors")
    before, bits = run.output(), {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    adapter = load_adapter(run.model, tmp_path / "a.safetensors")
    tuned = converted(family, base, by_comfys_rule(checkpoint, keys, 1.0))
    assert relative_error(run.output(tuned), before) > 1e-3
    for strength in (1.0, -0.4):
        expected = converted(family, base, by_comfys_rule(checkpoint, keys, strength))
        adapter.strength = strength
        assert relative_error(run.output(), run.output(expected)) < 2e-5
        adapter.fuse()
        changed = dict(run.model.named_parameters())
        for name, parameter in expected.named_parameters():
            path, _, end = name.rpartition(".")
            found = changed[f"{path}.base.{end}" if path in adapter.layers else name]
            assert relative_error(found, parameter) < 1e-6, name
        adapter.unfuse()
    adapter.strength = 0.0
    assert torch.equal(run.output(), before)
    adapter.eject()
    assert torch.equal(run.output(), before)
    assert all(torch.equal(tensor, bits[name]) for name, tensor in run.model.state_dict().items())


@pytest.mark.parametrize("family", RUNS)
def test_a_difference_is_written_that_adds_the_same_to_every_parameter(tmp_path, family):
    """`--to diff` and `--to kohya` of an extraction, read again."""
    run = RUNS[family]()
    save_file(extracted(checkpoint_of(family, run.model)), tmp_path / "a.safetensors")
    adapter = load_adapter(run.model, tmp_path / "a.safetensors")
    expected = run.output()
    deltas = {path: (u.delta_weight(), u.bias_difference) for path, u in adapter.updates().items()}
    adapter.eject()
    for target in ("diff", "kohya"):
        made = convert_adapter(tmp_path / "a.safetensors", tmp_path / f"{target}.safetensors", target, base=run.model)
        written = load_file(made.path)
        if target == "diff":  # FLUX.2 has no biases
            ends = {"diff"} if family == "flux2" else {"diff", "diff_b"}
            assert {key.rpartition(".")[2] for key in written} == ends
        again = load_adapter(run.model, made.path)
        for path, update in again.updates().items():
            weight, bias = deltas[path]
            assert (update.delta_weight() - weight).abs().max() < 1e-6, path
            assert (bias is None) == (update.bias_difference is None)
            assert bias is None or torch.equal(bias, update.bias_difference), path
        assert again.updates().keys() == deltas.keys()
        assert relative_error(run.output(), expected) < 2e-5
        again.eject()
    for target, words in (("lora", "which a LoRA cannot hold"), ("diffusers", "which PEFT does not have")):
        with pytest.raises(AdapterFileError, match=words) as refused:
            convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", target, base=run.model)
        assert "--to diff" in str(refused.value)


@pytest.mark.parametrize("family", [name for name in ALL_RUNS if name not in ("t5", "clip")])
def test_by_diffusers_names_everything_may_be_changed_of_every_family(tmp_path, family):
    """Dotted and flat names, and what is written of them, beside the parameters changed by hand."""
    run = ALL_RUNS[family]()
    held = differences(run.model)
    expected = run.output(by_hand(run.model, [(1.0, held)]))
    before = run.output()
    ends = {"difference": "diff", "bias_difference": "diff_b"}
    for prefix, flat in (
        ("unet." if family == "unet" else "transformer.", False),
        ("lora_unet_", True),
        ("lycoris_", True),
    ):
        keys = {
            f"{prefix}{path.replace('.', '_') if flat else path}.{ends[name]}": tensor
            for path, tensors in held.items()
            for name, tensor in tensors.items()
        }
        save_file(keys, tmp_path / "a.safetensors")
        adapter = load_adapter(run.model, tmp_path / "a.safetensors")
        assert relative_error(run.output(), expected) < 2e-5
        adapter.eject()
        assert torch.equal(run.output(), before)
    for target in ("diff", "kohya"):
        made = convert_adapter(tmp_path / "a.safetensors", tmp_path / f"{target}.safetensors", target, base=run.model)
        adapter = load_adapter(run.model, made.path)
        assert relative_error(run.output(), expected) < 2e-5
        adapter.eject()
        # Not every layer's weight is changed here, so that parts of a fused one stay by themselves.
        lost = any("of parts of one layer" in note for note in made.notes)
        assert lost == (family in ("sd3", "flux", "chroma"))


@pytest.mark.parametrize("algorithm", lycoris_files.WITH_NORMS)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_train_norm_gives_what_it_gives_inside_lycoris(tmp_path, algorithm, strength):
    model = bases.unet()
    base = output_of(model)
    network = lycoris_files.wrapped(model, algorithm)
    norms = [module for module in network.loras if type(module).__name__ == "NormModule"]
    assert len(norms) > 20
    network.save_weights(str(tmp_path / "a.safetensors"), torch.float32, {})
    keys = load_file(tmp_path / "a.safetensors")
    assert sum(key.endswith(".w_norm") for key in keys) == sum(key.endswith(".b_norm") for key in keys) == len(norms)
    theirs = None
    if algorithm == "full, norms":  # its modules take the weights out of the model
        tuned = bases.unet()
        ends = {"diff": "weight", "diff_b": "bias", "w_norm": "weight", "b_norm": "bias"}
        with torch.no_grad():
            for path, module in tuned.named_modules():
                for end, parameter in ends.items():
                    if (d := keys.get(f"lycoris_{path.replace('.', '_')}.{end}")) is not None:
                        module.get_parameter(parameter).add_(strength * d)
        theirs = output_of(tuned)
    elif strength == 1.0 or algorithm == "locon, norms":  # LyCORIS's strength of a DoRA is another thing
        network.apply_to()
        network.set_multiplier(strength)
        theirs = output_of(model)
        network.restore()
    model = bases.unet()
    adapter = load_adapter(model, tmp_path / "a.safetensors", strength=strength)
    assert adapter.config.rank > 1 or algorithm == "full, norms", "norms do not say the rank"
    if theirs is not None:
        assert relative_error(output_of(model) - base, theirs - base) < 1e-4
    made = convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", base=bases.unet()).path
    if algorithm != "full, norms":
        again = {key.replace("lora_unet_", "lycoris_"): tensor for key, tensor in load_file(made).items()}
        assert again.keys() == keys.keys()
        assert all(torch.equal(again[key].double(), keys[key].double()) for key in keys)
    adapter.strength = 0.0
    assert torch.equal(output_of(model), base)


def with_peft_bias(model: nn.Module, alpha: float, targets: list[str], rslora: bool = False) -> None:
    """PEFT's own layers with lora_bias=True in the model, with random values everywhere."""
    torch.manual_seed(0)
    model.add_adapter(
        peft.LoraConfig(
            r=4, lora_alpha=alpha, target_modules=targets, lora_bias=True, init_lora_weights=False, use_rslora=rslora
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                parameter.copy_(0.2 * torch.randn(parameter.shape))


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("make", [bases.unet, bases.flux_transformer], ids=["unet", "flux"])
def test_a_file_of_peft_with_lora_bias_gives_what_peft_gives(tmp_path, make, rslora):
    theirs = make()
    base = output_of(theirs)
    with_peft_bias(theirs, 6.0, ["to_q", "to_out.0"], rslora)
    expected = output_of(theirs)
    theirs.save_lora_adapter(tmp_path, weight_name="a.safetensors")
    assert any(key.endswith("lora_B.bias") for key in load_file(tmp_path / "a.safetensors"))
    keys = load_file(tmp_path / "a.safetensors")  # as PEFT's own state_dict has them, with the adapter's name
    named = {
        k.replace("lora_B.bias", "lora_B.default.bias").replace("weight", "default.weight"): t for k, t in keys.items()
    }
    header = {"lora_adapter_metadata": json.dumps({"lora_alpha": 6.0, "use_rslora": rslora})}
    save_file({f"base_model.model.{key}": t for key, t in named.items()}, tmp_path / "n.safetensors", header)
    model = make()
    adapter = load_adapter(model, tmp_path / "n.safetensors")
    assert relative_error(output_of(model) - base, expected - base) < 1e-5
    adapter.eject()
    adapter = load_adapter(model, tmp_path / "a.safetensors")
    assert relative_error(output_of(model) - base, expected - base) < 1e-5
    without = [path for path, layer in adapter.layers.items() if layer.base.bias is None]
    if without:  # a UNet's to_q has no bias: PEFT gives it one
        with pytest.raises(AdapterStateError, match="without a bias"):
            adapter.fuse()
        for target in ("diff", "kohya"):
            with pytest.raises(AdapterFileError, match=r"layers that have none.*--to diffusers"):
                convert_adapter(tmp_path / "a.safetensors", tmp_path / "d.safetensors", target, base=make())
        noted = convert_adapter(tmp_path / "a.safetensors", tmp_path / "d.safetensors", "kohya").notes
        assert any("only where it has a bias" in note for note in noted)
    else:
        adapter.fuse()
        assert relative_error(output_of(model) - base, expected - base) < 1e-5
        adapter.unfuse()
    adapter.strength = 0.0
    assert torch.equal(output_of(model), base)

    made = convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers").path
    stock = make()
    prefix = "unet" if make is bases.unet else "transformer"
    stock.load_lora_adapter(str(made), prefix=prefix, use_safetensors=True)
    assert relative_error(output_of(stock) - base, expected - base) < 1e-5


def test_biases_of_some_layers_are_written_so_that_stock_diffusers_reads_them(tmp_path):
    """PEFT has a bias in every layer of an adapter or in none: the others get zeros."""
    g = torch.Generator().manual_seed(0)
    keys = {}
    for block in ("down_blocks.0", "up_blocks.1"):
        for layer, outputs in (("to_q", 32), ("to_out.0", 32)):
            name = f"unet.{block}.attentions.0.transformer_blocks.0.attn1.{layer}"
            keys[f"{name}.lora_A.weight"] = torch.randn(2, 32, generator=g)
            keys[f"{name}.lora_B.weight"] = torch.randn(outputs, 2, generator=g)
    keys[f"{name}.lora_B.bias"] = torch.randn(32, generator=g)
    save_file(keys, tmp_path / "a.safetensors")
    model = bases.unet()
    load_adapter(model, tmp_path / "a.safetensors")
    made = convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers").path
    assert sum(key.endswith("lora_B.bias") for key in load_file(made)) == 4
    stock = bases.unet()
    stock.load_lora_adapter(str(made), prefix="unet", use_safetensors=True)
    assert relative_error(output_of(stock), output_of(model)) < 1e-5


# By BFL's names: diffusers' layers and their rows. Independent of the tables that read them.
WIDTH = 32
BFL_ROWS = {
    r"double_blocks.0.img_attn.qkv": [(f"transformer_blocks.0.attn.to_{x}", i * 32, 32) for i, x in enumerate("qkv")],
    r"double_blocks.0.txt_attn.qkv": [
        (f"transformer_blocks.0.attn.add_{x}_proj", i * 32, 32) for i, x in enumerate("qkv")
    ],
    r"double_blocks.0.img_attn.proj": [("transformer_blocks.0.attn.to_out.0", 0, 32)],
    r"double_blocks.0.txt_mlp.0": [("transformer_blocks.0.ff_context.net.0.proj", 0, 128)],
    r"double_blocks.0.img_mod.lin": [("transformer_blocks.0.norm1.linear", 0, 192)],
    r"single_blocks.0.linear1": [
        *((f"single_transformer_blocks.0.attn.to_{x}", i * 32, 32) for i, x in enumerate("qkv")),
        ("single_transformer_blocks.0.proj_mlp", 96, 128),
    ],
    r"single_blocks.0.modulation.lin": [("single_transformer_blocks.0.norm.linear", 0, 96)],
    r"img_in": [("x_embedder", 0, 32)],
    r"final_layer.adaLN_modulation.1": [("norm_out.linear", 32, 32), ("norm_out.linear", 0, 32)],
}
BFL_NORMS = {
    "double_blocks.0.img_attn.norm.query_norm": "transformer_blocks.0.attn.norm_q",
    "double_blocks.0.img_attn.norm.key_norm": "transformer_blocks.0.attn.norm_k",
    "double_blocks.0.txt_attn.norm.query_norm": "transformer_blocks.0.attn.norm_added_q",
    "double_blocks.0.txt_attn.norm.key_norm": "transformer_blocks.0.attn.norm_added_k",
    "single_blocks.0.norm.query_norm": "single_transformer_blocks.0.attn.norm_q",
    "single_blocks.0.norm.key_norm": "single_transformer_blocks.0.attn.norm_k",
}


def bfl_control(model: nn.Module, in_channels: int = 4) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A control adapter as BFL names it, and the model's parameters with it, by hand in float64."""
    g = torch.Generator().manual_seed(3)
    state = {name: tensor.double() for name, tensor in model.state_dict().items()}
    keys = {}
    for module, parts in BFL_ROWS.items():
        rows = sum(n for _, _, n in parts)
        n_in = in_channels if module == "img_in" else state[f"{parts[0][0]}.weight"].shape[1]
        A, B = 0.2 * torch.randn(2, n_in, generator=g), 0.2 * torch.randn(rows, 2, generator=g)
        b = 0.1 * torch.randn(rows, generator=g)
        keys |= {f"{module}.lora_A.weight": A, f"{module}.lora_B.weight": B, f"{module}.lora_B.bias": b}
        D = B.double() @ A.double()
        at = 0
        if n_in == state[f"{parts[0][0]}.weight"].shape[1]:
            if module.startswith("final_layer"):
                D, b = D.roll(32, 0), b.roll(32)  # scale and shift change places
                parts = [("norm_out.linear", 0, 64)]
            for layer, first, n in parts:
                at = first if len(parts) > 1 else 0
                state[f"{layer}.weight"] = state[f"{layer}.weight"] + D[at : at + n]
                state[f"{layer}.bias"] = state[f"{layer}.bias"] + b.double()[at : at + n]
    for module, layer in BFL_NORMS.items():
        scale = 1 + 0.3 * torch.randn(state[f"{layer}.weight"].shape, generator=g)
        keys[f"{module}.scale"] = scale
        state[f"{layer}.weight"] = scale.double()
    return keys, {name: tensor.to(model.state_dict()[name].dtype) for name, tensor in state.items()}


def as_comfy(keys: dict[str, Tensor]) -> dict[str, Tensor]:
    """As ComfyUI renames BFL's keys when it reads them."""
    renamed = {
        "diffusion_model." + k.replace(".lora_B.bias", ".diff_b").replace("_norm.scale", "_norm.scale.set_weight"): t
        for k, t in keys.items()
    }
    shape = [keys["img_in.lora_B.weight"].shape[0], keys["img_in.lora_A.weight"].shape[1]]
    return {**renamed, "diffusion_model.img_in.reshape_weight": torch.tensor(shape)}


def as_diffusers(keys: dict[str, Tensor]) -> dict[str, Tensor]:
    """The norms under diffusers' names, as its scripts for control adapters save them."""
    kept = {k: t for k, t in keys.items() if not k.endswith(".scale")}
    return kept | {f"transformer.{layer}.weight": keys[f"{module}.scale"] for module, layer in BFL_NORMS.items()}


@pytest.mark.parametrize("spelling", [dict, as_comfy, as_diffusers])
def test_a_control_adapter_of_bfl_is_flux_with_its_biases_and_norms(tmp_path, spelling):
    model = bases.flux_transformer()
    keys, state = bfl_control(model)
    save_file(spelling(keys), tmp_path / "a.safetensors")
    before, tuned = output_of(model), bases.flux_transformer()
    tuned.load_state_dict(state)
    adapter = load_adapter(model, tmp_path / "a.safetensors")
    assert relative_error(output_of(model), output_of(tuned)) < 2e-5
    assert relative_error(output_of(tuned), before) > 1e-2
    adapter.fuse()
    assert relative_error(output_of(model), output_of(tuned)) < 2e-5
    adapter.unfuse()
    adapter.strength = 0.0
    assert torch.equal(output_of(model), before)
    adapter.eject()
    for target in ("diff", "kohya"):
        made = convert_adapter(tmp_path / "a.safetensors", tmp_path / f"{target}.safetensors", target, base=model).path
        again = load_adapter(model, made)
        assert relative_error(output_of(model), output_of(tuned)) < 2e-5
        again.eject()


def test_a_control_adapter_for_more_channels_says_that_the_base_has_fewer(tmp_path):
    model = bases.flux_transformer()
    keys, _ = bfl_control(model, in_channels=8)
    for spelling in (dict, as_comfy):
        save_file(spelling(keys), tmp_path / "a.safetensors")
        with pytest.raises(AdapterMismatchError, match=r"x_embedder.*32 x \[8\].*this layer has 32 x \[4\]") as refused:
            load_adapter(model, tmp_path / "a.safetensors")
        assert "its base has 8 inputs there, not 4" in str(refused.value)
    wide = bases.flux_transformer(in_channels=8)
    load_adapter(wide, tmp_path / "a.safetensors")


def mutated(**changes: Tensor | None) -> dict[str, Tensor]:
    """A small sound file over the small UNet, with some keys changed, added or taken out."""
    sound = {
        "diffusion_model.out.0.diff": torch.ones(32),
        "diffusion_model.out.0.diff_b": torch.ones(32),
        "diffusion_model.out.2.diff_b": torch.ones(4),
        "lora_unet_out_2.lora_down.weight": torch.ones(2, 32, 3, 3),
        "lora_unet_out_2.lora_up.weight": torch.ones(4, 2, 1, 1),
    }
    del sound["diffusion_model.out.2.diff_b"]
    sound["lora_unet_out_2.diff_b"] = torch.ones(4)
    made = {**sound, **{k: v for k, v in changes.items() if v is not None}}
    return {k: v for k, v in made.items() if changes.get(k, v) is not None}


NORM, CONV = "diffusion_model.out.0", "lora_unet_out_2"
TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
BROKEN: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "a norm of two axes": ({f"{NORM}.diff": torch.ones(32, 1)}, "difference"),
    "a norm of another size": (
        {f"{NORM}.diff": torch.ones(31), f"{NORM}.diff_b": None},
        r"\[31\] for a weight of \[32\]",
    ),
    "a norm and its bias of two sizes": ({f"{NORM}.diff_b": torch.ones(31)}, r"bias_difference of shape \[31\]"),
    "a bias of two axes": ({f"{CONV}.diff_b": torch.ones(4, 1)}, r"bias_difference of shape \[4, 1\]"),
    "a bias of another size": ({f"{CONV}.diff_b": torch.ones(5)}, r"bias_difference of shape \[5\] for 4 outputs"),
    "a bias without numbers": ({f"{CONV}.diff_b": torch.ones(0)}, "bias_difference of shape"),
    "a bias alone of another size": (
        {f"{CONV}.lora_up.weight": None, f"{CONV}.lora_down.weight": None, f"{CONV}.diff_b": torch.ones(5)},
        "difference of 5 biases, this layer has 4",
    ),
    "no number": ({f"{NORM}.diff_b": torch.full((32,), torch.nan)}, "not finite"),
    "beyond all reason": ({f"{CONV}.diff_b": torch.full((4,), 1e7)}, "not finite"),
    "whole numbers": ({f"{CONV}.diff_b": torch.ones(4, dtype=torch.int64)}, "numbers of a kind"),
    "a magnitude on a norm": ({f"{NORM}.dora_scale": torch.ones(32)}, "dora_scale beside"),
    "two sorts of bias": ({f"{CONV}.lora_B.bias": torch.ones(4)}, "lora_B.bias beside bias_difference|mixes two"),
    "PEFT's bias alone": ({"unet.conv_in.lora_B.bias": torch.ones(32)}, "conv_in: lora_A|mixes two"),
    "one bias twice": ({"lora_unet_out_0.b_norm": torch.ones(32)}, "there already"),
    "a shape that is not the update's": (
        {f"{CONV}.reshape_weight": torch.tensor([4, 32, 1, 1])},
        "reshape_weight says",
    ),
    "two whole weights": ({f"{NORM}.set_weight": torch.ones(32)}, "beside a whole difference"),
    "a bias of a layer without one": ({f"{TO_Q}.diff_b": torch.ones(32)}, "this layer has none"),
    "B A for a norm": (
        {
            "lora_unet_conv_norm_out.lora_down.weight": torch.ones(2, 32),
            "lora_unet_conv_norm_out.lora_up.weight": torch.ones(32, 2),
        },
        "LoRA for a normalisation layer|there already",
    ),
    "B A for a norm alone": (
        {
            f"{NORM}.diff": None,
            f"{NORM}.diff_b": None,
            f"{NORM}.lora_down.weight": torch.ones(2, 32),
            f"{NORM}.lora_up.weight": torch.ones(32, 2),
        },
        "LoRA for a normalisation layer",
    ),
    "a DoRA by input for a norm alone": (
        {
            f"{NORM}.diff": None,
            f"{NORM}.diff_b": None,
            f"{NORM}.lora_down.weight": torch.ones(2, 32),
            f"{NORM}.lora_up.weight": torch.ones(32, 2),
            f"{NORM}.dora_scale": torch.ones(1, 32),
            f"{CONV}.dora_scale": torch.ones(1, 32, 1, 1),
        },
        "LoRA for a normalisation layer",
    ),
    "a norm that is not there": (
        {"diffusion_model.input_blocks.1.0.in_layers.7.diff": torch.ones(32)},
        "not in this model",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_of_norms_and_biases_is_refused_in_words(tmp_path, case):
    changes, words = BROKEN[case]
    save_file(mutated(**changes), tmp_path / "a.safetensors")
    model = bases.unet()
    before = output_of(model)
    with pytest.raises((AdapterFileError, AdapterMismatchError), match=words):
        load_adapter(model, tmp_path / "a.safetensors")
    assert torch.equal(output_of(model), before)


def test_the_file_that_the_broken_ones_are_made_of_is_sound(tmp_path):
    save_file(mutated(), tmp_path / "a.safetensors")
    assert len(load_adapter(bases.unet(), tmp_path / "a.safetensors").layers) == 2


@pytest.mark.parametrize("make", [bases.stable_diffusion, bases.stable_diffusion_xl])
def test_a_text_encoders_norms_are_changed_by_their_names_too(tmp_path, make):
    pipe = make()
    encoders = (
        {"lora_te_": "text_encoder"}
        if make is bases.stable_diffusion
        else {"lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}
    )
    keys, changed = {}, {}
    for prefix, name in encoders.items():
        for layer in ("encoder.layers.0.layer_norm1", "encoder.layers.1.layer_norm2", "final_layer_norm"):
            for end, leaf in (("weight", "w_norm"), ("bias", "b_norm")):
                own = next(n for n, _ in getattr(pipe, name).named_parameters() if n.endswith(f"{layer}.{end}"))
                d = torch.randn(getattr(pipe, name).get_parameter(own).shape)
                keys[f"{prefix}text_model_{layer.replace('.', '_')}.{leaf}"] = d
                changed[name, own] = d
    save_file(keys, tmp_path / "a.safetensors")
    expected = {name: copy.deepcopy(getattr(pipe, name)) for name in encoders.values()}
    with torch.no_grad():
        for (name, parameter), d in changed.items():
            expected[name].get_parameter(parameter).add_(d)
    adapter = load_adapter(pipe, tmp_path / "a.safetensors")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        for name in encoders.values():
            found = getattr(pipe, name)(tokens).last_hidden_state
            assert relative_error(found, expected[name](tokens).last_hidden_state) < 1e-5
    adapter.eject()
    made = convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", base=pipe).path
    again = {key.replace(".diff_b", ".b_norm").replace(".diff", ".w_norm"): t for key, t in load_file(made).items()}
    assert again.keys() == keys.keys()
    assert all(torch.equal(again[key], keys[key]) for key in keys)


def test_biases_of_a_dora_and_of_other_forms_are_added_as_they_are(tmp_path):
    """kohya's layout with `.dora_scale` and `.diff_b`: the magnitude is of the weight alone."""
    g = torch.Generator().manual_seed(1)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    keys = {
        f"{name}.lora_down.weight": torch.randn(2, 32, generator=g),
        f"{name}.lora_up.weight": torch.randn(32, 2, generator=g),
        f"{name}.alpha": torch.tensor(1.0),
        f"{name}.dora_scale": torch.rand(32, 1, generator=g) + 0.5,
        f"{name}.diff_b": torch.randn(32, generator=g),
    }
    save_file(keys, tmp_path / "a.safetensors")
    model = bases.unet()
    adapter = load_adapter(model, tmp_path / "a.safetensors", strength=0.5)
    [layer] = adapter.layers.values()
    bias = layer.base.bias.detach().clone()
    adapter.fuse()
    assert relative_error(layer.base.bias, bias + 0.5 * keys[f"{name}.diff_b"]) < 1e-6
    with pytest.raises(AdapterFileError, match="beside a magnitude"):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    made = convert_adapter(tmp_path / "a.safetensors", tmp_path / "c.safetensors", "kohya").path
    again = load_file(made)
    assert again.keys() == keys.keys() and all(torch.equal(again[key], keys[key]) for key in keys)


def test_a_files_description_is_of_its_low_rank_layers(tmp_path):
    save_file(mutated(), tmp_path / "a.safetensors")
    file = read_adapter_file(tmp_path / "a.safetensors")
    assert (file.config.kind, file.config.rank) == ("lora", 2)
    made = convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", base=bases.unet()).path
    assert {key.rpartition(".")[2] for key in load_file(made)} == {"weight", "alpha", "diff_b", "w_norm", "b_norm"}


@pytest.fixture(scope="module")
def extracted_sd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A small Stable Diffusion's folder and ComfyUI's extraction for its UNet."""
    folder = tmp_path_factory.mktemp("extracted")
    pipe = bases.stable_diffusion()
    pipe.save_pretrained(folder / "sd")
    save_file(extracted(checkpoint_of("unet", pipe.unet)), folder / "a.safetensors")
    return folder / "sd", folder / "a.safetensors"


def test_inspect_shows_norms_and_biases_and_keeps_them_out_of_what_it_says_of_matrices(extracted_sd):
    base, path = load_base(str(extracted_sd[0]), device="cpu"), extracted_sd[1]
    [(summary, analysis)] = look_at([path], base)
    keys = load_file(path)
    biases = sum(key.endswith(".diff_b") for key in keys)
    norms = sum(key.endswith(".diff") for key in keys)
    assert f"it changes {norms} normalisation layers and {biases} biases too" in summary.notes
    assert set(summary.ranks) == {2}
    vectors = {layer.layer: layer for layer in analysis.layers if layer.is_vector}
    assert len(vectors) == norms + biases and len(analysis.matrices) == sum("lora_up" in key for key in keys)
    unet = base.pipe.unet
    for name, end, key in (
        ("conv_norm_out", "weight", "diffusion_model.out.0.diff"),
        ("conv_norm_out.bias", "bias", "diffusion_model.out.0.diff_b"),
        ("conv_out.bias", "bias", "diffusion_model.out.2.diff_b"),
    ):
        own = unet.get_submodule(name.removesuffix(".bias")).get_parameter(end).double()
        wanted = float(keys[key].double().norm() / own.norm()) if own.any() else math.inf
        assert vectors[name].relative_size == pytest.approx(wanted, rel=1e-5)


def test_every_command_does_with_such_a_file_what_it_says(extracted_sd, tmp_path, run):
    folder, path = map(str, extracted_sd)
    assert "it changes" in run("inspect", path).flat
    assert run("inspect", path, "--base", folder, "--json").status == 0
    found = {each["program"]: each for each in json.loads(run("parity", path, "--base", folder, "--json").out)}
    assert {name for name, each in found.items() if each["right"]} == {"comfyui", "forge"}
    assert not found["a1111"]["known"] and "not known here" in found["a1111"]["stopped"]
    assert "not known here" in run("parity", path, "--base", folder).flat
    refused = run("parity", path, "--base", folder, "--repair", "comfyui", "--out", str(tmp_path / "r.safetensors"))
    assert refused.status == 1 and "biases or normalisation layers" in refused.flat
    assert run("convert", path, "--to", "diff", "--base", folder, "--out", str(tmp_path / "d.safetensors")).status == 0
    refused = run("convert", path, "--to", "lora", "--base", folder, "--out", str(tmp_path / "l.safetensors"))
    assert refused.status == 1 and "--to diff" in refused.flat
    merge = ("merge", path, "--base", folder, "--dtype", "float32", "--out", str(tmp_path / "merged"))
    assert run(*merge).status == 0
    merged = load_base(str(tmp_path / "merged"), device="cpu").pipe.unet
    unet = load_base(folder, device="cpu").pipe.unet
    load_adapter(unet, path)
    assert relative_error(output_of(merged), output_of(unet)) < 2e-5


def test_an_adapter_that_changes_norms_is_saved_and_read_again(tmp_path):
    save_file(mutated(), tmp_path / "a.safetensors")
    model = bases.unet()
    adapter = load_adapter(model, tmp_path / "a.safetensors")
    expected = output_of(model)
    saved = save_adapter(adapter, tmp_path / "b.safetensors")
    adapter.eject()
    load_adapter(model, saved)
    assert relative_error(output_of(model), expected) < 1e-6


def test_training_does_not_go_on_from_such_a_file(tmp_path):
    save_file(mutated(), tmp_path / "a.safetensors")
    file = read_adapter_file(tmp_path / "a.safetensors")
    with pytest.raises(AdapterMismatchError, match="changes 1 normalisation layer and 2 biases too"):
        attach_trainable(bases.unet(), file, "lora")


def test_t5s_norms_keep_their_names(tmp_path):
    """A T5 of FLUX by ComfyUI's and by sd-scripts' names, and written again."""
    pipe = bases.flux()
    d = torch.randn(pipe.text_encoder_2.encoder.final_layer_norm.weight.shape)
    names = ("encoder.block.0.layer.0.layer_norm", "encoder.final_layer_norm")
    comfy = {f"text_encoders.t5xxl.transformer.{name}.diff": d.clone() for name in names}
    flat = {f"lora_te3_{name.replace('.', '_')}.w_norm": d.clone() for name in names}
    for keys in (comfy, flat):
        save_file(keys, tmp_path / "a.safetensors")
        adapter = load_adapter(pipe, tmp_path / "a.safetensors")
        assert set(adapter.layers) == {f"text_encoder_2.{name}" for name in names}
        adapter.eject()
        made = convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", base=pipe).path
        assert load_file(made).keys() == {key.replace("w_norm", "diff") for key in flat}
