"""The module names of the original checkpoints of transformers, as data: SD3, FLUX, Chroma, Qwen-Image, Z-Image.

FLUX, SD3 and Z-Image have q, k and v (in FLUX.1's single blocks the MLP's first layer too) in one fused layer;
diffusers has them apart. A fused layer's update falls apart along its output rows: A is shared, B and a magnitude by
row are cut. A norm by input runs over all rows of the fused layer, so it cannot be cut.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dora_diffusion.formats.norm_names import NORMS, NORMS_OUTSIDE

__all__ = [
    "FLUX",
    "HALVES",
    "SWAPPED",
    "SWAPPED_IF_TWO",
    "THIRDS",
    "TRANSFORMERS",
    "WHOLE",
    "Part",
    "Rows",
    "Transformer",
    "is_flux1",
    "is_flux2",
]


@dataclass(frozen=True)
class Rows:
    """Which of a file's output rows a layer has: from `start` to `stop` of `of` equal shares.

    `swapped`: the two halves change places, as the final layer's scale and shift do. `swapped_if_two`: only where there
    are two halves as wide as the inputs, as in the modulation of SD3's last block, which has six such parts elsewhere.
    """

    start: int = 0
    stop: int = 1
    of: int = 1
    swapped: bool = False
    swapped_if_two: bool = False

    def settled(self, rows: int, inputs: int) -> Rows:
        """These rows of a layer with so many rows and inputs; as they are where these are not known."""
        if not (self.swapped_if_two and rows and inputs):
            return self
        return SWAPPED if rows == 2 * inputs else WHOLE

    def fits(self, rows: int) -> bool:
        return rows % (2 if self.swapped else self.of) == 0

    def cut(self, tensor: Tensor) -> Tensor:
        """These rows of a tensor whose first axis is the fused layer's output."""
        if self.swapped:
            return torch.cat(tensor.chunk(2)[::-1])
        if self.of == 1:
            return tensor
        share = tensor.shape[0] // self.of
        return tensor[self.start * share : self.stop * share]


WHOLE = Rows()
SWAPPED = Rows(swapped=True)
SWAPPED_IF_TWO = Rows(swapped_if_two=True)


@dataclass(frozen=True)
class Part:
    """A layer by diffusers' name, and its rows in the file's module."""

    layer: str
    rows: Rows


HALVES = (Rows(0, 1, 2), Rows(1, 2, 2))
THIRDS = (Rows(0, 1, 3), Rows(1, 2, 3), Rows(2, 3, 3))
SEVENTHS = (Rows(0, 1, 7), Rows(1, 2, 7), Rows(2, 3, 7), Rows(3, 7, 7))
ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
Blocks = tuple[str, str]  # the blocks' name in the original, and in diffusers


@dataclass(frozen=True)
class Transformer:
    """A transformer's original names with diffusers': of fused layers in its blocks, of others there, and outside.

    `turned_at_the_end` are names in a block whose two halves, scale and shift, change places in the last one.
    """

    fused: Mapping[Blocks, Mapping[str, tuple[tuple[str, ...], tuple[Rows, ...]]]]
    blocks: Mapping[Blocks, Mapping[str, str]]
    outside: Mapping[str, str]
    swapped: Mapping[str, str]  # whose halves, scale and shift, change places
    turned_at_the_end: tuple[str, ...] = ()

    def with_more(self, blocks: Mapping[Blocks, Mapping[str, str]], outside: Mapping[str, str]) -> Transformer:
        """These names, and more that are not fused."""
        joined = {block: {**self.blocks.get(block, {}), **table} for block, table in blocks.items()}
        return replace(self, blocks={**self.blocks, **joined}, outside={**self.outside, **outside})

    def has(self, path: str) -> bool:
        """Whether a layer of this name is in the model by diffusers' names."""
        if path in self.outside.values() or path in self.swapped.values():
            return True
        block, _, inside = _in_block(path)
        return (block, inside) in self._inside

    @functools.cached_property
    def _inside(self) -> frozenset[tuple[str, str]]:
        """diffusers' blocks, and the layers in one."""
        found = {(ours, name) for (_, ours), table in self.blocks.items() for name in table.values()}
        fused = [(ours, names) for (_, ours), table in self.fused.items() for names, _ in table.values()]
        return frozenset(found | {(ours, name) for ours, names in fused for name in names})

    def parts(self, path: str) -> tuple[Part, ...]:
        """The layers that a module of the original is in diffusers; none for a path of another model."""
        if path in self.outside:
            return (Part(self.outside[path], WHOLE),)
        if path in self.swapped:
            return (Part(self.swapped[path], SWAPPED),)
        block, number, inside = _in_block(path)
        for (theirs, ours), table in self.blocks.items():
            if block != theirs:
                continue
            if inside in table:
                rows = SWAPPED_IF_TWO if inside in self.turned_at_the_end else WHOLE
                return (Part(f"{ours}.{number}.{table[inside]}", rows),)
            if inside in self.fused.get((theirs, ours), {}):
                names, shares = self.fused[theirs, ours][inside]
                return tuple(Part(f"{ours}.{number}.{name}", share) for name, share in zip(names, shares))
        return ()

    def is_turned(self, theirs: str, rows: int, inputs: int) -> bool:
        """Whether the halves of a module of the original, with so many rows and inputs, change places in diffusers."""
        parts = self.parts(theirs)
        return len(parts) == 1 and parts[0].rows.settled(rows, inputs).swapped

    def original(self, layer: str) -> str | None:
        """The original name of a layer that is no part of a fused one."""
        for table in (self.outside, self.swapped):
            for theirs, ours in table.items():
                if layer == ours:
                    return theirs
        for (their_block, our_block), names in self.blocks.items():
            found = re.fullmatch(rf"{re.escape(our_block)}\.(\d+)\.(.+)", layer)
            for theirs, ours in names.items():
                if found and found[2] == ours:
                    return f"{their_block}.{found[1]}.{theirs}"
        return None


def _in_block(path: str) -> tuple[str, str, str]:
    """`double_blocks.3.img_attn.qkv` as block, number and what follows; nothing for a layer outside of blocks."""
    found = re.fullmatch(r"(.+?)\.(\d{1,4})\.(.+)", path)
    return (found[1], found[2], found[3]) if found else ("", "", "")


FLUX = Transformer(
    fused={
        ("double_blocks", "transformer_blocks"): {
            "img_attn.qkv": (ATTENTION, THIRDS),
            "txt_attn.qkv": (ADDED_ATTENTION, THIRDS),
        },
        ("single_blocks", "single_transformer_blocks"): {"linear1": ((*ATTENTION, "proj_mlp"), SEVENTHS)},
    },
    blocks={
        ("double_blocks", "transformer_blocks"): {
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
        },
        ("single_blocks", "single_transformer_blocks"): {"linear2": "proj_out", "modulation.lin": "norm.linear"},
    },
    outside={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
        "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
        "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
        "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
        "final_layer.linear": "proj_out",
    },
    swapped={"final_layer.adaLN_modulation.1": "norm_out.linear"},
)
# Chroma has FLUX.1's blocks without modulation, which one layer for all of them computes.
CHROMA = replace(
    FLUX,
    blocks={
        **{
            block: {theirs: ours for theirs, ours in table.items() if not theirs.endswith(".lin")}
            for block, table in FLUX.blocks.items()
        },
        ("distilled_guidance_layer.layers",) * 2: {"in_layer": "linear_1", "out_layer": "linear_2"},
    },
    outside={
        **{theirs: ours for theirs, ours in FLUX.outside.items() if not ours.startswith("time_text_embed.")},
        **{f"distilled_guidance_layer.{end}": f"distilled_guidance_layer.{end}" for end in ("in_proj", "out_proj")},
    },
    swapped={},
)
# FLUX.2 has the same names for wider layers, and in its single blocks one fused layer in diffusers too.
FLUX2 = Transformer(
    fused={
        ("double_blocks", "transformer_blocks"): FLUX.fused["double_blocks", "transformer_blocks"],
        ("single_blocks", "single_transformer_blocks"): {},
    },
    blocks={
        ("double_blocks", "transformer_blocks"): {
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
        },
        ("single_blocks", "single_transformer_blocks"): {"linear1": "attn.to_qkv_mlp_proj", "linear2": "attn.to_out"},
    },
    outside={
        "img_in": "x_embedder",
        "txt_in": "context_embedder",
        "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
        "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
        "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
        "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
        "single_stream_modulation.lin": "single_stream_modulation.linear",
        "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
        "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
        "final_layer.linear": "proj_out",
    },
    swapped={"final_layer.adaLN_modulation.1": "norm_out.linear"},
)
SD3 = Transformer(
    fused={
        ("joint_blocks", "transformer_blocks"): {
            "x_block.attn.qkv": (ATTENTION, THIRDS),
            "x_block.attn2.qkv": (("attn2.to_q", "attn2.to_k", "attn2.to_v"), THIRDS),
            "context_block.attn.qkv": (ADDED_ATTENTION, THIRDS),
        }
    },
    blocks={
        ("joint_blocks", "transformer_blocks"): {
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.proj": "attn2.to_out.0",
            "context_block.attn.proj": "attn.to_add_out",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
            "x_block.adaLN_modulation.1": "norm1.linear",
            "context_block.adaLN_modulation.1": "norm1_context.linear",
        }
    },
    outside={
        "x_embedder.proj": "pos_embed.proj",
        "context_embedder": "context_embedder",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
    },
    swapped={"final_layer.adaLN_modulation.1": "norm_out.linear"},
    turned_at_the_end=("context_block.adaLN_modulation.1",),
)
# Qwen-Image's checkpoint has diffusers' names.
_QWEN_BLOCK = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{stream}_{name}" for stream in ("img", "txt") for name in ("mod.1", "mlp.net.0.proj", "mlp.net.2")),
)
_QWEN_OUTSIDE = (
    *("img_in", "txt_in", "norm_out.linear", "proj_out"),
    *("time_text_embed.timestep_embedder.linear_1", "time_text_embed.timestep_embedder.linear_2"),
)
QWEN = Transformer(
    fused={},
    blocks={("transformer_blocks", "transformer_blocks"): {name: name for name in _QWEN_BLOCK}},
    outside={name: name for name in _QWEN_OUTSIDE},
    swapped={},
)
_Z_BLOCKS: tuple[Blocks, ...] = tuple((name, name) for name in ("layers", "noise_refiner", "context_refiner"))
Z_IMAGE = Transformer(
    fused={
        block: {"attention.qkv": (("attention.to_q", "attention.to_k", "attention.to_v"), THIRDS)}
        for block in _Z_BLOCKS
    },
    blocks={
        block: {
            "attention.out": "attention.to_out.0",
            **{f"feed_forward.w{i}": f"feed_forward.w{i}" for i in (1, 2, 3)},
            "adaLN_modulation.0": "adaLN_modulation.0",
        }
        for block in _Z_BLOCKS
    },
    # The two ends are named after the patch size in diffusers.
    outside={
        "x_embedder": "all_x_embedder.2-1",
        "final_layer.linear": "all_final_layer.2-1.linear",
        "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
        **{name: name for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "cap_embedder.1")},
    },
    swapped={},
)
_MAPS = {"sd3": SD3, "flux": FLUX, "chroma": CHROMA, "flux2": FLUX2, "qwen": QWEN, "z-image": Z_IMAGE}
TRANSFORMERS: Mapping[str, Transformer] = {
    name: transformer.with_more(NORMS.get(name, {}), NORMS_OUTSIDE.get(name, {})) for name, transformer in _MAPS.items()
}


def is_flux2(shapes: Mapping[str, tuple[int, int]]) -> bool:
    """Whether modules of these names with so many outputs and inputs are FLUX.2's: told from how wide its MLP is."""
    return _any_is(shapes, linear1=9, linear2=4, first=6, second=3)


def is_flux1(shapes: Mapping[str, tuple[int, int]]) -> bool:
    """Whether they are FLUX.1's or Chroma's."""
    return _any_is(shapes, linear1=7, linear2=5, first=4, second=4)


def _any_is(shapes: Mapping[str, tuple[int, int]], *, linear1: int, linear2: int, first: int, second: int) -> bool:
    """Whether one of the layers that tell has so many times more outputs than inputs, or the other way round."""
    wide = {
        r"single_blocks.\d+.linear1": lambda rows, columns: rows == linear1 * columns,
        r"single_blocks.\d+.linear2": lambda rows, columns: columns == linear2 * rows,
        r"double_blocks.\d+.(?:img|txt)_mlp.0": lambda rows, columns: rows == first * columns,
        r"double_blocks.\d+.(?:img|txt)_mlp.2": lambda rows, columns: columns == second * rows,
    }
    return any(
        re.search(rf"{pattern}$", name) is not None and fits(*shape)
        for name, shape in shapes.items()
        for pattern, fits in wide.items()
    )
