"""Bases from a single checkpoint file, in the layout that Stable Diffusion was published in."""

from __future__ import annotations

import re
from pathlib import Path

import bases
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from dora_diffusion.errors import BaseModelError
from dora_diffusion.formats.original import unet_original
from dora_diffusion.models.loading import load_base

CONFIGS = "stable-diffusion-v1-5/stable-diffusion-v1-5"  # where diffusers takes the configuration of such a file from


def unet_key(key: str) -> str:
    layer, _, leaf = key.rpartition(".")
    layer = re.sub(r"(resnets\.\d+\.)norm1$", r"\1in_layers.0", layer)
    layer = re.sub(r"(resnets\.\d+\.)norm2$", r"\1out_layers.0", layer)
    named = {"conv_norm_out": "out.0"}.get(layer) or unet_original(layer, 1, (0,)) or layer
    return f"model.diffusion_model.{named}.{leaf}"


def vae_key(key: str) -> str:
    blocks = 2
    changes = [
        (r"down_blocks\.(\d+)\.resnets", r"down.\1.block"),
        (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
        (r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{blocks - 1 - int(found[1])}.block"),
        (r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{blocks - 1 - int(found[1])}.upsample"),
        (r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}"),
        (r"mid_block\.attentions\.0", "mid.attn_1"),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
        ("group_norm", "norm"),
        (r"to_([qkv])\.", r"\1."),
        (r"to_out\.0", "proj_out"),
    ]
    for pattern, new in changes:
        key = re.sub(pattern, new, key)
    return f"first_stage_model.{key}"


def text_key(key: str) -> str:
    return "cond_stage_model.transformer.text_model." + key.removeprefix("text_model.")


def checkpoint(pipe: DiffusionPipeline, path: Path) -> Path:
    tensors: dict[str, Tensor] = {}
    for part, name in ((pipe.unet, unet_key), (pipe.vae, vae_key), (pipe.text_encoder, text_key)):
        for key, tensor in part.state_dict().items():
            assert name(key) not in tensors, key
            tensors[name(key)] = tensor.clone()
    save_file(tensors, path)
    return path


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small model's configuration in the hub's cache, under the name that diffusers asks for."""
    cache = tmp_path / "cache"
    folder = cache / f"models--{CONFIGS.replace('/', '--')}"
    bases.stable_diffusion().save_pretrained(folder / "snapshots" / "0")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0")
    for weights in (folder / "snapshots").rglob("*.safetensors"):
        weights.unlink()
    for module in ("diffusers.loaders.single_file", "diffusers.utils.constants", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(cache), raising=False)


def test_a_checkpoint_of_stable_diffusion_is_the_pipeline_it_was_made_from(tmp_path: Path, configs: None) -> None:
    pipe = bases.stable_diffusion()
    with torch.no_grad():
        for part in (pipe.unet, pipe.vae, pipe.text_encoder):
            for parameter in part.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    base = load_base(str(checkpoint(pipe, tmp_path / "model.safetensors")), device="cpu")
    for name in ("unet", "vae", "text_encoder"):
        expected, found = (getattr(p, name).state_dict() for p in (pipe, base.pipe))
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key].reshape(tensor.shape), tensor), key
    assert isinstance(base.denoiser, nn.Module) and base.family.name == "Stable Diffusion 1 and 2"


def test_files_that_are_no_checkpoint_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "file.safetensors"
    for key, message in (
        ("unet.down_blocks.0.lora_A.weight", "is an adapter, no base"),
        ("double_blocks.0.img_attn.qkv.weight", "no whole checkpoint of Stable Diffusion 1, 2 or XL"),
    ):
        save_file({key: torch.zeros(1)}, path)
        with pytest.raises(BaseModelError, match=message):
            load_base(str(path), device="cpu")
    path.write_bytes(b"no safetensors")
    with pytest.raises(BaseModelError, match="cannot load the base"):
        load_base(str(path), device="cpu")
