"""Layers that the original checkpoint has as one, put together again: q, k and v, and what is fused with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dora_diffusion.adapters.variants import LOW_RANK
from dora_diffusion.formats.content import AdapterFile
from dora_diffusion.formats.cutting import together
from dora_diffusion.formats.original import Transformer

__all__ = ["Held", "fused_groups"]

Held = dict[str, Tensor]


def fused_groups(
    file: AdapterFile, layers: Mapping[str, Held], model: Transformer, *, differences: bool, ranks: bool
) -> Iterator[tuple[str, tuple[Held, list[str]]]]:
    """The fused layers whose parts are all there with one A and one scale, as they are when they come from one file.

    `differences` takes whole differences too, `ranks` parts that each have an A of their own, side by side.
    """
    for (their_block, our_block), table in model.fused.items():
        numbers = {layer.split(".")[1] for layer in layers if layer.startswith(our_block + ".")}
        for number in sorted(numbers):
            for theirs, (ours, _rows) in table.items():
                members = [f"{our_block}.{number}.{name}" for name in ours]
                if (fused := _fuse(file, layers, members, differences, ranks)) is not None:
                    yield f"{their_block}.{number}.{theirs}", (fused, members)


def _fuse(
    file: AdapterFile, layers: Mapping[str, Held], members: list[str], differences: bool, ranks: bool
) -> Held | None:
    if not all(member in layers for member in members):
        return None
    parts = [layers[member] for member in members]
    first = parts[0]
    if len({file.scale_of(member) for member in members}) > 1:
        return None
    if (whole := together(parts)) is not None:
        # Differences that came apart are as well written so, and so are trained ones; but ComfyUI reads a part's
        # weight, and not its bias.
        stays_apart = "difference" in first and "bias_difference" not in first and not differences
        return None if stays_apart else whole
    is_low_rank = "lora_A" in first and first.keys() <= {*LOW_RANK, "magnitude", "bias_difference"}
    return _side_by_side(parts) if ranks and is_low_rank else None


def _side_by_side(parts: list[Held]) -> Held | None:
    """The parts as one low-rank update of the sum of their ranks: B has each part's in its own rows and columns.

    None for a part that is zero, whose columns nothing would tell from the others'.
    """
    if not all(
        part.keys() == parts[0].keys() and part["lora_B"].dim() == 2 and part["lora_B"].ne(0).any(dim=0).all()
        for part in parts
    ):
        return None
    fused = {"lora_A": torch.cat([part["lora_A"] for part in parts])}
    fused["lora_B"] = torch.block_diag(*(part["lora_B"] for part in parts))
    for whole in parts[0].keys() - fused.keys():
        fused[whole] = torch.cat([part[whole] for part in parts])
    return fused
