"""Names of a denoiser's layers that are read and never written: other programs' spellings, and layers that they fuse.

XLabs and USO number FLUX.1's two streams (1 is the image, 2 the text); ComfyUI has a name for the attention's rows of
`linear1` alone; diffusers' `fuse_qkv_projections`, and programs that run models so, have one layer for q, k and v.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from dora_diffusion.formats.original import HALVES, THIRDS, Rows

__all__ = ["FusedName", "fused_name", "plain_name"]

_SPELLINGS = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"sformer_blocks\.(.+)", r"transformer_blocks.\1"),  # a file that lost the four letters before it
        (r"double_blocks\.(\d+)\.processor\.(qkv|proj)_lora1", r"double_blocks.\1.img_attn.\2"),
        (r"double_blocks\.(\d+)\.processor\.(qkv|proj)_lora2", r"double_blocks.\1.txt_attn.\2"),
        (r"single_blocks\.(\d+)\.processor\.qkv", r"single_blocks.\1.linear1_qkv"),
        (r"single_blocks\.(\d+)\.processor\.proj", r"single_blocks.\1.linear2"),
    )
]


@dataclass(frozen=True)
class FusedName:
    """The layers that a name stands for, one under the other, and the rows of each."""

    layers: tuple[str, ...]
    rows: tuple[Rows, ...]


_FUSED = [
    (re.compile(pattern), FusedName(layers, rows))
    for pattern, layers, rows in (
        (r"(.+)\.to_qkv", (r"\1.to_q", r"\1.to_k", r"\1.to_v"), THIRDS),
        (r"(.+)\.to_added_qkv", (r"\1.add_q_proj", r"\1.add_k_proj", r"\1.add_v_proj"), THIRDS),
        (r"(.+)\.to_kv", (r"\1.to_k", r"\1.to_v"), HALVES),
        (
            r"single_blocks\.(\d+)\.linear1_qkv",
            tuple(rf"single_transformer_blocks.\1.attn.to_{x}" for x in "qkv"),
            THIRDS,
        ),
    )
]


def plain_name(path: str) -> str:
    """The name of the checkpoint or of diffusers that another program's spelling stands for; any other as it is."""
    for pattern, name in _SPELLINGS:
        if found := pattern.fullmatch(path):
            return found.expand(name)
    return path


def fused_name(path: str) -> FusedName | None:
    """What a name of a fused layer that no table of a family has stands for; None for any other name."""
    for pattern, fused in _FUSED:
        if found := pattern.fullmatch(path):
            return FusedName(tuple(found.expand(layer) for layer in fused.layers), fused.rows)
    return None
