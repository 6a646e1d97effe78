"""The names of layers that ComfyUI finds in a file, and the programs that have its code: `model_lora_keys_unet` and
`model_lora_keys_clip` of its comfy/lora.py with the maps of comfy/utils.py, as data."""

from __future__ import annotations

from dora_diffusion.formats.anatomy import Model
from dora_diffusion.inspection.spelling import Spelling

__all__ = ["CHECKPOINT", "CLIP", "CLIP_NAMES", "DIFFUSERS_OF", "FLAT_CLIP", "UNET"]

CLIP = r"text_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12])"
FLAT_CLIP = CLIP.replace(r"\.", "_")
# The layers of diffusers' transformers in flux_to_diffusers, mmdit_to_diffusers and z_image_to_diffusers; FLUX.2 and
# Chroma have FLUX.1's map, whose time, modulation and guidance layers are not in it.
_ATTENTION = r"attn\.(?:to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out|norm_(?:added_)?[qk])"
_OUTSIDE = (
    r"context_embedder|time_text_embed\.(?:timestep|text|guidance)_embedder\.linear_[12]|norm_out\.linear|proj_out"
)
_FLUX_BLOCK = rf"{_ATTENTION}|norm1(?:_context)?\.linear|ff(?:_context)?\.(?:net\.(?:0\.proj|2)|linear_(?:in|out))"
_FLUX_SINGLE = r"attn\.(?:to_[qkv]|to_qkv_mlp_proj|to_out|norm_[qk])|proj_mlp|norm\.linear|proj_out"
_FLUX_LAYERS = (
    rf"transformer_blocks\.\d+\.(?:{_FLUX_BLOCK})|single_transformer_blocks\.\d+\.(?:{_FLUX_SINGLE})"
    rf"|{_OUTSIDE}|x_embedder"
)
_SD3_BLOCK = (
    rf"{_ATTENTION}|attn2\.(?:to_[qkv]|to_out\.0|norm_[qk])|norm1(?:_context)?\.linear"
    r"|ff(?:_context)?\.net\.(?:0\.proj|2)"
)
_SD3_LAYERS = rf"transformer_blocks\.\d+\.(?:{_SD3_BLOCK})|{_OUTSIDE}|pos_embed\.proj"
_FLUXES: tuple[Model, ...] = ("flux", "chroma", "flux2")

UNET = (
    Spelling(("lora_unet_", "lycoris_"), "diffusers", ("unet",)),
    # The attention's layers have a `processor.` before their names, as in diffusers' files of old; others have not.
    Spelling(("", "unet."), "old diffusers", ("unet",)),
)
CHECKPOINT = Spelling(("lora_unet_", "diffusion_model."), "checkpoint")
DIFFUSERS_OF = {
    "sd3": Spelling(
        ("transformer.", "base_model.model.", "lora_transformer_", "lycoris_"), "diffusers", ("sd3",), _SD3_LAYERS
    ),
    "flux": Spelling(("transformer.", "", "lora_transformer_", "lycoris_"), "diffusers", _FLUXES, _FLUX_LAYERS),
    "qwen": Spelling(("transformer.", "", "lycoris_"), "diffusers", ("qwen",)),
    "z-image": Spelling(("transformer.", "diffusion_model.", "", "lycoris_"), "diffusers", ("z-image",)),
}
CLIP_NAMES = (
    Spelling(("lora_te_", "lora_te1_", "lora_te2_"), layers=FLAT_CLIP),
    Spelling(("text_encoder.", "text_encoder_2."), layers=CLIP),
)
