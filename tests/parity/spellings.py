"""Every name that a layer may have in an adapter file, in each way to write it that some program has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dora_diffusion.formats.anatomy import Anatomy
from dora_diffusion.formats.original import TRANSFORMERS
from dora_diffusion.formats.unet_names import originals_of

DOTTED = ("", "unet.", "transformer.", "diffusion_model.", "base_model.model.")
FLAT = ("lora_unet_", "lora_transformer_", "lycoris_")


def spellings(anatomy: Anatomy) -> Iterator[str]:
    """The names of a denoiser's layers: diffusers' and the checkpoint's, with each prefix, dotted and flat."""
    for path in sorted({*anatomy.paths, *originals(anatomy)}):
        for prefix in DOTTED:
            yield prefix + path
        for prefix in FLAT:
            yield prefix + path.replace(".", "_")
        if ".to_" in path:
            old = path.replace(".to_", ".processor.to_").removesuffix(".0")
            yield from (old, "unet." + old)


def originals(anatomy: Anatomy) -> Mapping[str, object]:
    """The names in the checkpoint, fused layers included."""
    if anatomy.model == "unet":
        return originals_of(anatomy.paths)
    model = TRANSFORMERS[anatomy.model]
    names: dict[str, object] = {}
    for (theirs, ours), table in model.blocks.items():
        numbers = {path.split(".")[len(ours.split("."))] for path in anatomy.paths if path.startswith(ours + ".")}
        inside = [*table, *model.fused.get((theirs, ours), {})]
        names |= {f"{theirs}.{number}.{name}": None for number in numbers for name in inside}
    names |= dict.fromkeys([*model.outside, *model.swapped])
    return {name: None for name in names if anatomy.parts(name) or anatomy.has(name)}
