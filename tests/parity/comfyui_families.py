"""Small models of every family that ComfyUI and diffusers both have, of the same sizes in the two."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

import bases
from diffusers import (
    ChromaTransformer2DModel,
    DiffusionPipeline,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import single_file_utils as converters
from torch import Tensor, nn

Weights = dict[str, Tensor]
# What ComfyUI calls `.weight` since 2026, and the checkpoints of FLUX and Chroma `.scale`.
SCALES = re.compile(r"^(.*\.norm\.(?:query|key)_norm|distilled_guidance_layer\.norms\.\d+)\.weight$")


def sd_unet(weights: Weights, model: nn.Module) -> Weights:
    whole = {f"model.diffusion_model.{name}": weight for name, weight in weights.items()}
    return converters.convert_ldm_unet_checkpoint(whole, model.config)


def by(convert: Callable[[Weights], Weights]) -> Callable[[Weights, nn.Module], Weights]:
    return lambda weights, _: convert({SCALES.sub(r"\1.scale", name): weight for name, weight in weights.items()})


def narrow(convert: Callable[[Weights], Weights]) -> Callable[[Weights], Weights]:
    """diffusers' converter for a model of this width: it cuts fused layers by the published one, 3072."""
    source = textwrap.dedent(inspect.getsource(convert))
    assert source.count("inner_dim = 3072") == 1
    scope: dict[str, Callable[[Weights], Weights]] = {}
    exec(source.replace("inner_dim = 3072", f"inner_dim = {WIDTH}"), vars(converters), scope)
    return scope[convert.__name__]


@dataclass(frozen=True)
class Family:
    """One architecture: ComfyUI's class and configuration, the same in diffusers, and diffusers' converter."""

    comfyui: tuple[str, dict[str, object]]
    model: Callable[[], nn.Module]
    pipeline: Callable[[], DiffusionPipeline]
    convert: Callable[[Weights, nn.Module], Weights]


UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_heads": 8,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
}
WIDTH = 256  # of FLUX.1 and Chroma, two heads of the published 128
FLUX = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "mlp_ratio": 4.0,
    "theta": 10000,
    "qkv_bias": True,
    "context_in_dim": 32,
    "depth": 1,
    "depth_single_blocks": 1,
    "hidden_size": WIDTH,
    "num_heads": 2,
    "axes_dim": [16, 56, 56],
    "txt_ids_dims": [],
    "vec_in_dim": None,
}
CROSS, PLAIN = "CrossAttn{}Block2D", "{}Block2D"


def blocks(*kinds: str) -> dict[str, tuple[str, ...]]:
    return {
        "down_block_types": tuple(kind.format("Down") for kind in kinds),
        "up_block_types": tuple(kind.format("Up") for kind in reversed(kinds)),
    }


FAMILIES = {
    "sd1": Family(
        (
            "SD15",
            {
                **UNET,
                "channel_mult": [1, 2, 2, 2],
                "num_res_blocks": [2] * 4,
                "transformer_depth": [1] * 6 + [0] * 2,
                "transformer_depth_output": [1] * 9 + [0] * 3,
                "transformer_depth_middle": 1,
                "context_dim": 48,
                "use_linear_in_transformer": False,
                "adm_in_channels": None,
            },
        ),
        lambda: UNet2DConditionModel(
            block_out_channels=(32, 64, 64, 64), cross_attention_dim=48, **blocks(CROSS, CROSS, CROSS, PLAIN)
        ),
        bases.stable_diffusion,
        sd_unet,
    ),
    "sdxl": Family(
        (
            "SDXL",
            {
                **UNET,
                "channel_mult": [1, 2, 2],
                "num_res_blocks": [2] * 3,
                "transformer_depth": [0, 0, 1, 1, 2, 2],
                "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
                "transformer_depth_middle": 2,
                "context_dim": 64,
                "use_linear_in_transformer": True,
                "num_classes": "sequential",
                "adm_in_channels": 80,
            },
        ),
        lambda: UNet2DConditionModel(
            block_out_channels=(32, 64, 64),
            cross_attention_dim=64,
            transformer_layers_per_block=(1, 1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
            **blocks(PLAIN, CROSS, CROSS),
        ),
        bases.stable_diffusion_xl,
        sd_unet,
    ),
    "sd3": Family(
        (
            "SD3",
            {
                "input_size": None,
                "patch_size": 2,
                "in_channels": 16,
                "depth": 2,
                "num_blocks": 2,
                "adm_in_channels": 64,
                "context_size": 32,
                "context_embedder_config": {
                    "target": "torch.nn.Linear",
                    "params": {"in_features": 32, "out_features": 128},
                },
                "num_patches": 4,
                "pos_embed_max_size": 2,
                "qk_norm": None,
            },
        ),
        lambda: SD3Transformer2DModel(
            num_layers=2,
            sample_size=4,
            pos_embed_max_size=2,
            attention_head_dim=64,
            num_attention_heads=2,
            caption_projection_dim=128,
            joint_attention_dim=32,
            pooled_projection_dim=64,
        ),
        bases.stable_diffusion_3,
        by(converters.convert_sd3_transformer_checkpoint_to_diffusers),
    ),
    "flux": Family(
        ("Flux", {**FLUX, "image_model": "flux", "guidance_embed": True, "vec_in_dim": 32}),
        lambda: FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=2,
            joint_attention_dim=32,
            guidance_embeds=True,
            pooled_projection_dim=32,
        ),
        bases.flux,
        by(narrow(converters.convert_flux_transformer_checkpoint_to_diffusers)),
    ),
    "chroma": Family(
        (
            "Chroma",
            {
                **FLUX,
                "image_model": "chroma",
                "in_channels": 64,
                "out_channels": 64,
                "in_dim": 64,
                "out_dim": WIDTH,
                "hidden_dim": 32,
                "n_layers": 1,
            },
        ),
        lambda: ChromaTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            num_attention_heads=2,
            joint_attention_dim=32,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
        bases.chroma,
        by(narrow(converters.convert_chroma_transformer_checkpoint_to_diffusers)),
    ),
    "flux2": Family(
        (
            "Flux2",
            {
                **FLUX,
                "image_model": "flux2",
                "in_channels": 128,
                "out_channels": 128,
                "patch_size": 1,
                "hidden_size": 64,
                "num_heads": 2,
                "axes_dim": [8] * 4,
                "mlp_ratio": 3.0,
                "qkv_bias": False,
                "guidance_embed": False,
                "vec_in_dim": None,
                "global_modulation": True,
                "mlp_silu_act": True,
                "txt_ids_dims": [3],
                "ops_bias": False,
            },
        ),
        lambda: Flux2Transformer2DModel(
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(8,) * 4,
            guidance_embeds=False,
        ),
        bases.flux2_klein,
        by(converters.convert_flux2_transformer_checkpoint_to_diffusers),
    ),
    "qwen": Family(
        (
            "QwenImage",
            {
                "image_model": "qwen_image",
                "num_layers": 1,
                "attention_head_dim": 32,
                "num_attention_heads": 2,
                "joint_attention_dim": 32,
                "axes_dims_rope": [16, 8, 8],
            },
        ),
        lambda: QwenImageTransformer2DModel(
            num_layers=1,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(16, 8, 8),
        ),
        bases.qwen_image,
        by(dict),  # the checkpoint's names are diffusers'
    ),
    "z-image": Family(
        (
            "ZImage",
            {
                "image_model": "lumina2",
                "patch_size": 2,
                "in_channels": 16,
                "dim": 1536,  # below, the two have other feed-forward and time layers
                "cap_feat_dim": 32,
                "n_layers": 1,
                "n_refiner_layers": 1,
                "qk_norm": True,
                "n_heads": 12,
                "n_kv_heads": 12,
                "axes_dims": [32, 48, 48],
                "axes_lens": [64, 64, 64],
                "ffn_dim_multiplier": 8 / 3,
                "z_image_modulation": True,
                "pad_tokens_multiple": 32,
            },
        ),
        lambda: ZImageTransformer2DModel(
            dim=1536,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=12,
            n_kv_heads=12,
            cap_feat_dim=32,
            axes_dims=[32, 48, 48],
            axes_lens=[64] * 3,
        ),
        bases.z_image,
        by(converters.convert_z_image_transformer_checkpoint_to_diffusers),
    ),
}
