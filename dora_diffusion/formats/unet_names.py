"""The names of a UNet's layers in the original checkpoints of Stable Diffusion 1, 2 and XL, and in diffusers.

The original numbers all blocks of a side in one row, so what a number means depends on how many layers a block has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from dora_diffusion.formats.norm_names import RESNET_NORMS, UNET_NORMS

__all__ = ["is_original", "is_own", "originals_of", "unet_original", "unet_path"]

UNET_WHOLE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    **UNET_NORMS,
}
RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
    **RESNET_NORMS,
}
_RESNET_BACK = {ours: theirs for theirs, ours in RESNET.items()}
_UNET_BACK = {ours: theirs for theirs, ours in UNET_WHOLE.items()}
_ORIGINAL = re.compile(r"(input_blocks|middle_block|output_blocks)\.\d+\..+")
_OWN = re.compile(r"((down|up)_blocks\.\d+|mid_block)\..+|(time|add)_embedding\.linear_[12]|conv_(in|out|norm_out)")


def is_own(path: str) -> bool:
    """Whether this is a UNet's layer by diffusers' names."""
    return _OWN.fullmatch(path) is not None


def is_original(path: str) -> bool:
    """Whether this is a UNet's layer by the original names."""
    return path in UNET_WHOLE or _ORIGINAL.fullmatch(path) is not None


def originals_of(paths: Iterable[str]) -> dict[str, str]:
    """The original names of a UNet's layers, with diffusers' (`paths`), whatever number of layers its blocks have."""
    starts: dict[str, str] = {}
    there = {".".join(path.split(".")[:4]) for path in paths if path.startswith(("down_blocks.", "up_blocks."))}
    for side, theirs, first in (("down", "input_blocks", 1), ("up", "output_blocks", 0)):
        at = first
        for block in range(_count(there, f"{side}_blocks.")):
            start = f"{side}_blocks.{block}"
            for layer in range(_count(there, f"{start}.resnets.")):
                starts[f"{start}.resnets.{layer}"] = f"{theirs}.{at}.0"
                starts[f"{start}.attentions.{layer}"] = f"{theirs}.{at}.1"
                at += 1
            if f"{start}.downsamplers.0" in there:
                starts[f"{start}.downsamplers.0"] = f"{theirs}.{at}.0"
                at += 1
            inner = 2 if any(path.startswith(f"{start}.attentions.") for path in there) else 1
            starts[f"{start}.upsamplers.0"] = f"{theirs}.{at - 1}.{inner}"
    return {_original_of(path, starts): path for path in paths if is_own(path)}


def _count(starts: Iterable[str], prefix: str) -> int:
    """How many numbers follow this prefix, counted from 0."""
    numbers = [int(start[len(prefix) :].split(".")[0]) for start in starts if start.startswith(prefix)]
    return max(numbers, default=-1) + 1


def _original_of(path: str, starts: Mapping[str, str]) -> str:
    parts = path.split(".")
    start, rest = ".".join(parts[:4]), ".".join(parts[4:])
    if start not in starts:
        return unet_original(path) or path
    names = {"resnets": _RESNET_BACK, "downsamplers": {"conv": "op"}}.get(parts[2], {})
    return f"{starts[start]}.{names.get(rest, rest)}"


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
