"""A file that is sound and of a kind that is not read is called what it is, never damaged."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import bases
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dora_diffusion.errors import AdapterFileError, AdapterMismatchError
from dora_diffusion.formats.files import load_adapter, read_adapter_file
from dora_diffusion.formats.kinds import advice
from dora_diffusion.formats.leaves import _FOREIGN

Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DAMAGED = ("damaged", "download it again", "download or", "save it again")


def ones(*shapes: tuple[int, ...], keys: tuple[str, ...]) -> dict[str, Tensor]:
    return {key: torch.ones(shape) for key, shape in zip(keys, shapes)}


LORA = ones((4, 32), (32, 4), keys=(f"{Q}.lora_down.weight", f"{Q}.lora_up.weight"))
# One module as each program writes it, and what it is called.
FILES = {
    "T-LoRA": (
        {f"lycoris_conv_in.{p}": torch.ones(4) for p in ("q_layer.weight", "p_layer.weight", "lambda_layer")},
        "LyCORIS T-LoRA",
    ),
    "3-D convolutions": (
        ones(
            (4, 8, 3, 3, 3),
            (8, 4, 1, 1, 1),
            keys=("diffusion_model.x.lora_down.weight", "diffusion_model.x.lora_up.weight"),
        ),
        "as models for sound and video have them",
    ),
    "PEFT's OFT": ({"base_model.model.x.oft_R.weight": torch.ones(4, 6)}, "PEFT's OFT"),
    "PEFT's VeRA": ({"base_model.model.x.vera_lambda_b": torch.ones(4)}, "PEFT's VeRA"),
    "nunchaku": (
        ones((4, 8), (8, 4), keys=("transformer_blocks.0.qkv_proj.lora_down", "transformer_blocks.0.qkv_proj.lora_up")),
        "a LoRA as nunchaku keeps it",
    ),
}


@pytest.mark.parametrize("tensors, said", FILES.values(), ids=FILES)
@pytest.mark.parametrize("beside_a_lora", [False, True])
def test_a_sound_file_of_another_kind_is_called_what_it_is(tmp_path: Path, tensors, said, beside_a_lora) -> None:
    path = tmp_path / "a.safetensors"
    save_file({**tensors, **(LORA if beside_a_lora else {})}, path)
    with pytest.raises(AdapterFileError) as raised:
        load_adapter(bases.unet(), path)
    message = str(raised.value)
    assert str(path) in message and f"{said}" in message and "which is not read here" in message
    assert not any(word in message for word in DAMAGED), message
    if beside_a_lora:
        assert "partial=True" in message
        with pytest.warns(UserWarning, match="not read here"):
            file = read_adapter_file(path, partial=True)
        assert len(file.layers) == 1 and set(file.left_out) >= set(tensors)


WEIGHT = torch.ones(4, 4)
# Of each kind a key or two as its writer has them; what it is called, whose it is, and a word of the way out.
NO_ADAPTERS = {
    "IP-Adapter": (("image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"), "an IP-Adapter", "load_ip_adapter"),
    "IP-Adapter FaceID": (
        ("image_proj.proj.0.weight", "ip_adapter.0.to_q_lora.down.weight", "ip_adapter.0.to_q_lora.up.weight"),
        "an IP-Adapter",
        "load_ip_adapter",
    ),
    "XLabs IP-Adapter": (
        ("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight", "ip_adapter_proj_model.proj.weight"),
        "an IP-Adapter",
        "load_ip_adapter",
    ),
    "Control-LoRA": (
        ("lora_controlnet", "input_blocks.1.1.proj_in.down", "input_blocks.1.1.proj_in.up"),
        "a Control-LoRA, as Stability AI",
        "as a ControlNet in ComfyUI",
    ),
    "LLLite": (("lllite_unet_input_blocks_4_1_attn1_to_q.down.0.weight",), "a ControlNet-LLLite", "sd-scripts"),
    "ControlNet": (("control_model.input_hint_block.0.weight",), "a ControlNet", "ControlNetModel"),
    "diffusers ControlNet": (
        ("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"),
        "a ControlNet",
        "ControlNetModel",
    ),
    "FLUX ControlNet": (
        ("controlnet_blocks.0.weight", "double_blocks.0.img_attn.qkv.weight"),
        "a ControlNet",
        "diffusers",
    ),
    "T2I-Adapter": (("adapter.body.0.resnets.0.block1.weight",), "a T2I-Adapter, as TencentARC", "T2IAdapter"),
    "old T2I-Adapter": (("body.0.block1.weight", "conv_in.weight"), "a T2I-Adapter, as TencentARC", "T2IAdapter"),
    "motion module": (
        ("down_blocks.0.motion_modules.0.temporal_transformer.norm.weight",),
        "a motion module, as AnimateDiff",
        "AnimateDiffPipeline",
    ),
    "hypernetwork": (("768.0.linear.0.weight", "768.1.linear.0.weight"), "a hypernetwork, as A1111", "ComfyUI"),
    "embedding": (("emb_params",), "an embedding (textual inversion)", "load_textual_inversion"),
    "A1111's embedding": (("string_to_param.*",), "an embedding (textual inversion)", "load_textual_inversion"),
    "SDXL's embedding": (("clip_l", "clip_g"), "an embedding (textual inversion)", "load_textual_inversion"),
    "diffusers' embedding": (("<cat-toy>",), "an embedding (textual inversion)", "load_textual_inversion"),
    "OneTrainer's embedding": (("bundle_emb.my_token.clip_l",), "an embedding (textual inversion)", "load_textual"),
    "nunchaku's base": (("transformer_blocks.0.qkv_proj.qweight",), "a base that nunchaku packed", "nunchaku"),
    "checkpoint": (
        ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight"),
        "a whole checkpoint",
        "--base FILE",
    ),
    "FLUX": (
        ("double_blocks.0.img_attn.qkv.weight", "img_in.weight"),
        "the denoiser of a model, whole",
        "inspect FILE",
    ),
    "ComfyUI's FLUX": (("diffusion_model.double_blocks.0.img_attn.qkv.weight",), "the denoiser of a model", "inspect"),
    "diffusers' UNet": (
        ("down_blocks.0.resnets.0.conv1.weight", "conv_in.weight"),
        "the denoiser of a model",
        "inspect",
    ),
    "Z-Image": (("layers.0.attention.qkv.weight", "cap_embedder.1.weight"), "the denoiser of a model", "inspect FILE"),
    "VAE": (("encoder.down_blocks.0.resnets.0.conv1.weight", "quant_conv.weight"), "an autoencoder", "AutoencoderKL"),
    "old VAE": (("first_stage_model.encoder.conv_in.weight",), "an autoencoder", "AutoencoderKL"),
    "CLIP": (("text_model.encoder.layers.0.mlp.fc1.weight",), "a text encoder, whole", "pipe.text_encoder"),
    "T5": (
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "shared.weight"),
        "a text encoder, whole",
        "text_encoder",
    ),
    "Qwen": (("model.layers.0.self_attn.q_proj.weight",), "a text encoder, whole", "pipe.text_encoder"),
    "CLIP vision": (("vision_model.encoder.layers.0.mlp.fc1.weight",), "an image encoder", "IP-Adapter"),
    "upscaler": (("model.1.sub.0.RDB1.conv1.0.weight",), "an upscaler, as ESRGAN", "ComfyUI"),
}


@pytest.mark.parametrize("keys, what, way", NO_ADAPTERS.values(), ids=NO_ADAPTERS)
def test_a_file_that_is_no_adapter_is_called_what_it_is_with_its_writer_and_the_way_out(tmp_path, keys, what, way):
    path = tmp_path / "a.safetensors"
    save_file({key: WEIGHT.clone() for key in keys}, path)
    for read in (lambda: read_adapter_file(path), lambda: read_adapter_file(path, partial=True)):
        with pytest.raises(AdapterFileError) as raised:
            read()
        message = str(raised.value)
        assert f"{path} is {what}" in message and " writes it. " in message and way in message, message
        assert not any(word in message for word in DAMAGED), message


def test_every_method_that_is_not_read_has_a_way_out() -> None:
    """Changes of biases and of normalisation are methods of their own."""
    methods = {kind for kind in _FOREIGN.values() if not kind.startswith(("a change of", "a trained bias"))}
    assert {kind for kind in methods if not advice(kind)} == set()


# A layer of each as its trainers name it, and what the adapter is said to be for.
OTHER_MODELS = {
    "Wan (ComfyUI)": ("diffusion_model.blocks.0.self_attn.q", "Wan, a model for video"),
    "Wan (musubi-tuner)": ("lora_unet_blocks_0_cross_attn_k", "Wan, a model for video"),
    "Wan (diffusers)": ("transformer.blocks.0.attn1.to_q", "Wan, a model for video"),
    "Wan Fun": ("lora_unet__blocks_0_cross_attn_k", "Wan, a model for video"),
    "HunyuanVideo": ("transformer.double_blocks.0.img_attn_qkv", "HunyuanVideo, a model for video"),
    "LTX-Video": ("transformer.transformer_blocks.0.attn1.to_q", "LTX-Video"),
    "LTX-2": ("diffusion_model.transformer_blocks.0.audio_attn1.to_q", "LTX-2, a model for video and sound"),
    "Mochi": ("blocks.0.attn.qkv_x", "Mochi, a model for video"),
    "AnimateDiff": ("unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q", "AnimateDiff"),
    "ACE-Step": ("diffusion_model.transformer_blocks.0.cross_attn.to_q", "ACE-Step, a model for music"),
    "HiDream": ("diffusion_model.double_stream_blocks.0.block.attn1.to_q", "HiDream"),
    "AuraFlow": ("transformer.joint_transformer_blocks.0.attn.to_q", "AuraFlow"),
    "Stable Cascade": ("lora_prior_unet_down_blocks_0_0_attention_attn_to_q", "Stable Cascade"),
    "Anima": ("diffusion_model.blocks.0.self_attn.q_proj", "Cosmos or Anima"),
}


@pytest.mark.parametrize("module, said", OTHER_MODELS.values(), ids=OTHER_MODELS)
@pytest.mark.parametrize("make_model", [bases.unet, bases.flux2_transformer, bases.z_image_transformer])
def test_an_adapter_of_a_model_that_is_no_base_here_says_which_and_where_it_goes(tmp_path, module, said, make_model):
    path = tmp_path / "a.safetensors"
    save_file({f"{module}.lora_down.weight": torch.ones(4, 8), f"{module}.lora_up.weight": torch.ones(8, 4)}, path)
    with pytest.raises(AdapterMismatchError, match=rf"is an adapter for {said}.*Load it with .*(diffusers|ComfyUI)"):
        load_adapter(make_model(), path)


@pytest.mark.parametrize(
    "module, family",
    [
        ("lora_unet_double_blocks_0_img_mod_lin", "FLUX.1"),
        ("lora_unet_joint_blocks_0_x_block_attn_proj", "Stable Diffusion 3"),
        ("transformer.transformer_blocks.0.img_mod.1", "Qwen-Image"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in", "Stable Diffusion 1, 2 or XL"),
    ],
)
def test_an_adapter_of_another_family_is_told_by_its_names(tmp_path, module, family):
    path = tmp_path / "a.safetensors"
    save_file({f"{module}.lora_down.weight": torch.ones(4, 8), f"{module}.lora_up.weight": torch.ones(8, 4)}, path)
    with pytest.raises(AdapterMismatchError, match=f"its names are those of {family}; this base is"):
        load_adapter(bases.z_image_transformer(), path)


def zipped(names: list[str]) -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return memory.getvalue()


CONTENT = {
    "zip": (zipped(["style.safetensors", "readme.txt"]), "is a zip archive. It holds style.safetensors. Unpack it"),
    "zip of pictures": (zipped(["1.png"]), "is a zip archive. Unpack it"),
    "torch.save": (zipped(["archive/data.pkl", "archive/data/0"]), "is a pickle"),
    "half a zip": (zipped(["style.safetensors"])[:40], "which is cut short"),
    "GGUF": (b"GGUF\x03\0\0\0" + bytes(100), "is a GGUF file"),
    "page": (b"<!DOCTYPE html><html><body>Log in</body></html>", "is a web page"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer"),
    "answer": (b'{"error": "not found", "status": 404}', "is a JSON text"),
    "gzip": (b"\x1f\x8b" + bytes(50), "is a gzip archive"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(50), "is a picture"),
}


@pytest.mark.parametrize("content, said", CONTENT.values(), ids=CONTENT)
def test_what_is_no_safetensors_is_named_by_how_it_begins(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(AdapterFileError) as raised:
        read_adapter_file(path)
    assert said in str(raised.value) and str(path) in str(raised.value)
