"""ComfyUI's layout: its names and shapes, and the same bits back. tests/parity/test_comfyui.py runs ComfyUI itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import bases
import pytest
import torch
from dialect_files import fresh, lora_delta, make, peft
from oracles import perturb
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_diffusion.adapters.injection import AdapterConfig, adaptable_layers, inject_adapter, inject_into
from dora_diffusion.errors import AdapterFileError
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import load_adapter, read_adapter_file, save_adapter

MODELS: dict[str, Callable[[], nn.Module]] = {
    "unet": lambda: bases.unet(),
    "sdxl": lambda: fresh("xl").unet,  # type: ignore[attr-defined]
    "sd3": bases.sd3_transformer,
    "flux": lambda: bases.flux_transformer(guidance_embeds=True),
    "chroma": bases.chroma_transformer,
    "flux2": bases.flux2_transformer,
    "qwen": bases.qwen_transformer,
    "z-image": bases.z_image_transformer,
}
# A layer of each family by diffusers' name, and the name that it has in ComfyUI's file.
NAMES = {
    "unet": {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (
            "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q"
        ),
        "mid_block.resnets.1.conv1": "diffusion_model.middle_block.2.in_layers.2",
        "time_embedding.linear_1": "diffusion_model.time_embed.0",
    },
    "sd3": {
        "transformer_blocks.0.attn.to_q": "transformer.transformer_blocks.0.attn.to_q",
        "transformer_blocks.1.norm1.linear": "diffusion_model.joint_blocks.1.x_block.adaLN_modulation.1",
        "pos_embed.proj": "diffusion_model.x_embedder.proj",
        "norm_out.linear": "diffusion_model.final_layer.adaLN_modulation.1",
    },
    "flux": {
        "single_transformer_blocks.0.attn.to_k": "transformer.single_transformer_blocks.0.attn.to_k",
        "single_transformer_blocks.0.proj_out": "diffusion_model.single_blocks.0.linear2",
        "time_text_embed.guidance_embedder.linear_1": "diffusion_model.guidance_in.in_layer",
        "norm_out.linear": "diffusion_model.final_layer.adaLN_modulation.1",
    },
    "chroma": {
        "transformer_blocks.0.ff.net.2": "diffusion_model.double_blocks.0.img_mlp.2",
        "distilled_guidance_layer.in_proj": "diffusion_model.distilled_guidance_layer.in_proj",
        "distilled_guidance_layer.layers.0.linear_1": "diffusion_model.distilled_guidance_layer.layers.0.in_layer",
    },
    "flux2": {
        "transformer_blocks.0.attn.add_k_proj": "transformer.transformer_blocks.0.attn.add_k_proj",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj": "diffusion_model.single_blocks.0.linear1",
        "double_stream_modulation_img.linear": "diffusion_model.double_stream_modulation_img.lin",
        "time_guidance_embed.timestep_embedder.linear_1": "diffusion_model.time_in.in_layer",
    },
    "qwen": {
        "transformer_blocks.0.attn.to_q": "diffusion_model.transformer_blocks.0.attn.to_q",
        "norm_out.linear": "diffusion_model.norm_out.linear",
    },
    "z-image": {
        "layers.0.attention.to_v": "diffusion_model.layers.0.attention.to_v",
        "layers.0.attention.to_out.0": "diffusion_model.layers.0.attention.out",
        "all_x_embedder.2-1": "diffusion_model.x_embedder",
        "layers.0.adaLN_modulation.0": "diffusion_model.layers.0.adaLN_modulation.0",
    },
}
KINDS = {"lora": ("lora", "output"), "dora": ("dora", "output"), "dora by input": ("dora", "input")}


def written(name: str, kind: str, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """An adapter of every layer, each with a scale of its own, and its tensors."""
    model = MODELS[name]()
    layers = tuple(adaptable_layers(model))
    kind, axis = KINDS[kind]
    alphas = {layer: 1.0 + i for i, layer in enumerate(layers)}
    config = AdapterConfig(kind, rank=3, target_modules=layers, norm_axis=axis, alpha_pattern=alphas)  # type: ignore[arg-type]
    adapter = perturb(inject_adapter(model, config, seed=1))
    return save_adapter(adapter, folder / "own.safetensors"), held_in(adapter)


def held_in(adapter: object) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in adapter.named_parameters().items()}  # type: ignore[attr-defined]


@pytest.mark.parametrize("with_base", [True, False], ids=["base", "no base"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODELS)
def test_every_layer_comes_back_with_the_same_bits_and_scale(tmp_path, name, kind, with_base):
    own, tensors = written(name, kind, tmp_path)
    base = MODELS[name]() if with_base else None
    made = convert_adapter(own, tmp_path / "comfyui.safetensors", "comfyui", base=base)
    back = load_adapter(MODELS[name](), made.path)
    found = held_in(back)
    assert found.keys() == tensors.keys()
    assert not [parameter for parameter in tensors if not torch.equal(found[parameter], tensors[parameter])]
    before, after = read_adapter_file(own).config, back.config
    assert {la: after.scale_of(la) for la in back.layers} == pytest.approx(
        {la: before.scale_of(la) for la in back.layers}
    )
    convert_adapter(made.path, tmp_path / "again.safetensors", "comfyui", base=base)
    again, first = load_file(tmp_path / "again.safetensors"), load_file(made.path)
    assert again.keys() == first.keys() and all(torch.equal(again[key], first[key]) for key in first)


def test_the_last_modulation_of_sd3_has_the_checkpoints_rows(tmp_path):
    """Its two halves change places; the other blocks' six parts do not, in ComfyUI's layout as in kohya's."""
    own, tensors = written("sd3", "dora", tmp_path)
    model = MODELS["sd3"]()
    last = len(model.transformer_blocks) - 1
    keys = load_file(convert_adapter(own, tmp_path / "c.safetensors", "comfyui", base=model).path)
    for block in range(last + 1):
        ours, theirs = f"transformer_blocks.{block}.norm1_context.linear", f"joint_blocks.{block}.context_block"
        for parameter, ending in (("lora_B", "lora_B.weight"), ("magnitude", "dora_scale")):
            found = keys[f"diffusion_model.{theirs}.adaLN_modulation.1.{ending}"]
            held = tensors[f"{ours}.{parameter}"]
            wanted = torch.cat(held.chunk(2)[::-1]) if block == last else held
            assert torch.equal(found.flatten(), wanted.flatten()), (block, parameter)


def test_a_t5_has_comfyuis_name_and_comes_back_with_the_same_bits(tmp_path):
    pipe = bases.flux()
    layers = adaptable_layers(pipe.text_encoder_2)
    keys = {
        f"text_encoder_2.{layer}.lora_{end}.weight": torch.randn(shape)
        for layer, frozen in layers.items()
        for end, shape in (("A", (3, *frozen.in_shape)), ("B", (frozen.out_features, 3)))
    }
    save_file(keys, tmp_path / "own.safetensors")
    made = convert_adapter(tmp_path / "own.safetensors", tmp_path / "comfyui.safetensors", "comfyui", base=pipe).path
    ends = ("lora_A.weight", "lora_B.weight", "alpha")
    assert load_file(made).keys() == {f"text_encoders.t5xxl.transformer.{la}.{end}" for la in layers for end in ends}
    back = load_adapter(pipe, made)
    assert set(back.layers) == {f"text_encoder_2.{layer}" for layer in layers}
    assert all(torch.equal(held, keys[f"{name}.weight"]) for name, held in held_in(back).items())
    dialects = [read_adapter_file(path).dialect for path in (tmp_path / "own.safetensors", made)]
    assert dialects == ["diffusers", "ComfyUI"]


@pytest.mark.parametrize("name", NAMES)
def test_the_names_are_the_checkpoints_where_comfyui_knows_those(tmp_path, name):
    own, _ = written(name, "dora", tmp_path)
    keys = load_file(convert_adapter(own, tmp_path / "comfyui.safetensors", "comfyui", base=MODELS[name]()).path)
    endings = ("lora_A.weight", "lora_B.weight", "alpha", "dora_scale")
    for layer, module in NAMES[name].items():
        assert keys.keys() >= {f"{module}.{ending}" for ending in endings}, layer
        B = keys[f"{module}.lora_B.weight"]
        assert keys[f"{module}.dora_scale"].shape == (B.shape[0], 1, *(1,) * (B.dim() - 2))
        assert keys[f"{module}.alpha"].shape == ()
    assert {key.rpartition(".")[2] for key in keys} == {"weight", "alpha", "dora_scale"}


def test_a_magnitude_by_input_lies_along_the_inputs(tmp_path):
    own, _ = written("unet", "dora by input", tmp_path)
    keys = load_file(convert_adapter(own, tmp_path / "c.safetensors", "comfyui", base=bases.unet()).path)
    name = "diffusion_model.middle_block.2.in_layers.2"
    assert keys[f"{name}.dora_scale"].shape == (1, 64, 1, 1)
    assert keys["diffusion_model.time_embed.0.dora_scale"].shape == (1, 32)


def test_parts_with_one_a_are_one_layer_again(tmp_path):
    from test_dialects import fused_flux

    path = fused_flux(bases.flux_transformer(), "dora").save(tmp_path / "a.safetensors")
    made = convert_adapter(path, tmp_path / "c.safetensors", "comfyui")
    keys, before = load_file(made.path), load_file(path)
    theirs = {key for key in before if "qkv" in key or "linear1" in key}
    assert theirs
    names = {"lora_down": "lora_A", "lora_up": "lora_B"}
    for key in theirs:
        module, _, ending = key.partition(".")
        flat = {name.replace(".", "_"): name for name in {k.rpartition(".lora_A")[0] for k in keys}}
        dotted = flat[module.replace("lora_unet_", "diffusion_model_")]
        for old, new in names.items():
            ending = ending.replace(old, new)
        assert torch.equal(keys[f"{dotted}.{ending}"], before[key])
    assert not any(".attn.to_q." in key for key in keys)


def test_differences_go_by_the_same_names_and_fused_layers_are_whole(tmp_path):
    model = bases.flux_transformer()
    layers = [path for path in adaptable_layers(model) if path.startswith("transformer_blocks.0.attn.to_")]
    adapter = perturb(inject_adapter(model, AdapterConfig("dora", rank=2, target_modules=tuple(layers)), seed=1))
    true = {layer: update.delta_weight() for layer, update in adapter.updates().items()}
    own = save_adapter(adapter, tmp_path / "own.safetensors")
    adapter.eject()
    diff = convert_adapter(own, tmp_path / "diff.safetensors", "diff", base=model).path
    keys = load_file(convert_adapter(diff, tmp_path / "c.safetensors", "comfyui").path)
    names = ("img_attn.qkv", "img_attn.proj", "txt_attn.proj")
    assert keys.keys() == {f"diffusion_model.double_blocks.0.{name}.diff" for name in names}
    found = load_adapter(model, tmp_path / "c.safetensors").updates()
    assert all(torch.equal(found[layer].delta_weight(), true[layer]) for layer in true)


def test_clips_go_by_the_names_that_comfyui_has_for_them(tmp_path):
    pipe = fresh("xl")
    encoders = {name: getattr(pipe, name) for name in ("text_encoder", "text_encoder_2")}
    views = {
        f"{name}.{path}": view
        for name, encoder in encoders.items()
        for path, view in adaptable_layers(encoder).items()
        if path.endswith(("q_proj", "fc1"))
    }
    adapter = perturb(inject_into(pipe.unet, AdapterConfig("dora", rank=2), views, text_encoders=encoders))
    own = save_adapter(adapter, tmp_path / "own.safetensors")
    made = convert_adapter(own, tmp_path / "c.safetensors", "comfyui", base=fresh("xl"))
    keys = load_file(made.path)
    for encoder in encoders:
        assert f"{encoder}.text_model.encoder.layers.1.self_attn.q_proj.dora_scale" in keys
    back = load_adapter(fresh("xl"), made.path)
    assert all(torch.equal(tensor, held_in(back)[name]) for name, tensor in held_in(adapter).items())


def test_the_header_is_kept_and_says_what_was_done(tmp_path):
    own, _ = written("qwen", "dora", tmp_path)
    tensors = load_file(own)
    with safe_open(own, "pt") as file:
        header = file.metadata()
    save_file(tensors, own, {**header, "ss_tag": "kept"})
    made = convert_adapter(own, tmp_path / "c.safetensors", "comfyui")
    with safe_open(made.path, "pt") as file:
        header = file.metadata()
    assert header["ss_tag"] == "kept" and "lora_adapter_metadata" not in header
    conversion = json.loads(header["dora_diffusion"])["conversion"]
    assert (conversion["from"], conversion["to"]) == ("diffusers", "comfyui")
    assert any("ComfyUI#15458" in note for note in made.notes)


def test_no_such_note_where_comfyuis_norm_is_right(tmp_path):
    for kind in ("lora", "dora by input"):
        own, _ = written("qwen", kind, tmp_path)
        assert not convert_adapter(own, tmp_path / "c.safetensors", "comfyui").notes


# What cannot be written.


def test_a_layer_that_comfyui_has_no_known_name_for_is_refused_by_name(tmp_path):
    model = nn.ModuleDict({"odd": nn.ModuleList([nn.Linear(8, 6)])})
    path = make(model, ["odd.0"], lambda p: f"unet.{p}", peft, lora_delta, s=1.0).save(tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"ComfyUI's name for odd\.0 of another model is not known.*--to kohya"):
        convert_adapter(path, tmp_path / "c.safetensors", "comfyui", base=model)
    assert not (tmp_path / "c.safetensors").exists()


def test_ai_toolkits_norm_is_refused_with_the_way_out(tmp_path):
    unet = bases.unet()
    own, _ = written("unet", "dora", tmp_path)
    named = {
        key.replace("lora_magnitude_vector", "magnitude"): t.flatten() if "magnitude" in key else t
        for key, t in load_file(own).items()
    }
    save_file(named, tmp_path / "ai.safetensors")
    with pytest.raises(AdapterFileError, match=r"ai-toolkit's norm .*--to diff"):
        convert_adapter(tmp_path / "ai.safetensors", tmp_path / "c.safetensors", "comfyui", base=unet, alpha=7.0)


def test_names_that_two_families_have_need_the_base(tmp_path):
    model = bases.flux_transformer()
    made = make(model, ["transformer_blocks.0.attn.to_out.0"], lambda p: f"transformer.{p}", peft, lora_delta, s=1.0)
    path = made.save(tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"each goes by other names in ComfyUI's layout. Give the base"):
        convert_adapter(path, tmp_path / "c.safetensors", "comfyui")
    made_with = convert_adapter(path, tmp_path / "c.safetensors", "comfyui", base=model)
    assert "diffusion_model.double_blocks.0.img_attn.proj.alpha" in load_file(made_with.path)
