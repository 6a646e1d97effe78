"""Files with the names that other programs write: each layer's W' - W0 is arithmetic on the writer's own matrices."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import bases
import dialect_files as files
import pytest
import torch
from dialect_files import Made, make
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from oracles import relative_error
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5Config, T5EncoderModel

from dora_diffusion.adapters.injection import Adapter, adaptable_layers
from dora_diffusion.errors import AdapterFileError, AdapterMismatchError
from dora_diffusion.formats.files import load_adapter, read_adapter_file

Groups = Mapping[str, list[str]]  # a module of the writer's, and diffusers' layers one under the other in it


def attention(block: str, *names: str) -> list[str]:
    return [f"{block}.{name}" for name in names]


def qkv(block: str) -> list[str]:
    return attention(f"{block}.attn", "to_q", "to_k", "to_v")


def added_qkv(block: str) -> list[str]:
    return attention(f"{block}.attn", "add_q_proj", "add_k_proj", "add_v_proj")


DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"
FLUX_BLOCKS: Groups = {
    "double_blocks.0.img_attn.qkv": qkv(DOUBLE),
    "double_blocks.0.txt_attn.qkv": added_qkv(DOUBLE),
    "double_blocks.0.img_attn.proj": [f"{DOUBLE}.attn.to_out.0"],
    "double_blocks.0.txt_attn.proj": [f"{DOUBLE}.attn.to_add_out"],
    "double_blocks.0.img_mlp.0": [f"{DOUBLE}.ff.net.0.proj"],
    "double_blocks.0.img_mlp.2": [f"{DOUBLE}.ff.net.2"],
    "double_blocks.0.txt_mlp.0": [f"{DOUBLE}.ff_context.net.0.proj"],
    "double_blocks.0.txt_mlp.2": [f"{DOUBLE}.ff_context.net.2"],
    "single_blocks.0.linear1": [*qkv(SINGLE), f"{SINGLE}.proj_mlp"],
    "single_blocks.0.linear2": [f"{SINGLE}.proj_out"],
    "img_in": ["x_embedder"],
    "txt_in": ["context_embedder"],
    "final_layer.linear": ["proj_out"],
}
FLUX: Groups = {
    **FLUX_BLOCKS,
    "double_blocks.0.img_mod.lin": [f"{DOUBLE}.norm1.linear"],
    "double_blocks.0.txt_mod.lin": [f"{DOUBLE}.norm1_context.linear"],
    "single_blocks.0.modulation.lin": [f"{SINGLE}.norm.linear"],
    "time_in.in_layer": ["time_text_embed.timestep_embedder.linear_1"],
    "time_in.out_layer": ["time_text_embed.timestep_embedder.linear_2"],
    "vector_in.in_layer": ["time_text_embed.text_embedder.linear_1"],
    "vector_in.out_layer": ["time_text_embed.text_embedder.linear_2"],
    "guidance_in.in_layer": ["time_text_embed.guidance_embedder.linear_1"],
    "guidance_in.out_layer": ["time_text_embed.guidance_embedder.linear_2"],
}
CHROMA: Groups = {
    **FLUX_BLOCKS,
    "distilled_guidance_layer.in_proj": ["distilled_guidance_layer.in_proj"],
    "distilled_guidance_layer.out_proj": ["distilled_guidance_layer.out_proj"],
    "distilled_guidance_layer.layers.0.in_layer": ["distilled_guidance_layer.layers.0.linear_1"],
    "distilled_guidance_layer.layers.0.out_layer": ["distilled_guidance_layer.layers.0.linear_2"],
}
XLABS: Groups = {
    "double_blocks.0.processor.qkv_lora1": qkv(DOUBLE),
    "double_blocks.0.processor.qkv_lora2": added_qkv(DOUBLE),
    "double_blocks.0.processor.proj_lora1": [f"{DOUBLE}.attn.to_out.0"],
    "double_blocks.0.processor.proj_lora2": [f"{DOUBLE}.attn.to_add_out"],
    "single_blocks.0.processor.qkv_lora": qkv(SINGLE),
    "single_blocks.0.processor.proj_lora": [f"{SINGLE}.proj_out"],
}


def peft_with_alpha(v: files.Values) -> dict[str, Tensor]:
    return {**files.peft(v), **files.alpha(v)}


def named(adapter_name: str) -> files.Leaves:
    """PEFT's state_dict, which has the adapter's name in it."""
    return lambda v: {f"lora_A.{adapter_name}.weight": v.A, f"lora_B.{adapter_name}.weight": v.B}


def add(
    made: Made,
    model: nn.Module,
    groups: Groups,
    name: files.Name,
    leaves: files.Leaves,
    *,
    delta: Callable[[files.Values], Tensor] = files.lora_delta,
    s: float = files.ALPHA / files.RANK,
    behind: str = "",
    seed: int = 0,
) -> Made:
    """The writer's modules, and the part of W' - W0 that each of diffusers' layers has."""
    generator = torch.Generator().manual_seed(seed)
    for theirs, paths in groups.items():
        weights = [model.get_submodule(path).weight for path in paths]
        v = files.values_of(torch.cat(weights), generator, s)
        made.tensors |= {f"{name(theirs)}.{leaf}": tensor for leaf, tensor in leaves(v).items()}
        made.deltas |= zip((behind + path for path in paths), delta(v).split([len(w) for w in weights]))
    return made


def alone(model: nn.Module) -> Groups:
    """Every layer by its own name."""
    return {path: [path] for path in adaptable_layers(model)}


def assert_means(adapter: Adapter, deltas: Mapping[str, Tensor]) -> None:
    found = {path: update.delta_weight() for path, update in adapter.updates().items()}
    assert found.keys() == deltas.keys()
    for path, expected in deltas.items():
        assert relative_error(found[path], expected) < 1e-5, path


def load_quietly(pipe: object, path: Path) -> Adapter:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return load_adapter(pipe, path)


def t5(width: int) -> T5EncoderModel:
    """With the gate that the T5 of FLUX.1, Stable Diffusion 3 and Chroma has: `wi_0` and `wi_1`."""
    torch.manual_seed(9)
    config = T5Config(
        vocab_size=len(CLIPTokenizer.from_pretrained(bases.TOKENIZER)),
        d_model=width,
        d_kv=8,
        d_ff=64,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return T5EncoderModel(config).eval()


CLIP_LAYERS = [
    f"encoder.layers.{i}.{name}"
    for i in range(2)
    for name in ("mlp.fc1", "mlp.fc2", *(f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")))
]
T5_LAYERS = [
    *(f"encoder.block.0.layer.0.SelfAttention.{x}" for x in "qkvo"),
    *(f"encoder.block.0.layer.1.DenseReluDense.{x}" for x in ("wi_0", "wi_1", "wo")),
]
LANGUAGE_LAYERS = [
    f"layers.{i}.{name}"
    for i in range(2)
    for name in (*(f"self_attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down")))
]


def in_clip(model: nn.Module) -> Groups:
    """A CLIP's layers by the name that files have, with transformers' of this release."""
    inside = "text_model." if hasattr(model, "text_model") else ""
    return {f"text_model.{layer}": [inside + layer] for layer in CLIP_LAYERS}


def in_t5() -> Groups:
    return {layer: [layer] for layer in T5_LAYERS}


def with_t5(pipe: object, name: str, width: int) -> object:
    setattr(pipe, name, t5(width))
    return pipe


# The name of an adapter in PEFT's state_dict, and what stands before a layer's name.


@pytest.mark.parametrize("adapter_name", ["default", "my_style", "0"])
def test_diffsynths_qwen_image_has_the_adapters_name_in_its_keys(tmp_path, adapter_name):
    model = bases.qwen_transformer()
    made = add(Made(), model, alone(model), str, named(adapter_name), s=1.0)
    assert_means(load_quietly(model, made.save(tmp_path / "a.safetensors")), made.deltas)


def test_the_adapters_name_in_the_key_of_a_magnitude(tmp_path):
    """PEFT's own state_dict of a DoRA, and what PEFT makes of it."""
    model = bases.unet()
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], use_dora=True, init_lora_weights=False), "style")
    tensors = {key: tensor for key, tensor in model.state_dict().items() if ".lora_" in key}
    assert any(key.endswith(".lora_magnitude_vector.style.weight") for key in tensors)
    save_file(tensors, tmp_path / "state.safetensors")
    save_file(get_peft_model_state_dict(model, adapter_name="style"), tmp_path / "saved.safetensors")
    states = [
        {path: update.delta_weight() for path, update in load_quietly(bases.unet(), tmp_path / name).updates().items()}
        for name in ("state.safetensors", "saved.safetensors")
    ]
    assert states[0].keys() == states[1].keys() and len(states[0]) == len(tensors) / 3
    assert all(torch.equal(states[0][path], states[1][path]) for path in states[0])


def test_two_adapters_in_one_file_are_told_by_their_names(tmp_path):
    model = bases.qwen_transformer()
    made = add(Made(), model, {"transformer_blocks.0.attn.to_q": ["transformer_blocks.0.attn.to_q"]}, str, named("cat"))
    add(made, model, {"transformer_blocks.0.attn.to_k": ["transformer_blocks.0.attn.to_k"]}, str, named("dog"))
    with pytest.raises(AdapterFileError, match=r"2 adapters in one.*cat, dog.*selected_adapters=\['cat'\]"):
        load_adapter(model, made.save(tmp_path / "a.safetensors"))


@pytest.mark.parametrize(
    "before",
    [
        "model.diffusion_model.",
        "diffusion_model.",
        "unet.base_model.model.",
        "base_model.model.",
        "base_model.model.unet.",
        "base_model.model.model.diffusion_model.",
        "pipe.dit.",
    ],
)
@pytest.mark.parametrize("make_model", [bases.unet, bases.flux2_transformer], ids=["unet", "flux2"])
def test_what_stands_before_a_layers_name(tmp_path, before, make_model):
    model = make_model()
    made = make(model, [*adaptable_layers(model)][:6], files.dotted(before), peft_with_alpha, files.lora_delta)
    assert_means(load_quietly(model, made.save(tmp_path / "a.safetensors")), made.deltas)


def test_a_checkpoints_name_behind_the_checkpoints_prefix(tmp_path):
    model = bases.flux_transformer(guidance_embeds=True)
    made = add(Made(), model, FLUX, files.dotted("model.diffusion_model."), files.kohya)
    assert_means(load_quietly(model, made.save(tmp_path / "a.safetensors")), made.deltas)


# Each writer's file.


def test_onetrainers_comfyui_form_of_flux_with_both_text_encoders(tmp_path):
    pipe = with_t5(bases.flux(), "text_encoder_2", 32)
    made = add(Made(), pipe.transformer, FLUX, files.dotted("diffusion_model."), peft_with_alpha)
    clip = files.dotted("text_encoders.clip_l.transformer.")
    add(made, pipe.text_encoder, in_clip(pipe.text_encoder), clip, peft_with_alpha, behind="text_encoder.", seed=1)
    the_t5 = files.dotted("text_encoders.t5xxl.transformer.")
    add(made, pipe.text_encoder_2, in_t5(), the_t5, peft_with_alpha, behind="text_encoder_2.", seed=2)
    path = made.save(tmp_path / "a.safetensors", {"ot_revision": "1"})
    assert_means(load_quietly(pipe, path), made.deltas)
    assert read_adapter_file(path).models == ("flux",)


@pytest.mark.parametrize("spelling", ["comfyui", "kohya", "diffusers"])
def test_the_three_text_encoders_of_stable_diffusion_3(tmp_path, spelling):
    pipe = with_t5(bases.stable_diffusion_3(), "text_encoder_3", 64)
    before = {
        "comfyui": [files.dotted(f"text_encoders.{kind}.transformer.") for kind in ("clip_l", "clip_g", "t5xxl")],
        "kohya": [files.flat(f"lora_te{i}_") for i in (1, 2, 3)],
        "diffusers": [files.dotted(f"{encoder}.") for encoder in ("text_encoder", "text_encoder_2", "text_encoder_3")],
    }[spelling]
    made = add(
        Made(),
        pipe.transformer,
        {"joint_blocks.0.x_block.attn.qkv": qkv(DOUBLE)},
        files.flat("lora_unet_"),
        files.kohya,
    )
    for i, (encoder, name) in enumerate(zip(("text_encoder", "text_encoder_2", "text_encoder_3"), before)):
        model = getattr(pipe, encoder)
        groups = in_t5() if i == 2 else in_clip(model)
        add(made, model, groups, name, files.kohya, behind=f"{encoder}.", seed=i)
    assert_means(load_quietly(pipe, made.save(tmp_path / "a.safetensors")), made.deltas)


@pytest.mark.parametrize(
    "name",
    [
        files.dotted("text_encoders.t5xxl.transformer."),
        files.flat("lora_te3_"),  # sd-scripts
        files.flat("lora_te1_"),  # OneTrainer
        files.flat("lora_te_"),
    ],
    ids=["comfyui", "sd-scripts", "onetrainer", "one"],
)
def test_chromas_t5_and_its_guidance_layers(tmp_path, name):
    pipe = with_t5(bases.chroma(), "text_encoder", 32)
    flat = name("encoder.block").endswith("encoder_block")
    body = files.flat("lora_unet_") if flat else files.dotted("diffusion_model.")
    made = add(Made(), pipe.transformer, CHROMA, body, files.kohya)
    add(made, pipe.text_encoder, in_t5(), name, files.kohya, behind="text_encoder.", seed=1)
    assert_means(load_quietly(pipe, made.save(tmp_path / "a.safetensors")), made.deltas)


LANGUAGE = {
    "qwen2.5-vl": (bases.qwen_image, "model.language_model.", ("qwen25_7b",)),
    "qwen3": (bases.z_image, "", ("qwen3_4b",)),
    "qwen3 of FLUX.2 klein": (bases.flux2_klein, "model.", ("qwen3_4b", "qwen3_8b")),
}


@pytest.mark.parametrize("make_pipe, inside, kinds", LANGUAGE.values(), ids=LANGUAGE)
def test_the_language_models_that_read_texts(tmp_path, make_pipe, inside, kinds):
    pipe = make_pipe()
    before = [f"text_encoders.{kind}.transformer.{head}" for kind in kinds for head in ("model.", "")]
    before += ["text_encoder.model.", "text_encoder.", f"text_encoder.{inside}"]
    for name in (
        *map(files.dotted, before),
        files.flat("lora_te_"),
        files.flat("lora_te_model_"),
        files.flat("lora_te1_"),
    ):
        made = add(
            Made(),
            pipe.text_encoder,
            {layer: [inside + layer] for layer in LANGUAGE_LAYERS},
            name,
            files.kohya,
            behind="text_encoder.",
        )
        adapter = load_quietly(pipe, made.save(tmp_path / "a.safetensors"))
        assert_means(adapter, made.deltas)
        adapter.eject()


@pytest.mark.parametrize("kind", ["clip_l", "clip_h"])
def test_a_lone_clip_by_what_it_is(tmp_path, kind):
    pipe = files.fresh("sd")
    name = files.dotted(f"text_encoders.{kind}.transformer.")
    made = add(Made(), pipe.text_encoder, in_clip(pipe.text_encoder), name, peft_with_alpha, behind="text_encoder.")
    assert_means(load_quietly(pipe, made.save(tmp_path / "a.safetensors")), made.deltas)


def test_a_file_of_a_text_encoder_alone_is_not_led_to_another(tmp_path):
    """SDXL's second CLIP in a base that has the first alone."""
    pipe = files.fresh("sd")
    name = files.dotted("text_encoders.clip_g.transformer.")
    made = add(Made(), pipe.text_encoder, in_clip(pipe.text_encoder), name, peft_with_alpha)
    with pytest.raises(AdapterMismatchError, match=r"text_encoder_2\.text_model.*clip_g.*not in this model"):
        load_adapter(pipe, made.save(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("make_model", [bases.flux_transformer, bases.chroma_transformer], ids=["flux", "chroma"])
def test_xlabs_numbers_the_image_one_and_the_text_two(tmp_path, make_model):
    model = make_model()
    made = Made()
    add(made, model, XLABS, str, lambda v: {"down.weight": v.A, "up.weight": v.B}, s=1.0)
    assert "double_blocks.0.processor.qkv_lora1.down.weight" in made.tensors
    path = made.save(tmp_path / "a.safetensors")
    assert_means(load_quietly(model, path), made.deltas)
    file = read_adapter_file(path)
    assert "flux" in file.models and file.dialect == "XLabs"


def test_xlabs_file_means_what_diffusers_makes_of_it(tmp_path):
    pipe, stock = bases.flux(), bases.flux()
    made = add(Made(), pipe.transformer, XLABS, str, lambda v: {"down.weight": v.A, "up.weight": v.B}, s=1.0)
    path = made.save(tmp_path / "a.safetensors")
    stock.load_lora_weights(str(path))
    stock.fuse_lora()
    stock.unload_lora_weights()
    for layer, update in load_quietly(pipe, path).updates().items():
        change = stock.transformer.get_submodule(layer).weight - update.frozen.dense_weight()
        assert relative_error(change, update.delta_weight()) < 1e-4, layer


def control_adapter(model: nn.Module) -> Made:
    """As BFL names its control adapters, which have one layer more inputs than FLUX.1 has."""
    left = ("guidance_in", "final_layer")  # the small model's last layer is as wide as its first
    groups = {name: paths for name, paths in FLUX.items() if not name.startswith(left)}
    return add(Made(), model, groups, str, files.peft, s=1.0)


def test_bfls_control_adapter_in_a_base_that_takes_a_second_picture(tmp_path):
    model = bases.flux_transformer(in_channels=8)
    made = control_adapter(model)
    assert_means(load_quietly(model, made.save(tmp_path / "a.safetensors")), made.deltas)


def test_bfls_control_adapter_says_what_a_plain_base_lacks(tmp_path):
    made = control_adapter(bases.flux_transformer(in_channels=8))
    path = made.save(tmp_path / "a.safetensors")
    plain = bases.flux_transformer()
    with pytest.raises(
        AdapterMismatchError, match=r"x_embedder \(img_in\): .*has 8 inputs there, not 4.*FluxControlPipeline"
    ):
        load_adapter(plain, path)
    with pytest.warns(UserWarning, match="loaded in part"):
        adapter = load_adapter(plain, path, partial=True)
    assert adapter.layers.keys() == made.deltas.keys() - {"x_embedder"}


@pytest.mark.parametrize("flat", [False, True])
def test_fused_projections_as_diffusers_names_them(tmp_path, flat):
    fused = {f"{DOUBLE}.attn.to_qkv": qkv(DOUBLE), f"{DOUBLE}.attn.to_added_qkv": added_qkv(DOUBLE)}
    cases = [(bases.flux_transformer(), fused), (bases.sd3_transformer(), fused), (bases.flux2_transformer(), fused)]
    cases += [
        (bases.qwen_transformer(), fused),
        (bases.flux_transformer(), {"single_blocks.0.linear1_qkv": qkv(SINGLE)}),
    ]
    cases += [
        (
            bases.z_image_transformer(),
            {"layers.0.attention.to_qkv": attention("layers.0.attention", "to_q", "to_k", "to_v")},
        )
    ]
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    unet = {
        f"{block}.attn1.to_qkv": attention(f"{block}.attn1", "to_q", "to_k", "to_v"),
        f"{block}.attn2.to_kv": attention(f"{block}.attn2", "to_k", "to_v"),
    }
    cases += [(bases.unet(), unet)]
    for model, groups in cases:
        kind = "unet" if groups is unet else "transformer"
        name = files.flat(f"lora_{kind}_") if flat else files.dotted(f"{kind}.")
        for leaves, delta in ((files.kohya, files.lora_delta), (files.kohya_dora, files.dora_delta)):
            made = add(Made(), model, groups, name, leaves, delta=delta)
            adapter = load_quietly(model, made.save(tmp_path / "a.safetensors"))
            assert_means(adapter, made.deltas)
            adapter.eject()


def test_a_model_that_has_its_projections_fused_takes_them_whole(tmp_path):
    model = bases.unet()
    model.fuse_qkv_projections()
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_qkv"
    made = make(model, [path], files.dotted("unet."), files.peft, files.lora_delta, s=1.0)
    assert_means(load_quietly(model, made.save(tmp_path / "a.safetensors")), made.deltas)


def test_a_layer_that_a_fused_model_does_not_compute_with_is_not_loaded_in_silence(tmp_path):
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    paths = [f"{block}.attn1.to_q", f"{block}.attn2.to_k", f"{block}.attn2.to_q", f"{block}.attn1.to_out.0"]
    path = make(bases.unet(), paths, files.dotted("unet."), files.peft, files.lora_delta, s=1.0).save(
        tmp_path / "a.safetensors"
    )
    model = bases.unet()
    model.fuse_qkv_projections()
    with pytest.raises(AdapterMismatchError, match=r"2 of 4 layers match.*(?s:.)*attn1.to_q: .*unfuse_qkv_projections"):
        load_adapter(model, path)
    model.unfuse_qkv_projections()
    assert len(load_quietly(model, path).layers) == 4


def test_flux_with_fused_projections_is_asked_to_unfuse_them(tmp_path):
    model = bases.flux_transformer()
    made = make(model, qkv(DOUBLE), files.dotted("transformer."), files.peft, files.lora_delta, s=1.0)
    path = made.save(tmp_path / "a.safetensors")
    model.fuse_qkv_projections()
    with pytest.raises(AdapterMismatchError, match=r"0 of 3 layers match.*(?s:.)*attn.to_q: .*unfuse_qkv_projections"):
        load_adapter(model, path)
    model.unfuse_qkv_projections()
    assert_means(load_quietly(model, path), made.deltas)


def test_blocks_that_lost_the_first_letters_of_their_name(tmp_path):
    model = bases.flux2_transformer()
    made = add(Made(), model, alone(model), files.dotted("diffusion_model."), files.peft, s=1.0)
    made.tensors = {
        key.replace("diffusion_model.transformer_blocks.", "diffusion_model.sformer_blocks."): tensor
        for key, tensor in made.tensors.items()
    }
    path = made.save(tmp_path / "a.safetensors")
    assert_means(load_quietly(model, path), made.deltas)
    assert read_adapter_file(path).models == ("flux2",)


@pytest.mark.parametrize("make_model", [bases.qwen_transformer, bases.z_image_transformer], ids=["qwen", "z-image"])
@pytest.mark.parametrize(
    "leaves, delta", [(files.kohya, files.lora_delta), (files.kohya_input_axis, files.input_axis_delta)]
)
def test_onetrainers_dotted_names_of_every_layer(tmp_path, make_model, leaves, delta):
    model = make_model()
    made = add(Made(), model, alone(model), files.dotted("transformer."), leaves, delta=delta)
    path = made.save(tmp_path / "a.safetensors", {"ot_revision": "1"})
    assert_means(load_quietly(model, path), made.deltas)


# diffusers' advanced DreamBooth script.


def test_the_advanced_scripts_kohya_file_keeps_its_magnitudes(tmp_path):
    """`convert_state_dict_to_kohya` keeps the last two dots of a key, and a magnitude's ends in one word."""
    model = bases.unet()
    model.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=["to_k", "to_out.0"], use_dora=True, init_lora_weights=False)
    )
    state = {f"unet.{key}": tensor for key, tensor in get_peft_model_state_dict(model).items()}
    kohya = convert_state_dict_to_kohya(copy.copy(state))
    assert any(
        ".attn1.to_k.lora_magnitude_vector" in key or "_attn1.to_k.lora_magnitude_vector" in key for key in kohya
    )
    save_file({key: tensor.contiguous() for key, tensor in kohya.items()}, tmp_path / "kohya.safetensors")
    save_file(state, tmp_path / "peft.safetensors")
    ours, theirs = (load_quietly(bases.unet(), tmp_path / f"{name}.safetensors") for name in ("kohya", "peft"))
    assert ours.config.kind == "dora" and ours.layers.keys() == theirs.layers.keys()
    for path, update in theirs.updates().items():
        assert relative_error(ours.updates()[path].delta_weight(), update.delta_weight()) < 1e-6, path


# 8-bit floats.


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_eight_bit_floats_are_read_as_they_are(tmp_path, dtype):
    model = bases.unet()
    paths = [*adaptable_layers(model)][:8]
    generator, made = torch.Generator().manual_seed(0), Made()
    for path in paths:
        v = files.values_of(model.get_submodule(path).weight, generator)
        rounded = files.Values(v.W0, v.A.to(dtype).float(), v.B.to(dtype).float(), v.by_output, v.by_input, v.s)
        name = files.flat("lora_unet_")(path)
        made.tensors |= {f"{name}.lora_down.weight": v.A.to(dtype), f"{name}.lora_up.weight": v.B.to(dtype)}
        made.tensors[f"{name}.alpha"] = torch.tensor(files.ALPHA, dtype=torch.float16)
        made.deltas[path] = files.lora_delta(rounded)
    path = made.save(tmp_path / "a.safetensors")
    assert_means(load_quietly(model, path), made.deltas)
    assert any("8-bit floats" in note for note in read_adapter_file(path).notes)


@pytest.mark.parametrize("ending", ["scale_weight", "weight_scale"])
def test_scales_beside_eight_bit_floats_are_multiplied_in(tmp_path, ending):
    model, path = bases.unet(), "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    v = files.values_of(model.get_submodule(path).weight, torch.Generator().manual_seed(0))
    eight = {"lora_down": (v.A * 64).to(torch.float8_e4m3fn), "lora_up": (v.B * 64).to(torch.float8_e4m3fn)}
    tensors = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    for part, tensor in eight.items():
        tensors[f"unet.{path}.{part}.weight"] = tensor
        tensors[f"unet.{path}.{part}.{ending}"] = torch.tensor(1 / 64)
    save_file(tensors, tmp_path / "a.safetensors")
    B, A = (eight[part].double() / 64 for part in ("lora_up", "lora_down"))
    assert_means(load_quietly(model, tmp_path / "a.safetensors"), {path: B @ A})
    tensors[f"unet.{path}.lora_up.{ending}"] = torch.ones(2)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(AdapterFileError, match=rf"scaled to 8 bits.*lora_up\.{ending} \[2\]"):
        load_adapter(model, tmp_path / "a.safetensors")
