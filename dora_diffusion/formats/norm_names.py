"""The names of normalisation layers in the original checkpoints, and in diffusers, as data.

FLUX's and Chroma's checkpoints call a norm's weight `scale`; what such a key ends with is in leaves.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["NORMS", "NORMS_OUTSIDE", "NORM_WORDS", "RESNET_NORMS", "UNET_NORMS"]

Blocks = tuple[str, str]  # the blocks' name in the original, and in diffusers

_FLUX: Mapping[Blocks, Mapping[str, str]] = {
    ("double_blocks", "transformer_blocks"): {
        "img_attn.norm.query_norm": "attn.norm_q",
        "img_attn.norm.key_norm": "attn.norm_k",
        "txt_attn.norm.query_norm": "attn.norm_added_q",
        "txt_attn.norm.key_norm": "attn.norm_added_k",
    },
    ("single_blocks", "single_transformer_blocks"): {
        "norm.query_norm": "attn.norm_q",
        "norm.key_norm": "attn.norm_k",
    },
}
_QWEN = ("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k")
_Z_IMAGE = {
    "attention.q_norm": "attention.norm_q",
    "attention.k_norm": "attention.norm_k",
    **{name: name for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")},
}
# Of each transformer: in its blocks, and outside of them.
NORMS: Mapping[str, Mapping[Blocks, Mapping[str, str]]] = {
    "sd3": {
        ("joint_blocks", "transformer_blocks"): {
            "x_block.attn.ln_q": "attn.norm_q",
            "x_block.attn.ln_k": "attn.norm_k",
            "context_block.attn.ln_q": "attn.norm_added_q",
            "context_block.attn.ln_k": "attn.norm_added_k",
            "x_block.attn2.ln_q": "attn2.norm_q",
            "x_block.attn2.ln_k": "attn2.norm_k",
        }
    },
    "flux": _FLUX,
    "chroma": _FLUX,
    "flux2": _FLUX,
    "qwen": {("transformer_blocks", "transformer_blocks"): {name: name for name in _QWEN}},
    "z-image": {(block, block): _Z_IMAGE for block in ("layers", "noise_refiner", "context_refiner")},
}
NORMS_OUTSIDE: Mapping[str, Mapping[str, str]] = {
    "chroma": {f"distilled_guidance_layer.norms.{i}": f"distilled_guidance_layer.norms.{i}" for i in range(10)},
    "qwen": {"txt_norm": "txt_norm"},
    "z-image": {"cap_embedder.0": "cap_embedder.0"},
}
UNET_NORMS = {"out.0": "conv_norm_out"}
RESNET_NORMS = {"in_layers.0": "norm1", "out_layers.0": "norm2"}
# What these and the text encoders' norms add to the words that flat names are made of.
NORM_WORDS: list[str] = re.findall(
    r"\w+",
    """
    norm2 norm3 norms norm_q norm_k norm_added_q norm_added_k conv_norm_out query_norm key_norm q_norm k_norm ln_q ln_k
    attention_norm1 attention_norm2 ffn_norm1 ffn_norm2 txt_norm layer_norm layer_norm1 layer_norm2 final_layer_norm
    """,
)
