"""Files from one dialect to another, and what the other programs' own code computes from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bases
import pytest
import torch
from dialect_files import (
    dora_delta,
    flat,
    fresh,
    input_axis_delta,
    kohya_dora,
    kohya_input_axis,
    lora_delta,
    make,
    peft,
)
from oracles import dora_weight, lora_weight, output_of, perturb, relative_error
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dora_diffusion.adapters.injection import Adapter, AdapterConfig, adaptable_layers, inject_adapter, inject_into
from dora_diffusion.cli import main
from dora_diffusion.errors import AdapterFileError, ConfigError
from dora_diffusion.formats.convert import best_low_rank, convert_adapter
from dora_diffusion.formats.description import Description, identify_base
from dora_diffusion.formats.files import load_adapter, read_adapter_file
from dora_diffusion.formats.unet_names import unet_original
from dora_diffusion.formats.writing import save_adapter

kinds = pytest.mark.parametrize("kind", ["dora", "lora"])
TARGETS = ("to_q", "to_k", "to_out.0", "conv1", "proj_in", "add_q_proj", "proj_mlp", "q_proj", "out_proj", "fc1")


FAMILIES = {
    "sd": ("unet", "text_encoder"),
    "xl": ("unet", "text_encoder", "text_encoder_2"),
    "flux": ("transformer", "text_encoder"),
}
TRANSFORMERS_OF: dict[str, Callable[[], nn.Module]] = {
    "sd3": bases.sd3_transformer,
    "flux": bases.flux_transformer,
    "chroma": bases.chroma_transformer,
    "flux2": bases.flux2_transformer,
    "qwen": bases.qwen_transformer,
    "z-image": bases.z_image_transformer,
}
families = pytest.mark.parametrize("family", FAMILIES)


def trained(pipe: object, family: str, kind: str) -> Adapter:
    """An adapter over the denoiser and the text encoders, alpha different from rank, some layers with their own."""
    denoiser, *encoders = (getattr(pipe, name) for name in FAMILIES[family])
    named = dict(zip(FAMILIES[family][1:], encoders))
    views = adaptable_layers(denoiser)
    for name, encoder in named.items():
        views |= {f"{name}.{path}": view for path, view in adaptable_layers(encoder).items()}
    views = {path: view for path, view in views.items() if path.endswith(TARGETS)}
    first = next(iter(views))
    config = AdapterConfig(kind=kind, rank=4, alpha=6.0, rank_pattern={first: 2}, alpha_pattern={first: 5.0})
    return perturb(inject_into(denoiser, config, views, text_encoders=named))


def saved(tmp_path: Path, family: str, kind: str) -> tuple[Path, dict[str, Tensor]]:
    """A file in diffusers layout, and the updates it means by the layers' names in the pipeline."""
    adapter = trained(fresh(family), family, kind)
    path = save_adapter(adapter, tmp_path / "a.safetensors")
    return path, {layer: update.delta_weight() for layer, update in adapter.updates().items()}


def bits(path: Path) -> dict[str, Tensor]:
    return load_file(path)


def assert_same_bits(found: Path, expected: Path) -> None:
    a, b = bits(found), bits(expected)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in b)


# There and back.


@families
@kinds
def test_kohya_and_back_gives_the_same_bits(tmp_path, family, kind):
    path, _ = saved(tmp_path, family, kind)
    base = fresh(family)
    convert_adapter(path, tmp_path / "k.safetensors", "kohya")
    convert_adapter(tmp_path / "k.safetensors", tmp_path / "back.safetensors", "diffusers")
    assert_same_bits(tmp_path / "back.safetensors", path)
    before, after = read_adapter_file(path), read_adapter_file(tmp_path / "back.safetensors")
    assert {la: after.scale_of(la) for la in after.layers} == pytest.approx(
        {la: before.scale_of(la) for la in before.layers}
    )
    assert load_adapter(base, tmp_path / "back.safetensors").config.kind == kind


def test_a_fused_flux_file_comes_back_with_its_fused_layers(tmp_path):
    from test_dialects import fused_flux

    path = fused_flux(bases.flux_transformer(), "dora").save(tmp_path / "a.safetensors")
    convert_adapter(path, tmp_path / "d.safetensors", "diffusers")
    assert "transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight" in bits(tmp_path / "d.safetensors")
    convert_adapter(tmp_path / "d.safetensors", tmp_path / "k.safetensors", "kohya")
    assert_same_bits(tmp_path / "k.safetensors", path)


def test_sdxl_gets_the_names_of_kohya_and_a_scale_with_all_axes(tmp_path):
    path, _ = saved(tmp_path, "xl", "dora")
    convert_adapter(path, tmp_path / "k.safetensors", "kohya")
    keys = bits(tmp_path / "k.safetensors")
    name = "lora_unet_input_blocks_1_1_transformer_blocks_0_attn1_to_q"
    assert keys[f"{name}.dora_scale"].shape == (32, 1)
    assert keys["lora_unet_middle_block_0_in_layers_2.dora_scale"].shape == (64, 1, 1, 1)
    assert keys[f"{name}.alpha"].shape == () and float(keys[f"{name}.alpha"]) == 6.0
    assert any(key.startswith("lora_te1_text_model_encoder_layers_0") for key in keys)
    assert any(key.startswith("lora_te2_text_model_encoder_layers_0") for key in keys)
    assert not any("down_blocks" in key for key in keys)


def test_foreign_header_entries_and_the_training_summary_stay(tmp_path, unet):
    adapter = perturb(inject_into(unet, AdapterConfig(rank=4), {"conv_in": adaptable_layers(unet)["conv_in"]}))
    path = save_adapter(adapter, tmp_path / "a.safetensors", training={"steps": 300}, base_name="emoji")
    convert_adapter(path, tmp_path / "k.safetensors", "kohya")
    with safe_open(tmp_path / "k.safetensors", "pt") as file:
        description = Description.model_validate_json(file.metadata()["dora_diffusion"])
    assert description.training == {"steps": 300}
    assert (description.base.name, description.base.fingerprint) == ("emoji", identify_base(unet).fingerprint)
    assert (description.kind, description.rank, description.alpha, description.norm_axis) == ("dora", 4, 16.0, "output")
    assert (description.conversion["from"], description.conversion["to"]) == ("diffusers", "kohya")
    made = make(unet, ["conv_in"], flat("lora_unet_"), kohya_dora, dora_delta)
    made.save(tmp_path / "f.safetensors", {"ss_tag_frequency": "{}", "ss_output_name": "style"})
    convert_adapter(tmp_path / "f.safetensors", tmp_path / "g.safetensors", "diffusers")
    with safe_open(tmp_path / "g.safetensors", "pt") as file:
        assert file.metadata()["ss_output_name"] == "style"


@pytest.mark.parametrize(
    ("make_model", "objective", "architecture", "version"),
    [
        (lambda: bases.unet(cross_attention_dim=768), "epsilon", "stable-diffusion-v1/lora", "sd_v1"),
        (lambda: bases.unet(cross_attention_dim=1024), "v_prediction", "stable-diffusion-v2-768-v/lora", "sd_v2_v"),
        (lambda: bases.stable_diffusion_xl().unet, "epsilon", "stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
        (bases.flux_transformer, "flow", "flux-1-dev/lora", "flux1"),
        (bases.unet, "epsilon", None, None),
        (bases.sd3_transformer, "flow", None, None),
    ],
)
def test_a_kohya_file_says_in_other_programs_words_what_it_is_for(
    tmp_path, make_model, objective, architecture, version
):
    """A1111 and Forge list it under models of its kind only: by `ss_base_model_version`, `modelspec.architecture`."""
    adapter = perturb(inject_adapter(make_model(), AdapterConfig(rank=4, alpha=2.0)))
    summary = {"objective": objective, "instance_prompt": "in sks style", "resolution": 512}
    path = save_adapter(adapter, tmp_path / "a.safetensors", training=summary)
    convert_adapter(path, tmp_path / "my style.safetensors", "kohya")
    with safe_open(tmp_path / "my style.safetensors", "pt") as file:
        header = file.metadata()
    assert (header.get("modelspec.architecture"), header.get("ss_base_model_version")) == (architecture, version)
    if architecture is None:
        assert not any(key.startswith(("modelspec", "ss_")) for key in header)
        return
    assert (header["modelspec.title"], header["modelspec.trigger_phrase"]) == ("my style", "in sks style")
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "2.0")
    assert header.get("ss_v2") == ("True" if "v2" in version else None)
    assert header.get("modelspec.prediction_type") == {"epsilon": "epsilon", "v_prediction": "v"}.get(objective)


# What LyCORIS's own loader computes.


class Holder(nn.Module):
    """Modules under other names, for programs that look layers up by name."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        super().__init__()
        for name, module in modules.items():
            parent: nn.Module = self
            *above, leaf = name.split(".")
            for step in above:
                if step not in parent._modules:
                    parent.add_module(step, nn.Module())
                parent = parent._modules[step]
            parent.add_module(leaf, module)


def by_lycoris(file: Path, prefix: str, model: nn.Module) -> dict[str, Tensor]:
    """W' - W0 by the module's name, as LyCORIS makes it from the file."""
    from lycoris import create_lycoris_from_weights
    from lycoris_files import preset

    preset({"lora_prefix": prefix})
    network, _ = create_lycoris_from_weights(1.0, str(file), model)
    assert network.loras
    return {lora.lora_name: (lora.get_merged_weight()[0] - lora.org_weight).detach() for lora in network.loras}


def names_for_lycoris(family: str, pipe: object) -> list[tuple[str, nn.Module, Callable[[str], str | None]]]:
    """The prefix, the model under the names that LyCORIS is given in that program, and their paths in the pipeline."""
    denoiser = getattr(pipe, FAMILIES[family][0])
    layers = {path: view.module for path, view in adaptable_layers(denoiser).items()}
    if family == "xl":
        layers = {unet_original(path, 1, (0,)): module for path, module in layers.items()}
    found = [("lora_transformer" if family == "flux" else "lora_unet", Holder(layers))]
    for i, name in enumerate(FAMILIES[family][1:], 1):
        encoder = getattr(pipe, name)
        whole = encoder if hasattr(encoder, "text_model") else Holder({"text_model": encoder})
        found.append(("lora_te" if family == "sd" else f"lora_te{i}", whole))
    return found


FOR_LYCORIS = [(family, kind, "kohya") for family in FAMILIES for kind in ("dora", "lora")]
FOR_LYCORIS += [(family, "dora", to) for family in FAMILIES for to in ("diff", "lora")]


@pytest.mark.parametrize("family, kind, to", FOR_LYCORIS)
def test_lycoris_computes_the_same_updates(tmp_path, family, kind, to):
    path, expected = saved(tmp_path, family, kind)
    pipe = fresh(family)
    out = tmp_path / "out.safetensors"
    convert_adapter(path, out, to, base=None if to == "kohya" else pipe, rank=32 if to == "lora" else None)
    if to == "lora":
        expected = {layer: u.delta_weight() for layer, u in load_adapter(fresh(family), out).updates().items()}
    found: dict[str, Tensor] = {}
    for prefix, model in names_for_lycoris(family, pipe):
        found |= by_lycoris(out, prefix, model)
    assert len(found) == len(expected)
    written = {layer: name for name, layer in names_in_file(out).items()}
    for layer, delta in expected.items():
        assert relative_error(found[written[layer]], delta) <= 1e-4, layer


def names_in_file(path: Path) -> dict[str, str]:
    """The modules' names in the file, by the layers of the pipeline that this project reads them as."""
    file = read_adapter_file(path)
    return {name: layer.replace("text_encoder.text_model.", "text_encoder.") for layer, name in file.written.items()}


# What stock diffusers and PEFT compute.


def by_diffusers(pipe: object, path: Path, layers: list[str]) -> dict[str, Tensor]:
    """W' - W0 of each layer after stock load_lora_weights and fuse_lora."""
    weights = {la: _weight(pipe, la).clone() for la in layers}
    pipe.load_lora_weights(str(path))
    components = [
        name
        for name in ("unet", "transformer", "text_encoder", "text_encoder_2")
        if getattr(pipe, name, None) is not None
    ]
    pipe.fuse_lora(components=components)
    return {la: _weight(pipe, la) - weights[la] for la in layers}


def _weight(pipe: object, layer: str) -> Tensor:
    component, _, path = layer.partition(".")
    if not component.startswith("text_encoder"):
        component, path = ("unet" if hasattr(pipe, "unet") else "transformer"), layer
    module = getattr(pipe, component).get_submodule(path)
    return getattr(module, "base_layer", module).weight.detach()


@families
@kinds
@pytest.mark.parametrize("through", ["straight", "kohya and back"])
def test_stock_diffusers_computes_the_same_updates(tmp_path, family, kind, through):
    path, expected = saved(tmp_path, family, kind)
    if through != "straight":
        convert_adapter(path, tmp_path / "k.safetensors", "kohya")
        path = convert_adapter(tmp_path / "k.safetensors", tmp_path / "d.safetensors", "diffusers").path
    found = by_diffusers(fresh(family), path, list(expected))
    for layer, delta in expected.items():
        assert relative_error(found[layer], delta) <= 1e-4, layer


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_stock_diffusers_reads_the_kohya_lora_that_is_written(tmp_path, family):
    path, expected = saved(tmp_path, family, "lora")
    made = convert_adapter(path, tmp_path / "k.safetensors", "kohya")
    attention = {layer: delta for layer, delta in expected.items() if "to_" in layer or "q_proj" in layer}
    found = by_diffusers(fresh(family), made.path, list(attention))
    for layer, delta in attention.items():
        assert relative_error(found[layer], delta) <= 1e-4, layer


# Differences, low rank, rounding.


@families
@kinds
def test_a_difference_is_the_update_exactly(tmp_path, family, kind):
    path, expected = saved(tmp_path, family, kind)
    convert_adapter(path, tmp_path / "d.safetensors", "diff", base=fresh(family))
    pipe = fresh(family)
    adapter = load_adapter(pipe, tmp_path / "d.safetensors")
    assert adapter.config.kind == "full"
    found = {layer: update.delta_weight() for layer, update in adapter.updates().items()}
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[layer], expected[layer]) for layer in expected)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 8, 3, 3), (32, 32)], ids=str)
def test_the_low_rank_is_the_best_there_is(shape):
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    A, B, residual = best_low_rank(delta, 5)
    assert (A.shape, B.shape) == ((5, *shape[1:]), (shape[0], 5, *(1,) * (len(shape) - 2)))
    U, S, V = torch.linalg.svd(delta.flatten(1).double(), full_matrices=False)
    best = (U[:, :5] * S[:5]) @ V[:5]
    assert relative_error(B.flatten(1) @ A.flatten(1), best) < 1e-5
    assert residual == pytest.approx(float(S[5:].norm() / S.norm()), rel=1e-6)


def test_a_lora_of_full_rank_leaves_nothing_out_and_zero_stays_zero():
    delta = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    A, B, residual = best_low_rank(delta, 99)
    assert residual < 1e-12 and A.shape == (6, 8)
    A, B, residual = best_low_rank(torch.zeros(6, 8), 2)
    assert residual == 0 and not (B @ A).any() and A.isfinite().all()


def test_the_lora_of_a_dora_says_for_each_layer_what_is_left_out(tmp_path):
    path, expected = saved(tmp_path, "sd", "dora")
    made = convert_adapter(path, tmp_path / "l.safetensors", "lora", base=fresh("sd"), rank=8)
    adapter = load_adapter(fresh("sd"), made.path)
    assert (adapter.config.kind, adapter.config.rank) == ("lora", 8)
    left_out = {
        la: float((u.delta_weight() - expected[la]).norm() / expected[la].norm()) for la, u in adapter.updates().items()
    }
    said = {la.replace("text_encoder.text_model.", "text_encoder."): r for la, r in made.residuals.items()}
    assert said == pytest.approx(left_out, rel=1e-3)
    assert max(said.values()) > 0.01
    report = "\n".join(made.report())
    assert report.count("of the update is left out in") == len(expected)
    assert "at worst" in report


@pytest.mark.parametrize("dtype, bound", [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_half_precision_says_what_it_costs(tmp_path, dtype, bound):
    path, _ = saved(tmp_path, "sd", "dora")
    made = convert_adapter(path, tmp_path / "h.safetensors", "kohya", dtype=dtype)
    halves = bits(made.path)
    assert {t.dtype for key, t in halves.items() if not key.endswith(".alpha")} == {getattr(torch, dtype)}
    assert {t.dtype for key, t in halves.items() if key.endswith(".alpha")} == {torch.float32}
    original = read_adapter_file(path).tensors
    worst = max(float((t.to(getattr(torch, dtype)).double() - t).norm() / t.double().norm()) for t in original.values())
    assert made.rounding == pytest.approx(worst) and 1e-5 < worst < bound
    assert f"{worst:.2e}" in "\n".join(made.report())


def test_values_too_large_for_half_precision_are_refused(tmp_path, unet):
    made = make(unet, ["conv_in"], flat("lora_unet_"), kohya_dora, dora_delta)
    made.tensors["lora_unet_conv_in.lora_up.weight"] *= 1e6
    made.save(tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"conv_in\.lora_B has values too large for float16"):
        convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya", dtype="float16")
    assert not (tmp_path / "b.safetensors").exists()


# What a dialect cannot hold.


def test_a_norm_by_input_is_refused_by_diffusers_and_kept_by_kohya_and_exact_as_a_difference(tmp_path, unet):
    made = make(unet, ["conv_in", "conv_out"], flat("lora_unet_"), kohya_input_axis, input_axis_delta)
    path = made.save(tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"a norm by input, which PEFT does not compute.*--to diff"):
        convert_adapter(path, tmp_path / "b.safetensors", "diffusers")
    kept = convert_adapter(path, tmp_path / "b.safetensors", "kohya")
    assert_same_bits(kept.path, path)
    assert any("norm by input stays" in note for note in kept.notes)
    convert_adapter(path, tmp_path / "d.safetensors", "diff", base=bases.unet())
    adapter = load_adapter(bases.unet(), tmp_path / "d.safetensors")
    for layer, update in adapter.updates().items():
        assert relative_error(update.delta_weight(), made.deltas[layer]) <= 1e-5


def test_a_name_that_only_the_model_knows_needs_the_base(tmp_path):
    model = nn.ModuleDict({"odd_name": nn.ModuleList([nn.Linear(8, 6)])})
    path = make(model, ["odd_name.0"], flat("lora_unet_"), kohya_dora, dora_delta).save(tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"'odd_name_0' only the model can tell.*--base"):
        convert_adapter(path, tmp_path / "b.safetensors", "diffusers")
    convert_adapter(path, tmp_path / "b.safetensors", "diffusers", base=model)
    assert "unet.odd_name.0.lora_A.weight" in bits(tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"to": "diff"}, "--to diff computes W' - W0 of each layer, so it needs the base"),
        ({"to": "lora"}, "so it needs the base"),
        ({"to": "peft"}, "it must be one of diffusers, kohya, comfyui, diff, lora"),
        ({"to": "kohya", "dtype": "int8"}, "it must be one of float32, float16, bfloat16"),
        ({"to": "kohya", "rank": 4}, "it goes with --to lora"),
    ],
)
def test_options_that_cannot_be_used_say_why(tmp_path, unet, options, message):
    path = make(unet, ["conv_in"], flat("lora_unet_"), kohya_dora, dora_delta).save(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        convert_adapter(path, tmp_path / "b.safetensors", **options)


def test_converting_leaves_the_base_as_it_was(tmp_path):
    path, _ = saved(tmp_path, "sd", "dora")
    pipe = fresh("sd")
    before = output_of(pipe.unet)
    convert_adapter(path, tmp_path / "d.safetensors", "diff", base=pipe)
    assert torch.equal(output_of(pipe.unet), before)
    assert not any("AdaptedLayer" in type(m).__name__ for m in pipe.unet.modules())


def test_the_command_converts(tmp_path, sd_folder, monkeypatch, capsys):
    path, _ = saved(tmp_path, "sd", "dora")
    out = tmp_path / "l.safetensors"
    arguments = [
        "convert",
        str(path),
        "--to",
        "lora",
        "--base",
        str(sd_folder),
        "--rank",
        "8",
        "--dtype",
        "float16",
        "--out",
        str(out),
    ]
    monkeypatch.setattr("sys.argv", ["dora-diffusion", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "of the update left out on average" in said and str(out) in said and "rounding" in said
    assert read_adapter_file(out).config.rank == 8


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_sd3_gets_the_names_of_sd_scripts_which_forge_reads_too(tmp_path, kind):
    """Forge looks for the checkpoint's own names alone, where q, k and v are one layer: each keeps its ranks in it."""
    model = bases.sd3_transformer()
    paths = [path for path in adaptable_layers(model) if path.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    adapter = perturb(inject_adapter(model, AdapterConfig(kind=kind, rank=4, alpha=6.0, target_modules=tuple(paths))))
    deltas = {path: update.delta_weight().detach() for path, update in adapter.updates().items()}
    save_adapter(adapter, tmp_path / "a.safetensors")
    adapter.eject()
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "k.safetensors", "kohya")
    held = bits(tmp_path / "k.safetensors")
    names = {key.partition(".")[0] for key in held}
    assert names == {f"lora_unet_joint_blocks_{i}_x_block_attn_{layer}" for i in range(2) for layer in ("qkv", "proj")}
    name, blocks = "lora_unet_joint_blocks_1_x_block_attn_qkv", "transformer_blocks.1.attn"
    W0 = torch.cat([model.get_submodule(f"{blocks}.to_{x}").weight for x in "qkv"]).detach()
    A, B = held[f"{name}.lora_down.weight"], held[f"{name}.lora_up.weight"]
    s = float(held[f"{name}.alpha"]) / A.shape[0]
    fused = (
        dora_weight(W0, A, B, held[f"{name}.dora_scale"].flatten(), s) if kind == "dora" else lora_weight(W0, A, B, s)
    )
    expected = torch.cat([deltas[f"{blocks}.to_{x}"] for x in "qkv"])
    assert relative_error(fused - W0.double(), expected) < 1e-5
    convert_adapter(tmp_path / "k.safetensors", tmp_path / "back.safetensors", "diffusers")
    assert_same_bits(tmp_path / "back.safetensors", tmp_path / "a.safetensors")


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", sorted(TRANSFORMERS_OF))
def test_the_difference_of_every_layer_of_a_transformer_comes_back_at_its_rows(tmp_path, family, kind):
    """The checkpoints have some final layers with their halves the other way round."""
    model = TRANSFORMERS_OF[family]()
    everything = tuple(adaptable_layers(model))
    adapter = perturb(inject_adapter(model, AdapterConfig(kind=kind, rank=2, target_modules=everything), seed=1))
    expected = {path: update.delta_weight().detach() for path, update in adapter.updates().items()}
    save_adapter(adapter, tmp_path / "a.safetensors")
    adapter.eject()
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "d.safetensors", "diff", base=model)
    found = load_adapter(model, tmp_path / "d.safetensors").updates()
    assert found.keys() == expected.keys()
    assert not [path for path in expected if not torch.equal(found[path].delta_weight(), expected[path])]


def test_sd3_layers_without_an_original_name_of_their_own_are_said(tmp_path):
    model = bases.sd3_transformer()
    made = make(model, ["transformer_blocks.0.attn.to_q"], lambda p: f"transformer.{p}", peft, lora_delta, s=1.0)
    path = made.save(tmp_path / "a.safetensors")
    conversion = convert_adapter(path, tmp_path / "k.safetensors", "kohya", base=model)
    assert any("1 layers of Stable Diffusion 3" in note and "Forge not" in note for note in conversion.notes)
    assert set(bits(conversion.path)) >= {"lora_transformer_transformer_blocks_0_attn_to_q.alpha"}
