"""Files of every dialect, as their writers write them: each layer's weight is the one that the writer meant."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import bases
import dialect_files as files
import pytest
import torch
from dialect_files import Made, make
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from oracles import inputs_of, output_of, relative_error
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dora_diffusion.adapters.injection import Adapter, AdapterConfig, adaptable_layers, inject_adapter
from dora_diffusion.adapters.layers import InputAxisDoRAUpdate
from dora_diffusion.adapters.variants import UnscaledNormDoRAUpdate
from dora_diffusion.adapters.whole import DifferenceUpdate
from dora_diffusion.errors import AdapterFileError, AdapterMismatchError
from dora_diffusion.formats.anatomy import Anatomy
from dora_diffusion.formats.convert import convert_adapter
from dora_diffusion.formats.files import load_adapter, read_adapter_file
from dora_diffusion.formats.names import locate, unflatten
from dora_diffusion.formats.unet_names import unet_original

BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
PATHS = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.ff.net.0.proj"]
WITH_CONVOLUTIONS = [*PATHS, "conv_in", "down_blocks.0.resnets.0.conv1", "down_blocks.1.resnets.0.conv_shortcut"]
TEXT = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1"]


def assert_means(adapter: Adapter, deltas: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    found = {path: update.delta_weight() for path, update in adapter.updates().items()}
    assert found.keys() == deltas.keys()
    for path, expected in deltas.items():
        assert relative_error(found[path], expected) <= tolerance, path


def load_quietly(model: object, path: Path, **options: object) -> Adapter:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_adapter(model, path, **options)


DIALECTS = {
    "kohya LoRA": (files.flat("lora_unet_"), files.kohya, files.lora_delta),
    "LyCORIS DoRA": (files.flat("lora_unet_"), files.kohya_dora, files.dora_delta),
    "LyCORIS DoRA by input": (files.flat("lora_unet_"), files.kohya_input_axis, files.input_axis_delta),
    "LyCORIS on any model": (files.flat("lycoris_"), files.kohya_dora, files.dora_delta),
    "differences": (files.flat("lora_unet_"), lambda v: {"diff": files.lora_delta(v).float()}, files.lora_delta),
    "dots and alphas": (
        files.dotted("diffusion_model."),
        lambda v: {**files.peft(v), **files.alpha(v)},
        files.lora_delta,
    ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_file_means_what_its_writer_meant_linear_and_convolution(tmp_path, unet, dialect):
    name, leaves, delta = DIALECTS[dialect]
    made = make(unet, WITH_CONVOLUTIONS, name, leaves, delta)
    assert_means(load_quietly(unet, made.save(tmp_path / "a.safetensors")), made.deltas)


# Where alpha is the rank: PEFT without a configuration, and programs that save none.
UNSCALED = {
    "NVlabs": (files.dotted("base_model.model."), files.nvlabs, files.dora_delta),
    "ai-toolkit": (
        files.dotted("transformer."),
        lambda v: {**files.peft(v), "magnitude": v.by_output},
        files.ai_toolkit_delta,
    ),
    "PEFT, no configuration": (files.dotted("unet."), files.peft, files.lora_delta),
    "a dora_scale with one axis": (
        files.flat("lora_unet_"),
        lambda v: {**files.kohya(v), "dora_scale": v.by_output},
        files.dora_delta,
    ),
}


@pytest.mark.parametrize("dialect", UNSCALED)
def test_a_file_with_alpha_equal_to_rank_means_what_its_writer_meant(tmp_path, unet, dialect):
    name, leaves, delta = UNSCALED[dialect]
    made = make(unet, PATHS, name, leaves, delta, s=1.0)
    assert_means(load_quietly(unet, made.save(tmp_path / "a.safetensors")), made.deltas)


def test_old_diffusers_names_are_read(tmp_path, unet):
    paths = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn1.to_out.0"]

    def name(path: str) -> str:
        return "unet." + path.replace("attn1.", "attn1.processor.").removesuffix(".0") + "_lora"

    made = make(unet, paths, name, files.old_diffusers, files.lora_delta, s=1.0)
    assert f"unet.{BLOCK}.attn1.processor.to_out_lora.down.weight" in made.tensors
    assert_means(load_quietly(unet, made.save(tmp_path / "a.safetensors")), made.deltas)


# ai-toolkit: its norm leaves alpha / rank out, and it does not save alpha.


def ai_toolkit_kohya(unet: nn.Module) -> Made:
    def leaves(v: files.Values) -> dict[str, Tensor]:
        return {"lora_down.weight": v.A, "lora_up.weight": v.B, "magnitude": v.by_output}

    return make(unet, PATHS, files.flat("lora_unet_"), leaves, files.ai_toolkit_delta)


def test_ai_toolkits_norm_is_computed_as_ai_toolkit_does_once_alpha_is_said(tmp_path, unet):
    made = ai_toolkit_kohya(unet)
    adapter = load_adapter(unet, made.save(tmp_path / "a.safetensors"), alpha=files.ALPHA)
    assert_means(adapter, made.deltas)
    assert {type(update) for update in adapter.updates().values()} == {UnscaledNormDoRAUpdate}


def test_an_alpha_that_ai_toolkit_did_not_save_is_asked_for(tmp_path, unet):
    path = ai_toolkit_kohya(unet).save(tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=r"does not save alpha.*linear_alpha.*--alpha 1"):
        load_adapter(unet, path)


# The norm's axis.


def test_the_axis_of_a_square_layer_is_told_by_the_shape(tmp_path, unet):
    path = f"{BLOCK}.attn1.to_q"
    assert unet.get_submodule(path).weight.shape == (32, 32)
    deltas = []
    for leaves, delta in (
        (files.kohya_dora, files.dora_delta),
        (files.kohya_input_axis, files.input_axis_delta),
    ):
        made = make(unet, [path], files.flat("lora_unet_"), leaves, delta)
        adapter = load_quietly(unet, made.save(tmp_path / "a.safetensors"))
        assert_means(adapter, made.deltas)
        deltas.append(adapter.updates()[path].delta_weight())
        adapter.eject()
    assert relative_error(deltas[0], deltas[1]) > 0.1


def test_a_scale_with_one_axis_on_a_square_layer_is_said_to_be_read_by_output(tmp_path, unet):
    name, leaves, delta = UNSCALED["a dora_scale with one axis"]
    path = make(unet, PATHS[:1], name, leaves, delta).save(tmp_path / "a.safetensors")
    assert any("one axis on a square layer" in note for note in read_adapter_file(path).notes)


@pytest.mark.parametrize("grouped", [False, True])
def test_the_norm_by_input_in_forward_is_that_of_the_merged_weight(grouped):
    torch.manual_seed(0)
    conv = nn.Conv2d(8, 6, 3, groups=2) if grouped else nn.Conv2d(8, 6, 3)
    for layer, x in ((nn.Linear(8, 6), torch.randn(5, 8)), (conv, torch.randn(2, 8, 7, 7))):
        adapter = inject_adapter(nn.Sequential(layer), AdapterConfig(target_modules=("0",), rank=2), seed=0)
        adapted = adapter.layers["0"]
        update = InputAxisDoRAUpdate(adapted.frozen, 2, 1.5).eval()
        assert torch.equal(update(x, torch.zeros(())), torch.zeros_like(layer(x))), "it starts as the base"
        with torch.no_grad():
            update.lora_B.normal_()
            update.input_magnitude.mul_(0.5 + torch.rand(update.input_magnitude.shape))
        W = layer.weight.detach() + update.delta_weight()
        merged = (
            layer._conv_forward(x, W, layer.bias)
            if isinstance(layer, nn.Conv2d)
            else torch.nn.functional.linear(x, W, layer.bias)
        )
        assert relative_error(layer(x) + update(x, torch.zeros(())), merged) < 1e-5


@pytest.mark.parametrize("make_update", [DifferenceUpdate, UnscaledNormDoRAUpdate])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_the_other_updates_in_forward_are_those_of_the_merged_weight(make_update, kind):
    torch.manual_seed(0)
    layer: nn.Linear | nn.Conv2d = nn.Linear(8, 6) if kind == "linear" else nn.Conv2d(8, 6, 3)
    x = torch.randn(5, 8) if kind == "linear" else torch.randn(2, 8, 7, 7)
    frozen = adaptable_layers(nn.Sequential(layer))["0"]
    update = make_update(frozen, 2, 1.5).eval()
    with torch.no_grad():
        for parameter in update.parameters():
            parameter.add_(torch.randn(parameter.shape))
        y = layer(x)
        found = y + update(x, frozen.without_bias(y))
        assert relative_error(found, y) > 0.1
        layer.weight.add_(update.delta_weight())
        assert relative_error(found, layer(x)) < 1e-5


def test_a_packed_layer_takes_the_norm_by_input():
    class Packed(nn.Module):
        """A linear map that shows no matrix."""

        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 8, 6
            self.register_buffer("packed", torch.randn(6, 8, generator=torch.Generator().manual_seed(3)))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.packed.T

    packed, dense = Packed(), nn.Linear(8, 6, bias=False)
    with torch.no_grad():
        dense.weight.copy_(packed.packed)
    norms = []
    for module in (packed, dense):
        update = InputAxisDoRAUpdate(adaptable_layers(nn.Sequential(module))["0"], 2, 1.0)
        norms.append(update.input_magnitude.detach())
    assert torch.allclose(norms[0], norms[1])


# Text encoders, and a handle over all of a pipeline.


def kohya_pipeline_file(pipe: object, encoders: dict[str, str], leaves: files.Leaves, delta: object) -> Made:
    made = make(pipe.unet, PATHS, files.flat("lora_unet_"), leaves, delta)
    for i, (encoder, prefix) in enumerate(encoders.items()):
        model = getattr(pipe, encoder)
        inside = "text_model." if hasattr(model, "text_model") else ""
        paths = [inside + path for path in TEXT]
        name = files.flat(prefix if inside else prefix + "text_model_")
        make(model, paths, name, leaves, delta, seed=i + 1, into=made, deltas_behind=f"{encoder}.")
    return made


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["sd", "xl"])
def test_kohya_text_encoders_land_in_the_pipelines_own(tmp_path, family, kind):
    pipe = files.fresh(family)
    encoders = (
        {"text_encoder": "lora_te_"} if family == "sd" else {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    )
    leaves, delta = (files.kohya, files.lora_delta) if kind == "lora" else (files.kohya_dora, files.dora_delta)
    made = kohya_pipeline_file(pipe, encoders, leaves, delta)
    assert any("lora_te" in key and "text_model_encoder_layers_0_self_attn_q_proj" in key for key in made.tensors)
    assert_means(load_quietly(pipe, made.save(tmp_path / "a.safetensors")), made.deltas)


def test_a_text_encoder_needs_the_pipeline_and_a_bare_unet_says_so(tmp_path):
    pipe = files.fresh("sd")
    path = kohya_pipeline_file(pipe, {"text_encoder": "lora_te_"}, files.kohya, files.lora_delta).save(
        tmp_path / "a.safetensors"
    )
    with pytest.raises(
        AdapterMismatchError, match=r"4 of 6 layers match.*(?s:.)*text_encoder\.text_model.*not in this model"
    ):
        load_adapter(pipe.unet, path)
    with pytest.warns(UserWarning, match=r"loaded in part: 4 of 6 layers"):
        adapter = load_adapter(pipe.unet, path, partial=True)
    assert len(adapter.layers) == 4


# Original names: SDXL's blocks, FLUX's fused layers.


def test_sdxl_blocks_by_their_original_names(tmp_path):
    pipe = files.fresh("xl")
    n = pipe.unet.config.layers_per_block
    paths = [path for path in adaptable_layers(pipe.unet) if path != "conv_norm_out"]

    def name(path: str) -> str:
        return "lora_unet_" + unet_original(path, n, (0,)).replace(".", "_")

    made = make(pipe.unet, paths, name, files.kohya_dora, files.dora_delta)
    assert any("input_blocks_1_1_transformer_blocks_0_attn1_to_q" in key for key in made.tensors)
    assert_means(load_quietly(pipe, made.save(tmp_path / "a.safetensors")), made.deltas)


SDXL_NAMES = {  # from sd-scripts' own UNet and diffusers' conversion tables
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "input_blocks.8.1.proj_in": "down_blocks.2.attentions.1.proj_in",
    "input_blocks.7.0.skip_connection": "down_blocks.2.resnets.0.conv_shortcut",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.2.0.in_layers.2": "down_blocks.0.resnets.1.conv1",
    "middle_block.1.transformer_blocks.9.ff.net.2": "mid_block.attentions.0.transformer_blocks.9.ff.net.2",
    "middle_block.2.out_layers.3": "mid_block.resnets.1.conv2",
    "output_blocks.0.1.transformer_blocks.3.ff.net.2": "up_blocks.0.attentions.0.transformer_blocks.3.ff.net.2",
    "output_blocks.5.2.conv": "up_blocks.1.upsamplers.0.conv",
    "output_blocks.8.0.emb_layers.1": "up_blocks.2.resnets.2.time_emb_proj",
    "time_embed.0": "time_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.2": "conv_out",
}


@pytest.mark.parametrize("theirs, ours", SDXL_NAMES.items())
def test_sdxl_names_go_there_and_back(theirs, ours):
    (part,) = locate("lora_unet_" + theirs.replace(".", "_"), Anatomy("unet", 2)).parts
    assert part.layer == ours
    assert unet_original(ours) == theirs


QKV = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"]
ADDED_QKV = [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"]
FLUX_GROUPS = {
    "double_blocks.0.img_attn.qkv": QKV,
    "double_blocks.0.txt_attn.qkv": ADDED_QKV,
    "single_blocks.0.linear1": [
        *(f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.0.proj_mlp",
    ],
    "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.net.0.proj"],
    "single_blocks.0.linear2": ["single_transformer_blocks.0.proj_out"],
}
FLUX2_GROUPS = {
    "double_blocks.0.img_attn.qkv": QKV,
    "double_blocks.0.txt_attn.qkv": ADDED_QKV,
    "double_blocks.0.img_attn.proj": ["transformer_blocks.0.attn.to_out.0"],
    "double_blocks.0.txt_attn.proj": ["transformer_blocks.0.attn.to_add_out"],
    "double_blocks.0.img_mlp.0": ["transformer_blocks.0.ff.linear_in"],
    "double_blocks.0.txt_mlp.2": ["transformer_blocks.0.ff_context.linear_out"],
    "single_blocks.1.linear1": ["single_transformer_blocks.1.attn.to_qkv_mlp_proj"],
    "single_blocks.1.linear2": ["single_transformer_blocks.1.attn.to_out"],
    "img_in": ["x_embedder"],
}
Z_IMAGE_GROUPS = {
    "layers.0.attention.qkv": [f"layers.0.attention.to_{x}" for x in "qkv"],
    "layers.1.attention.out": ["layers.1.attention.to_out.0"],
    "noise_refiner.0.attention.qkv": [f"noise_refiner.0.attention.to_{x}" for x in "qkv"],
    "context_refiner.0.feed_forward.w1": ["context_refiner.0.feed_forward.w1"],
}


def fused(model: nn.Module, kind: str, groups: dict[str, list[str]], name: files.Name) -> Made:
    """A file with the original's names: q, k and v in one layer, its rows one after another."""
    leaves, delta = {
        "lora": (files.kohya, files.lora_delta),
        "dora": (files.kohya_dora, files.dora_delta),
        "input": (files.kohya_input_axis, files.input_axis_delta),
    }[kind]
    made, generator = Made(), torch.Generator().manual_seed(0)
    for theirs, paths in groups.items():
        weights = [model.get_submodule(path).weight for path in paths]
        v = files.values_of(torch.cat(weights), generator)
        made.tensors |= {f"{name(theirs)}.{leaf}": tensor for leaf, tensor in leaves(v).items()}
        made.deltas |= dict(zip(paths, delta(v).split([len(w) for w in weights])))
    return made


def fused_flux(model: nn.Module, kind: str) -> Made:
    """As sd-scripts writes FLUX.1."""
    return fused(model, kind, FLUX_GROUPS, files.flat("lora_unet_"))


@pytest.mark.parametrize("name", [files.flat("lora_unet_"), files.dotted("diffusion_model.")], ids=["flat", "dotted"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    ("make_pipe", "groups"), [(bases.flux2_klein, FLUX2_GROUPS), (bases.z_image, Z_IMAGE_GROUPS)], ids=["flux2", "z"]
)
def test_original_names_of_later_transformers(tmp_path, make_pipe, groups, kind, name):
    pipe = make_pipe()
    made = fused(pipe.transformer, kind, groups, name)
    path = made.save(tmp_path / "a.safetensors")
    assert_means(load_quietly(pipe, path), made.deltas)
    convert_adapter(path, tmp_path / "d.safetensors", "diffusers")
    convert_adapter(tmp_path / "d.safetensors", tmp_path / "k.safetensors", "kohya")
    again = load_file(tmp_path / "k.safetensors")
    modules = {key.partition(".")[0] for key in again}
    assert modules == {files.flat("lora_unet_")(theirs) for theirs in groups}
    assert_means(load_quietly(make_pipe(), tmp_path / "k.safetensors"), made.deltas)


def test_flux2s_original_names_mean_what_diffusers_makes_of_them(tmp_path):
    """Stock diffusers converts such a LoRA itself, as ai-toolkit names it."""
    pipe, stock = bases.flux2_klein(), bases.flux2_klein()
    made = fused(pipe.transformer, "lora", FLUX2_GROUPS, files.dotted("diffusion_model."))
    made.tensors = {
        key.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): tensor
        for key, tensor in made.tensors.items()
        if not key.endswith(".alpha")
    }
    path = made.save(tmp_path / "a.safetensors")
    load_quietly(pipe, path)
    stock.load_lora_weights(str(path))
    embeds = torch.randn(1, 5, 48, generator=torch.Generator().manual_seed(1))
    values = {
        "hidden_states": torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(2)),
        "encoder_hidden_states": embeds,
        "timestep": torch.tensor([0.4]),
        "img_ids": pipe._prepare_latent_ids(torch.zeros(1, 16, 3, 4)),
        "txt_ids": pipe._prepare_text_ids(embeds),
    }
    with torch.no_grad():
        ours, theirs, bare = (p.transformer(**values).sample for p in (pipe, stock, bases.flux2_klein()))
    assert relative_error(ours, theirs) < 1e-4 and relative_error(bare, theirs) > 1e-3


@pytest.mark.parametrize("kind", ["lora", "dora", "input"])
def test_fused_layers_of_flux_are_cut_along_their_rows_exactly(tmp_path, kind):
    model = bases.flux_transformer()
    made = fused_flux(model, kind)
    assert_means(load_quietly(model, made.save(tmp_path / "a.safetensors")), made.deltas)


def test_a_module_that_is_not_whole_does_not_make_flux_1_another_model(tmp_path):
    model = bases.flux_transformer()
    made = fused_flux(model, "lora")
    del made.tensors["lora_unet_single_blocks_0_linear1.lora_down.weight"]
    path = made.save(tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match="single_blocks_0_linear1"):
        load_adapter(model, path)
    with pytest.warns(UserWarning):
        adapter = load_adapter(model, path, partial=True)
    assert "transformer_blocks.0.ff.net.0.proj" in adapter.layers


def test_fluxs_last_layer_has_its_halves_swapped(tmp_path):
    model = bases.flux_transformer()
    v = files.values_of(model.norm_out.linear.weight, torch.Generator().manual_seed(0))
    theirs = files.Values(
        torch.cat(v.W0.chunk(2)[::-1]),
        v.A,
        torch.cat(v.B.chunk(2)[::-1]),
        torch.cat(v.by_output.chunk(2)[::-1]),
        v.by_input,
        v.s,
    )
    name = "lora_unet_final_layer_adaLN_modulation_1"
    made = Made(
        {f"{name}.{leaf}": t for leaf, t in files.kohya_dora(theirs).items()}, {"norm_out.linear": files.dora_delta(v)}
    )
    assert_means(load_quietly(model, made.save(tmp_path / "a.safetensors")), made.deltas)


SD3_SHAPES = {  # of the original's linear layers, for the small model of bases.py
    "x_embedder.proj": (32, 4, 1, 1),
    "context_embedder": (32, 32),
    "t_embedder.mlp.0": (32, 256),
    "t_embedder.mlp.2": (32, 32),
    "y_embedder.mlp.0": (32, 64),
    "y_embedder.mlp.2": (32, 32),
    "final_layer.linear": (4, 32),
    "final_layer.adaLN_modulation.1": (64, 32),
    **{
        f"joint_blocks.{block}.{stream}.{layer}": shape
        for block in range(2)
        for stream in ("x_block", "context_block")
        for layer, shape in {
            "attn.qkv": (96, 32),
            "attn.proj": (32, 32),
            "mlp.fc1": (128, 32),
            "mlp.fc2": (32, 128),
            "adaLN_modulation.1": (192, 32),
        }.items()
        if (block, stream) == (0, "context_block") or stream == "x_block" or layer == "attn.qkv"
    },
    "joint_blocks.1.context_block.adaLN_modulation.1": (64, 32),
}


def in_diffusers(original: dict[str, Tensor]) -> dict[str, Tensor]:
    """SD3's weights by diffusers' own conversion of an original checkpoint."""
    checkpoint = {f"{name}.weight": weight for name, weight in original.items()}
    checkpoint |= {f"{name}.bias": weight.flatten(1)[:, 0] for name, weight in original.items()}
    made = convert_sd3_transformer_checkpoint_to_diffusers({**checkpoint, "pos_embed": torch.zeros(1)})
    return {key.removesuffix(".weight"): weight for key, weight in made.items() if key.endswith(".weight")}


def original_sd3_weights(model: nn.Module) -> dict[str, Tensor]:
    """The original's weights that become the model's: where each number goes, a numbered checkpoint tells."""
    sizes = [math.prod(shape) for shape in SD3_SHAPES.values()]
    numbers = torch.arange(float(sum(sizes)), dtype=torch.float64).split(sizes)
    numbered = {name: part.reshape(shape) for (name, shape), part in zip(SD3_SHAPES.items(), numbers)}
    value = torch.empty(sum(sizes))
    for layer, number in in_diffusers(numbered).items():
        value[number.flatten().long()] = model.get_submodule(layer).weight.detach().flatten()
    return {name: value[number.long()] for name, number in numbered.items()}


@pytest.mark.parametrize("leaves, delta", [(files.kohya, files.lora_delta), (files.kohya_dora, files.dora_delta)])
def test_sd3s_original_names_mean_what_diffusers_conversion_makes_of_them(tmp_path, leaves, delta):
    model = bases.sd3_transformer()
    made, generator = Made(), torch.Generator().manual_seed(0)
    weights = original_sd3_weights(model)
    for name in weights:  # the last block's modulation of the text has its two halves the other way round
        v = files.values_of(weights[name], generator)
        made.tensors |= {f"lora_unet_{name.replace('.', '_')}.{leaf}": tensor for leaf, tensor in leaves(v).items()}
        weights[name] = weights[name].double() + delta(v)
    before = {name: parameter.double() for name, parameter in model.state_dict().items()}
    path = made.save(tmp_path / "a.safetensors")
    adapter = load_quietly(model, path)
    after = in_diffusers(weights)
    assert adapter.layers.keys() == after.keys()
    for layer, update in adapter.updates().items():
        change = after[layer] - before[f"{layer}.weight"]
        assert relative_error(update.delta_weight(), change) < 1e-5, layer
    convert_adapter(path, tmp_path / "again.safetensors", "kohya")
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == made.tensors.keys()
    assert all(torch.equal(tensor, made.tensors[key]) for key, tensor in again.items())


def test_onetrainers_flux_names_are_read(tmp_path):
    model = bases.flux_transformer()
    paths = ["transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.proj_mlp"]
    made = make(model, paths, files.flat("lora_transformer_"), files.kohya_input_axis, files.input_axis_delta)
    path = made.save(tmp_path / "a.safetensors", {"ot_revision": "1"})
    assert_means(load_quietly(model, path), made.deltas)
    file = read_adapter_file(path)
    assert (file.dialect, file.norm_axis) == ("OneTrainer", "input")


def test_every_layer_name_of_the_small_models_survives_flattening():
    transformers = (
        bases.flux_transformer(),
        bases.chroma_transformer(),
        bases.sd3_transformer(),
        bases.flux2_transformer(),
        bases.qwen_transformer(),
    )
    for model in (bases.unet(), *transformers, bases.z_image_transformer(), files.fresh("xl").text_encoder_2):
        for path in adaptable_layers(model):
            if path.startswith(("all_x_embedder", "all_final_layer")):
                continue  # Z-Image's two ends are named after a patch size, "2-1"
            assert unflatten(path.replace(".", "_")) == path


def test_a_flat_name_with_an_unknown_word_is_settled_by_the_model(tmp_path):
    model = nn.ModuleDict({"odd_name": nn.ModuleList([nn.Linear(8, 6)])})
    made = make(model, ["odd_name.0"], files.flat("lora_unet_"), files.kohya, files.lora_delta)
    path = made.save(tmp_path / "a.safetensors")
    assert read_adapter_file(path).layers == ["odd_name_0"]
    assert_means(load_quietly(model, path), made.deltas)


@pytest.mark.parametrize("path", ["down_blocks.1.resnets.0.conv_shortcut", PATHS[0]])
def test_a_linear_layer_and_a_one_by_one_convolution_are_the_same_map(tmp_path, unet, path):
    made = make(unet, [path], files.flat("lora_unet_"), files.kohya_dora, files.dora_delta)
    name = "lora_unet_" + path.replace(".", "_")
    for leaf in ("lora_down.weight", "lora_up.weight", "dora_scale"):
        tensor = made.tensors[f"{name}.{leaf}"]
        made.tensors[f"{name}.{leaf}"] = tensor.flatten(1) if tensor.dim() == 4 else tensor[:, :, None, None]
    assert_means(load_quietly(unet, made.save(tmp_path / "a.safetensors")), made.deltas)


def test_a_tucker_core_is_multiplied_in(tmp_path, unet):
    g = torch.Generator().manual_seed(0)
    up, mid, down = (torch.randn(*shape, generator=g) for shape in ((32, 4, 1, 1), (4, 4, 3, 3), (4, 4, 1, 1)))
    tensors = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down, "alpha": torch.tensor(2.0)}
    save_file({f"lora_unet_conv_in.{leaf}": t for leaf, t in tensors.items()}, tmp_path / "a.safetensors")
    expected = 0.5 * torch.einsum("mnxy,im,nj->ijxy", mid.double(), up.double().flatten(1), down.double().flatten(1))
    adapter = load_quietly(unet, tmp_path / "a.safetensors")
    assert_means(adapter, {"conv_in": expected})
    assert any("Tucker" in note for note in read_adapter_file(tmp_path / "a.safetensors").notes)


# PEFT's own folders, and the hub.


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_folder_that_peft_saved_is_read_with_its_configuration(tmp_path, unet, use_dora):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4,
        lora_alpha=10,
        target_modules=["to_q", "conv1"],
        use_dora=use_dora,
        init_lora_weights=False,
        alpha_pattern={"attn2.to_q": 3},
        rank_pattern={"conv1": 2},
    )
    theirs = get_peft_model(unet, config)
    theirs.save_pretrained(tmp_path / "folder")
    fresh = bases.unet()
    adapter = load_quietly(fresh, tmp_path / "folder")
    with torch.no_grad():
        expected = theirs(**inputs_of(fresh), return_dict=False)[0]
    assert relative_error(output_of(fresh), expected) <= 1e-5
    assert adapter.config.alpha == 10 and set(adapter.config.alpha_pattern.values()) == {3.0}


def in_the_hubs_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *names: str) -> Path:
    """A repository as the hub's client leaves it on disk."""
    repository = tmp_path / "hub" / "models--someone--style"
    folder = repository / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    made = make(bases.unet(), PATHS, files.flat("lora_unet_"), files.kohya, files.lora_delta)
    for name in names:
        made.save(folder / name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


def test_a_hub_id_is_read_from_the_hub(tmp_path, monkeypatch, unet):
    in_the_hubs_cache(monkeypatch, tmp_path, "style.safetensors")
    assert len(load_quietly(unet, "someone/style").layers) == len(PATHS)


def test_several_files_on_the_hub_have_to_be_told_apart(tmp_path, monkeypatch, unet):
    in_the_hubs_cache(monkeypatch, tmp_path, "a.safetensors", "b.safetensors")
    with pytest.raises(AdapterFileError, match=r"2 adapter files \(a\.safetensors, b\.safetensors\)"):
        load_adapter(unet, "someone/style")
    assert len(load_quietly(unet, "someone/style/b.safetensors").layers) == len(PATHS)


def test_a_hub_id_that_is_nowhere_says_both(unet):
    with pytest.raises(AdapterFileError, match=r"no adapter file at no-one/nothing.*hub"):
        load_adapter(unet, "no-one/nothing")


# What LyCORIS itself writes.


@pytest.mark.parametrize("on_output", [True, False])
def test_a_file_that_lycoris_saved_means_what_lycoris_computes(tmp_path, unet, on_output):
    from lycoris import create_lycoris
    from lycoris_files import preset

    preset({"target_name": [], "target_module": ["Transformer2DModel", "ResnetBlock2D"]})
    network = create_lycoris(
        unet, 1.0, 4, 6, preset="full", algo="lora", dora_wd=True, wd_on_output=on_output, warn_on_unmatched=False
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for lora in network.loras:
            lora.lora_up.weight.copy_(0.1 * torch.randn(lora.lora_up.weight.shape, generator=generator))
            lora.dora_scale.mul_(0.7 + 0.6 * torch.rand(lora.dora_scale.shape, generator=generator))
    expected = {lora.lora_name: lora.get_merged_weight()[0].detach() - lora.org_weight for lora in network.loras}
    network.apply_to()
    network.save_weights(str(tmp_path / "a.safetensors"), None, None)
    adapter = load_quietly(bases.unet(), tmp_path / "a.safetensors")
    assert len(adapter.layers) == len(expected) > 20
    for path, update in adapter.updates().items():
        assert relative_error(update.delta_weight(), expected["lycoris_" + path.replace(".", "_")]) <= 1e-4
