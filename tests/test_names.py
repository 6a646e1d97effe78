"""Every layer of every family, alone in a file, in every spelling: it lands where it belongs or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import bases
import pytest
import torch
from dialect_files import flat, kohya, lora_delta, make, peft
from diffusers import UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from oracles import relative_error
from safetensors.torch import load_file, save_file
from torch import nn

from dora_diffusion.adapters.injection import AdapterConfig, adaptable_layers, inject_adapter
from dora_diffusion.errors import AdapterFileError
from dora_diffusion.formats.anatomy import MODELS, Anatomy, Model, anatomy_of, model_of
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import load_adapter, read_adapter_file, save_adapter
from dora_diffusion.formats.names import locate
from dora_diffusion.formats.original import TRANSFORMERS
from dora_diffusion.formats.unet_names import originals_of

FAMILIES: dict[Model, Callable[[], nn.Module]] = {
    "unet": bases.unet,
    "sd3": bases.sd3_transformer,
    "flux": lambda: bases.flux_transformer(guidance_embeds=True),
    "chroma": bases.chroma_transformer,
    "flux2": bases.flux2_transformer,
    "qwen": bases.qwen_transformer,
    "z-image": bases.z_image_transformer,
}
every_family = pytest.mark.parametrize("family", FAMILIES)
SPELLINGS: dict[str, Callable[[str], str]] = {
    **{f"{p}.path": lambda path, p=p: f"{p}.{path}" for p in ("unet", "transformer", "diffusion_model")},
    "path": lambda path: path,
    "base_model.model.path": lambda path: f"base_model.model.{path}",
    "base_model.model.unet.path": lambda path: f"base_model.model.unet.{path}",
    **{f"{p}path": flat(p) for p in ("lora_unet_", "lora_transformer_", "lycoris_")},
}


def test_every_family_that_is_known_is_tried():
    assert {*FAMILIES, "other"} == set(MODELS)
    assert all(model_of(type(make_model()).__name__) == family for family, make_model in FAMILIES.items())


@every_family
def test_a_models_own_names_win_in_every_spelling(family):
    model = FAMILIES[family]()
    paths = list(adaptable_layers(model))
    anatomy = anatomy_of(model, paths)
    for path in paths:
        for name, spelling in SPELLINGS.items():
            assert [part.layer for part in locate(spelling(path), anatomy).parts] == [path], name


@every_family
def test_a_familys_own_names_win_without_a_model(family):
    anatomy = Anatomy(family)
    for path in adaptable_layers(FAMILIES[family]()):
        assert anatomy.has(path)
        for name, spelling in SPELLINGS.items():
            located = locate(spelling(path), anatomy)
            assert [part.layer for part in located.parts] == [path] and not located.flat, name


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_a_transformers_original_names_lead_to_each_layer_once(family):
    """Of the names, dotted and flat; what diffusers' converters make of the weights is tested beside the dialects."""
    model = FAMILIES[family]()
    paths = list(adaptable_layers(model))
    anatomy, table = anatomy_of(model, paths), TRANSFORMERS[family]
    names = [*table.outside, *table.swapped]
    for (theirs, ours), inside in table.blocks.items():
        numbers = {path.removeprefix(ours + ".").split(".")[0] for path in paths if path.startswith(ours + ".")}
        fused = table.fused.get((theirs, ours), {})
        names += [f"{theirs}.{n}.{name}" for n in numbers if n.isdecimal() for name in (*inside, *fused)]
    reached = []
    for name in names:
        spelt = [locate(f"diffusion_model.{name}", anatomy), locate(f"lora_unet_{name.replace('.', '_')}", anatomy)]
        assert spelt[0] == spelt[1], name
        layers = [part.layer for part in spelt[0].parts]
        reached += layers if set(layers) <= set(paths) else []
    assert sorted(reached) == sorted(paths)


UNETS = {
    "one layer in a block": {"layers_per_block": 1},
    "two": {"layers_per_block": 2},
    "three": {"layers_per_block": 3},
    "attention everywhere": {
        "down_block_types": ("CrossAttnDownBlock2D",) * 3,
        "up_block_types": ("CrossAttnUpBlock2D",) * 3,
        "block_out_channels": (32, 64, 64),
        "layers_per_block": 2,
    },
}


@pytest.mark.parametrize("options", UNETS.values(), ids=UNETS)
def test_a_unets_original_names_are_those_of_diffusers_converter(options):
    """Each original weight has a number of its own; the converter says which layer it belongs to."""
    model: UNet2DConditionModel = bases.unet(**options)
    paths = list(adaptable_layers(model))
    anatomy = anatomy_of(model, paths)
    names = originals_of(paths)
    assert sorted(names.values()) == sorted(paths)
    weights = {f"model.diffusion_model.{name}.weight": torch.tensor(float(i)) for i, name in enumerate(names)}
    weights["model.diffusion_model.out.0.weight"] = torch.tensor(-1.0)
    weights |= {key.removesuffix("weight") + "bias": torch.tensor(-1.0) for key in weights}
    converted = convert_ldm_unet_checkpoint(dict(weights), model.config)
    numbers = {key.removesuffix(".weight"): int(value) for key, value in converted.items() if value >= 0}
    for i, name in enumerate(names):
        for spelt in (f"diffusion_model.{name}", f"lora_unet_{name.replace('.', '_')}", f"unet.{name}"):
            (part,) = locate(spelt, anatomy).parts
            assert numbers[part.layer] == i, name


@every_family
@pytest.mark.parametrize("spelling", ["transformer.", "lora_unet_"])
def test_a_layer_alone_in_a_file_gets_its_update(tmp_path, family, spelling):
    """The ends of the model, which bear the names that other families' checkpoints have too."""
    model = FAMILIES[family]()
    paths = [path for path in adaptable_layers(model) if "blocks." not in path and "layers." not in path][:6]
    for path in paths:
        named = {"transformer.": lambda p: f"transformer.{p}", "lora_unet_": flat("lora_unet_")}[spelling]
        leaves = peft if spelling == "transformer." else kohya
        made = make(model, [path], named, leaves, lora_delta, s=1.0 if leaves is peft else 1.5)
        adapter = load_adapter(model, made.save(tmp_path / "a.safetensors"))
        assert list(adapter.layers) == [path]
        assert relative_error(adapter.updates()[path].delta_weight(), made.deltas[path]) < 1e-5
        adapter.eject()


@every_family
def test_a_trained_file_of_all_layers_loads_and_converts_by_its_own_names(tmp_path, family):
    model = FAMILIES[family]()
    adapter = inject_adapter(model, _everything(model))
    for update in adapter.updates().values():
        nn.init.normal_(update.lora_B)
    save_adapter(adapter, tmp_path / "a.safetensors")
    adapter.eject()
    tensors = load_file(tmp_path / "a.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")  # without the description: the names have to tell
    file = read_adapter_file(tmp_path / "bare.safetensors")
    assert file.models == (family,)
    for to in ("kohya", "diffusers"):
        convert_adapter(tmp_path / "bare.safetensors", tmp_path / f"{to}.safetensors", to)
    convert_adapter(tmp_path / "kohya.safetensors", tmp_path / "back.safetensors", "diffusers")
    for name in ("diffusers", "back"):
        found = load_file(tmp_path / f"{name}.safetensors")
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    for name in ("a", "bare", "kohya"):
        again = load_adapter(model, tmp_path / f"{name}.safetensors")
        assert set(again.layers) == set(adaptable_layers(model))
        again.eject()


def _everything(model: nn.Module) -> AdapterConfig:
    return AdapterConfig(kind="lora", rank=2, alpha=2.0, target_modules=tuple(adaptable_layers(model)))


def one_layer(tmp_path: Path, key: str, out: int = 32, inputs: int = 16) -> Path:
    tensors = {f"{key}.lora_down.weight": torch.ones(2, inputs), f"{key}.lora_up.weight": torch.ones(out, 2)}
    save_file(tensors, tmp_path / "one.safetensors")
    return tmp_path / "one.safetensors"


@pytest.mark.parametrize("key", ["lora_unet_img_in", "lora_unet_final_layer_linear", "lora_unet_t_embedder_mlp_0"])
def test_a_name_that_several_families_have_is_not_guessed(tmp_path, key):
    path = one_layer(tmp_path, key)
    assert any("nothing in the file says" in note for note in read_adapter_file(path).notes)
    for to in ("diffusers", "kohya"):
        with pytest.raises(AdapterFileError, match=rf"{key}.*would be other layers in.*--base"):
            convert_adapter(path, tmp_path / "out.safetensors", to)


def test_a_layer_that_several_families_name_alike_needs_the_base_for_kohya(tmp_path):
    path = one_layer(tmp_path, "transformer.transformer_blocks.0.attn.to_q", 32, 32)
    convert_adapter(path, tmp_path / "out.safetensors", "diffusers")
    with pytest.raises(AdapterFileError, match=r"each goes by other names in kohya's layout. Give the base"):
        convert_adapter(path, tmp_path / "out.safetensors", "kohya")
    convert_adapter(path, tmp_path / "out.safetensors", "kohya", base=bases.qwen_transformer())
    assert "lycoris_transformer_blocks_0_attn_to_q.lora_up.weight" in load_file(tmp_path / "out.safetensors")


def test_a_qwen_file_without_a_description_gets_the_names_that_comfyui_reads(tmp_path):
    """ComfyUI's own list for Qwen-Image has `lycoris_` and `lora_unet_`, and no `lora_transformer_`."""
    path = one_layer(tmp_path, "transformer.transformer_blocks.0.img_mlp.net.2", 32, 128)
    convert_adapter(path, tmp_path / "out.safetensors", "kohya")
    assert {key.partition(".")[0] for key in load_file(tmp_path / "out.safetensors")} == {
        "lycoris_transformer_blocks_0_img_mlp_net_2"
    }


def test_original_names_of_a_unet_say_what_is_taken_for_granted(tmp_path):
    path = one_layer(tmp_path, "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q")
    conversion = convert_adapter(path, tmp_path / "out.safetensors", "diffusers")
    assert any("taken for two layers in a block" in note for note in conversion.notes)
    conversion = convert_adapter(
        one_layer(tmp_path, "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q", 32, 32),
        tmp_path / "out.safetensors",
        "diffusers",
        base=bases.unet(),
    )
    assert not any("taken for" in note for note in conversion.notes)
