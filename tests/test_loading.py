"""Bases from a single checkpoint file, in the layout that Stable Diffusion was published in."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import bases
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor, nn

from dora_diffusion.errors import BaseModelError
from dora_diffusion.formats.unet_names import unet_original
from dora_diffusion.models.loading import load_base
from dora_diffusion.training.objectives import DiffusionObjective, objective_of

# Where diffusers takes the configuration of such a file from.
CONFIGS = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0")
Keys = dict[str, Tensor]


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


def clip_keys(model: nn.Module, prefix: str) -> Keys:
    return {f"{prefix}text_model.{key.removeprefix('text_model.')}": t for key, t in model.state_dict().items()}


def open_clip_keys(model: nn.Module, prefix: str) -> Keys:
    """OpenCLIP's names; q, k and v are one matrix there."""
    weights = {key.removeprefix("text_model."): tensor for key, tensor in model.state_dict().items()}
    outside = {
        "embeddings.token_embedding.weight": "token_embedding.weight",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm.weight": "ln_final.weight",
        "final_layer_norm.bias": "ln_final.bias",
    }
    inside = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    inside["self_attn.out_proj"] = "attn.out_proj"
    found = {prefix + theirs: weights[ours] for ours, theirs in outside.items()}
    found[prefix + "text_projection"] = weights["text_projection.weight"].T.contiguous()
    for layer in range(model.config.num_hidden_layers):
        start, end = f"encoder.layers.{layer}.", f"{prefix}transformer.resblocks.{layer}."
        for leaf in ("weight", "bias"):
            found |= {f"{end}{theirs}.{leaf}": weights[f"{start}{ours}.{leaf}"] for ours, theirs in inside.items()}
            qkv = [weights[f"{start}self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            found[f"{end}attn.in_proj_{leaf}"] = torch.cat(qkv)
    return found


def checkpoint(pipe: DiffusionPipeline, path: Path, marks: tuple[str, ...] = ()) -> Path:
    tensors = {unet_key(key): tensor for key, tensor in pipe.unet.state_dict().items()}
    tensors |= {vae_key(key): tensor for key, tensor in pipe.vae.state_dict().items()}
    assert len(tensors) == len(pipe.unet.state_dict()) + len(pipe.vae.state_dict())
    if hasattr(pipe, "text_encoder_2"):
        tensors |= clip_keys(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        tensors |= open_clip_keys(pipe.text_encoder_2, "conditioner.embedders.1.model.")
    else:
        tensors |= clip_keys(pipe.text_encoder, "cond_stage_model.transformer.")
    tensors |= {mark: torch.zeros(0) for mark in marks}
    save_file({key: tensor.clone() for key, tensor in tensors.items()}, path)
    return path


def stable_diffusion_xl() -> DiffusionPipeline:
    """As diffusers knows an SDXL: the second text encoder has at least ten layers, and another width than the first."""
    pipe = bases.stable_diffusion_xl()
    values = {**pipe.text_encoder_2.config.to_dict(), "num_hidden_layers": 10, "hidden_size": 64}
    pipe.register_modules(
        text_encoder_2=type(pipe.text_encoder_2)(type(pipe.text_encoder_2.config)(**values)).eval(),
        unet=type(pipe.unet).from_config(pipe.unet.config, cross_attention_dim=32 + 64),
    )
    return pipe


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The small models' configurations in the hub's cache, under the names that diffusers asks for."""
    cache = tmp_path / "cache"
    for name, make in zip(CONFIGS, (bases.stable_diffusion, stable_diffusion_xl), strict=True):
        folder = cache / f"models--{name.replace('/', '--')}"
        make().save_pretrained(folder / "snapshots" / "0")
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0")
    for weights in cache.rglob("*.safetensors"):
        weights.unlink()
    for module in ("diffusers.loaders.single_file", "diffusers.utils.constants", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_CACHE", str(cache), raising=False)


@pytest.mark.parametrize("make", [bases.stable_diffusion, stable_diffusion_xl])
def test_a_checkpoint_is_the_pipeline_it_was_made_from(
    make: Callable[[], DiffusionPipeline], tmp_path: Path, configs: None
) -> None:
    pipe = make()
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    with torch.no_grad():
        for parameter in (p for part in parts.values() for p in part.parameters()):
            parameter.add_(0.01 * torch.randn_like(parameter))
    base = load_base(str(checkpoint(pipe, tmp_path / "model.safetensors")), device="cpu")
    assert type(base.pipe) is type(pipe) and len(parts) == (4 if make is stable_diffusion_xl else 3)
    for name, part in parts.items():
        expected, found = part.state_dict(), getattr(base.pipe, name).state_dict()
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert torch.equal(found[key].reshape(tensor.shape), tensor), f"{name}: {key}"


def test_an_sdxl_that_predicts_v_says_so_in_its_keys(tmp_path: Path, configs: None) -> None:
    for marks, name in (((), "epsilon"), (("v_pred",), "v_prediction"), (("v_pred", "ztsnr"), "v_prediction")):
        path = checkpoint(stable_diffusion_xl(), tmp_path / "model.safetensors", marks)
        objective = objective_of(load_base(str(path), device="cpu").pipe.scheduler)
        assert isinstance(objective, DiffusionObjective) and objective.name == name
        last = float(objective.scheduler.alphas_cumprod[-1])
        assert (last < 1e-6) == ("ztsnr" in marks)  # zero terminal signal-to-noise ratio


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
