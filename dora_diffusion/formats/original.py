"""The module names of the original checkpoints, as data: Stable Diffusion's and SDXL's UNet, SD3, FLUX, Z-Image.

FLUX, SD3 and Z-Image have q, k and v (in FLUX.1's single blocks the MLP's first layer too) in one fused layer;
diffusers has them apart. A fused layer's update falls apart along its output rows: A is shared, B and a magnitude by
row are cut. A norm by input runs over all rows of the fused layer, so it cannot be cut.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "FLUX",
    "SD3",
    "WHOLE",
    "Z_IMAGE",
    "Part",
    "Rows",
    "Transformer",
    "to_diffusers",
    "unet_original",
    "unet_path",
]


@dataclass(frozen=True)
class Rows:
    """Which of a file's output rows a layer has: from `start` to `stop` of `of` equal shares."""

    start: int = 0
    stop: int = 1
    of: int = 1
    swapped: bool = False  # the two halves change places: the final layer's scale and shift

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


@dataclass(frozen=True)
class Part:
    """A layer by diffusers' name, and its rows in the file's module."""

    layer: str
    rows: Rows


THIRDS = (Rows(0, 1, 3), Rows(1, 2, 3), Rows(2, 3, 3))
SEVENTHS = (Rows(0, 1, 7), Rows(1, 2, 7), Rows(2, 3, 7), Rows(3, 7, 7))
ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_ATTENTION = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
Blocks = tuple[str, str]  # the blocks' name in the original, and in diffusers


@dataclass(frozen=True)
class Transformer:
    """A transformer's original names with diffusers': of fused layers in its blocks, of others there, and outside."""

    fused: Mapping[Blocks, Mapping[str, tuple[tuple[str, ...], tuple[Rows, ...]]]]
    blocks: Mapping[Blocks, Mapping[str, str]]
    outside: Mapping[str, str]
    swapped: Mapping[str, str]  # whose halves, scale and shift, change places

    def parts(self, path: str) -> tuple[Part, ...]:
        """The layers that a module of the original is in diffusers; none for a path of another model."""
        if path in self.outside:
            return (Part(self.outside[path], WHOLE),)
        if path in self.swapped:
            return (Part(self.swapped[path], SWAPPED),)
        block, _, rest = path.partition(".")
        number, _, inside = rest.partition(".")
        for (theirs, ours), table in self.blocks.items():
            if block != theirs:
                continue
            if inside in table:
                return (Part(f"{ours}.{number}.{table[inside]}", WHOLE),)
            if inside in self.fused[theirs, ours]:
                names, rows = self.fused[theirs, ours][inside]
                return tuple(Part(f"{ours}.{number}.{name}", part) for name, part in zip(names, rows))
        return ()

    def original(self, layer: str) -> str | None:
        """The original name of a layer that is no part of a fused one."""
        for table in (self.outside, self.swapped):
            for theirs, ours in table.items():
                if layer == ours:
                    return theirs
        for (their_block, our_block), names in self.blocks.items():
            found = re.fullmatch(rf"{our_block}\.(\d+)\.(.+)", layer)
            for theirs, ours in names.items():
                if found and found[2] == ours:
                    return f"{their_block}.{found[1]}.{theirs}"
        return None


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
# `context_block.adaLN_modulation.1` is left out: its rows have another order in the last block, which no name tells.
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
        }
        for block in _Z_BLOCKS
    },
    outside={},
    swapped={},
)
UNET_WHOLE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}
RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_RESNET_BACK = {ours: theirs for theirs, ours in RESNET.items()}
_UNET_BACK = {ours: theirs for theirs, ours in UNET_WHOLE.items()}


def to_diffusers(path: str, layers_per_block: int = 2, flux: Transformer = FLUX) -> tuple[Part, ...]:
    """The layers that a module of an original checkpoint is in diffusers; a path that is diffusers' own stays.

    `flux` says whether names of FLUX's blocks are FLUX.1's or FLUX.2's.
    """
    for model in (flux, SD3, Z_IMAGE):
        if parts := model.parts(path):
            return parts
    return (Part(unet_path(path, layers_per_block) or path, WHOLE),)


def is_flux2(shapes: Mapping[str, tuple[int, int]]) -> bool:
    """Whether modules of these names with so many outputs and inputs are FLUX.2's: told from how wide its MLP is."""
    wide = {
        r"single_blocks.\d+.linear1": lambda rows, columns: rows == 9 * columns,  # FLUX.1: 7
        r"single_blocks.\d+.linear2": lambda rows, columns: columns == 4 * rows,  # 5
        r"double_blocks.\d+.(?:img|txt)_mlp.0": lambda rows, columns: rows == 6 * columns,  # 4
        r"double_blocks.\d+.(?:img|txt)_mlp.2": lambda rows, columns: columns == 3 * rows,  # 4
    }
    return any(
        re.search(rf"{pattern}$", name) is not None and fits(*shape)
        for name, shape in shapes.items()
        for pattern, fits in wide.items()
    )


def unet_path(path: str, n: int) -> str | None:
    """`input_blocks.4.1...` as `down_blocks.1.attentions.0...` for a UNet with n layers in a block."""
    if path in UNET_WHOLE:
        return UNET_WHOLE[path]
    if found := re.fullmatch(r"middle_block\.([012])\.(.+)", path):
        kind, rest = ("attentions.0", found[2]) if found[1] == "1" else (f"resnets.{int(found[1]) // 2}", found[2])
        return f"mid_block.{kind}.{RESNET.get(rest, rest)}"
    found = re.fullmatch(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)", path)
    if not found or len(found[2]) > 4:
        return None
    i, inner, rest = int(found[2]), found[3], found[4]
    block, layer = divmod(i - (found[1] == "input"), n + 1)
    start = f"{'down' if found[1] == 'input' else 'up'}_blocks.{block}"
    if rest == "op":
        return f"{start}.downsamplers.0.conv"
    if rest == "conv":
        return f"{start}.upsamplers.0.conv"
    kind = "resnets" if inner == "0" else "attentions"
    return f"{start}.{kind}.{layer}.{RESNET.get(rest, rest)}"


def unet_original(layer: str, n: int = 2, plain_up_blocks: tuple[int, ...] = ()) -> str | None:
    """The original name of a UNet's layer; `plain_up_blocks` are those without attention, where upsampling is early."""
    if layer in _UNET_BACK:
        return _UNET_BACK[layer]
    found = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(resnets|attentions|\w+samplers)\.(\d+)\.(.+)", layer)
    if not found:
        return None
    side, block, kind, number, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    rest = _RESNET_BACK.get(rest, rest) if kind == "resnets" else rest
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * number}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(block + 1) * (n + 1)}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{block * (n + 1) + n}.{1 if block in plain_up_blocks else 2}.conv"
    i = block * (n + 1) + number
    where = f"input_blocks.{i + 1}" if side == "down" else f"output_blocks.{i}"
    return f"{where}.{0 if kind == 'resnets' else 1}.{rest}"
