"""What is timed: real architectures with random weights, and single layers of the shapes found in them.

The models are built from the configurations their authors published; only the numbers in the weights are random.
A case gives the model, its inputs and the ends of the names of the layers to adapt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["LAYER_CASES", "STEP_CASES", "Case", "Inputs"]

Inputs = Mapping[str, object]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
JOINT_ATTENTION = (*ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

# huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5, unet/config.json. 859,520,964 parameters.
SD15: dict[str, object] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
# The first two levels of SD 1.5's UNet, one layer each, for --quick.
SD15_SLICE: dict[str, object] = {
    **SD15,
    "layers_per_block": 1,
    "block_out_channels": (320, 640),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
# For the tool's own tests.
TINY: dict[str, object] = {
    **SD15_SLICE,
    "block_out_channels": (32, 64),
    "cross_attention_dim": 48,
    "norm_num_groups": 8,
}
# huggingface.co/stabilityai/stable-diffusion-xl-base-1.0, unet/config.json. 2,567,463,684 parameters.
SDXL: dict[str, object] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 2,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# huggingface.co/black-forest-labs/FLUX.1-dev, transformer/config.json, with fewer blocks: there are 19 and 38 of them.
FLUX: dict[str, object] = {
    "patch_size": 1,
    "in_channels": 64,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
    "axes_dims_rope": (16, 56, 56),
}


@dataclass(frozen=True)
class Case:
    """One thing to time. `differentiable` names the inputs through which the frozen base's own backward pass runs."""

    name: str
    about: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    targets: tuple[str, ...]
    differentiable: tuple[str, ...]

    @property
    def model(self) -> str:
        """The name without its size: "sd15" of "sd15-32"."""
        return self.name.rpartition("-")[0] or self.name


def _unet(config: Mapping[str, object]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**config)


def _unet_inputs(config: Mapping[str, object], size: int) -> Inputs:
    inputs: dict[str, object] = {
        "sample": torch.randn(1, 4, size, size),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 77, int(config["cross_attention_dim"])),  # type: ignore[call-overload]
        "return_dict": False,
    }
    if config.get("addition_embed_type") == "text_time":
        pixels = 8.0 * size
        inputs["added_cond_kwargs"] = {
            "text_embeds": torch.randn(1, 1280),
            "time_ids": torch.tensor([[pixels, pixels, 0.0, 0.0, pixels, pixels]]),
        }
    return inputs


def _unet_case(name: str, about: str, config: Mapping[str, object], size: int) -> Case:
    return Case(
        name,
        f"{about}, {size}x{size} latents",
        lambda: _unet(config),
        lambda: _unet_inputs(config, size),
        ATTENTION,
        ("sample", "encoder_hidden_states"),
    )


def _flux(double: int, single: int) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(**FLUX, num_layers=double, num_single_layers=single)


def _flux_inputs(tokens: int) -> Inputs:
    side = math.isqrt(tokens)
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    positions = torch.stack([torch.zeros(side, side), rows, columns], dim=-1).reshape(tokens, 3)
    return {
        "hidden_states": torch.randn(1, tokens, 64),
        "encoder_hidden_states": torch.randn(1, 512, 4096),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": positions,
        "txt_ids": torch.zeros(512, 3),
        "return_dict": False,
    }


def _flux_case(tokens: int, double: int, single: int) -> Case:
    return Case(
        f"flux-{tokens}",
        f"FLUX.1's blocks, {double} double and {single} single, {tokens} picture and 512 text tokens",
        lambda: _flux(double, single),
        lambda: _flux_inputs(tokens),
        JOINT_ATTENTION,
        ("hidden_states", "encoder_hidden_states"),
    )


STEP_CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _unet_case("sd15-32", "SD 1.5's UNet", SD15, 32),
        _unet_case("sd15-64", "SD 1.5's UNet", SD15, 64),
        _unet_case("sdxl-32", "SDXL's UNet", SDXL, 32),
        _unet_case("sdxl-64", "SDXL's UNet", SDXL, 64),
        _unet_case("sdxl-128", "SDXL's UNet", SDXL, 128),
        _flux_case(256, 1, 2),
        _flux_case(4096, 2, 4),
        _unet_case("sd15slice-32", "two levels of SD 1.5's UNet", SD15_SLICE, 32),
        _unet_case("tiny-8", "a UNet for tests", TINY, 8),
    )
}


class OneLayer(nn.Module):
    """A model that is one layer, so that every library finds it by name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.layer(x),)


def _linear_case(name: str, about: str, tokens: int, inputs: int, outputs: int) -> Case:
    return Case(
        name,
        f"{about}: {tokens} tokens, {inputs} to {outputs}",
        lambda: OneLayer(nn.Linear(inputs, outputs)),
        lambda: {"x": torch.randn(1, tokens, inputs)},
        ("layer",),
        ("x",),
    )


def _conv_case(name: str, about: str, size: int, channels: int) -> Case:
    return Case(
        name,
        f"{about}: {size}x{size}, {channels} channels",
        lambda: OneLayer(nn.Conv2d(channels, channels, 3, padding=1)),
        lambda: {"x": torch.randn(1, channels, size, size)},
        ("layer",),
        ("x",),
    )


LAYER_CASES: dict[str, Case] = {
    case.name: case
    for case in (
        _linear_case("sd15-4096x320", "SD 1.5, first level at 64x64", 4096, 320, 320),
        _linear_case("sd15-1024x640", "SD 1.5, second level at 64x64", 1024, 640, 640),
        _linear_case("sd15-256x1280", "SD 1.5, third level at 64x64", 256, 1280, 1280),
        _linear_case("sd15-77x768", "SD 1.5, keys of the text", 77, 768, 320),
        _linear_case("sdxl-1024x1280", "SDXL at 1024 px", 1024, 1280, 1280),
        _linear_case("flux-4608x3072", "FLUX at 1024 px", 4608, 3072, 3072),
        _linear_case("flux-4608x12288", "FLUX's MLP at 1024 px", 4608, 3072, 12288),
        _conv_case("conv-64x320", "SD 1.5, a 3x3 convolution", 64, 320),
        _linear_case("tiny-16x32", "a layer for tests", 16, 32, 48),
    )
}
