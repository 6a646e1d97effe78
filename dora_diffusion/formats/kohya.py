"""The kohya / LyCORIS dialect: `lora_unet_<path with _>.lora_down.weight`, `.lora_up.weight`, `.alpha`, `.dora_scale`.

Read by ComfyUI, Forge, A1111, sd-scripts and LyCORIS. A magnitude is written with the weight's number of axes, [out, 1]
or [1, in]: with one axis it would be spread over the wrong one on square layers. SDXL's UNet has the original names
there, as sd-scripts trains it. The layers of SD3 and FLUX.1 have diffusers' names behind `lora_transformer_`, those of
later transformers behind `lycoris_`, as ComfyUI looks for them; parts of fused layers are put together again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dora_diffusion.formats.content import AdapterFile, by_layer
from dora_diffusion.formats.names import TEXT_ENCODERS
from dora_diffusion.formats.original import FLUX, FLUX2, SD3, Z_IMAGE, Transformer, unet_original

__all__ = ["is_xl", "to_keys"]

ENDINGS = {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "difference": "diff"}
ENCODER_PREFIX = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}
Held = dict[str, Tensor]


def to_keys(file: AdapterFile) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by the keys of a file, and what is worth saying of them."""
    layers = by_layer(file.tensors)
    keys: dict[str, Tensor] = {}
    model = _transformer(file)
    groups = dict(_fused_groups(file, layers, model))
    in_groups = {layer for _, members in groups.values() for layer in members}
    for name, (held, members) in groups.items():
        keys |= dict(_module(f"lora_unet_{name.replace('.', '_')}", held, file.scale_of(members[0])))
    for layer, held in layers.items():
        if layer not in in_groups:
            name, held = _named(file, layer, held, model, original=bool(groups))
            keys |= dict(_module(name, held, file.scale_of(layer)))
    return keys, _notes(file)


def _module(name: str, held: Held, scale: float) -> Iterator[tuple[str, Tensor]]:
    for parameter, tensor in held.items():
        if parameter in ENDINGS:
            yield f"{name}.{ENDINGS[parameter]}", tensor
        elif parameter == "unscaled_magnitude":
            yield f"{name}.magnitude", tensor
        else:
            ones = (1,) * (held["lora_A"].dim() - 2)
            shape = (-1, 1, *ones) if parameter == "magnitude" else (1, -1, *ones)
            yield f"{name}.dora_scale", tensor.reshape(shape)
    if "lora_A" in held:
        yield f"{name}.alpha", torch.tensor(scale * held["lora_A"].shape[0])


def _named(file: AdapterFile, layer: str, held: Held, model: Transformer, original: bool) -> tuple[str, Held]:
    """The module's name, and its tensors with the rows in the order of the model that has that name."""
    component, _, path = layer.partition(".")
    if component in TEXT_ENCODERS:
        return _encoder_prefix(file, component) + path.replace(".", "_"), held
    if file.prefix == "transformer":
        theirs = model.original(layer) if original else None
        if theirs is None:
            return _transformer_prefix(file, model) + layer.replace(".", "_"), held
        if theirs in model.swapped:
            held = {p: torch.cat(t.chunk(2)[::-1]) if p in ("lora_B", "magnitude") else t for p, t in held.items()}
        return "lora_unet_" + theirs.replace(".", "_"), held
    theirs = None
    if is_xl(file) and layer not in file.flat:
        theirs = unet_original(layer, file.base.layers_per_block or 2, file.base.plain_up_blocks)
    return "lora_unet_" + (theirs or layer).replace(".", "_"), held


def _encoder_prefix(file: AdapterFile, component: str) -> str:
    """One text encoder is `lora_te_`, several are numbered; FLUX's T5, the second, is sd-scripts' third."""
    if file.prefix == "transformer":
        is_flux = any(layer.startswith("single_transformer_blocks.") for layer in file.layers)
        return "lora_te3_" if component == "text_encoder_2" and is_flux else ENCODER_PREFIX[component]
    return ENCODER_PREFIX[component] if component != "text_encoder" or is_xl(file) else "lora_te_"


def _transformer_prefix(file: AdapterFile, model: Transformer) -> str:
    if file.base.model_class == "unknown":
        first = model in (SD3, FLUX)
    else:
        first = file.base.model_class in ("SD3Transformer2DModel", "FluxTransformer2DModel")
    return "lora_transformer_" if first else "lycoris_"


def _transformer(file: AdapterFile) -> Transformer:
    """Whose original names a transformer's layers have: SD3's and FLUX's are the same in diffusers."""
    layers = file.layers
    if any(layer.startswith(("layers.", "noise_refiner.", "context_refiner.")) for layer in layers):
        return Z_IMAGE
    if any(layer.endswith((".to_qkv_mlp_proj", ".linear_in", ".linear_out")) for layer in layers):
        return FLUX2
    is_sd3 = file.base.model_class == "SD3Transformer2DModel" or any("joint_blocks" in n for n in file.written.values())
    return SD3 if is_sd3 else FLUX


def is_xl(file: AdapterFile) -> bool:
    """Whether the UNet is SDXL's: by the base's description, or by what only SDXL has."""
    if file.base.model_class != "unknown":
        return file.base.is_xl
    marks = (
        "text_encoder_2.",
        "down_blocks.1.attentions.0.transformer_blocks.1.",
        "mid_block.attentions.0.transformer_blocks.1.",
    )
    return file.prefix == "unet" and any(layer.startswith(marks) for layer in file.layers)


def _fused_groups(
    file: AdapterFile, layers: Mapping[str, Held], model: Transformer
) -> Iterator[tuple[str, tuple[Held, list[str]]]]:
    """The fused layers whose parts are all there with one A and one scale, as they are when they come from one file."""
    for (their_block, our_block), table in model.fused.items():
        numbers = {layer.split(".")[1] for layer in layers if layer.startswith(our_block + ".")}
        for number in sorted(numbers):
            for theirs, (ours, _rows) in table.items():
                members = [f"{our_block}.{number}.{name}" for name in ours]
                if (fused := _fuse(file, layers, members)) is not None:
                    yield f"{their_block}.{number}.{theirs}", (fused, members)


def _fuse(file: AdapterFile, layers: Mapping[str, Held], members: list[str]) -> Held | None:
    if not all(member in layers for member in members):
        return None
    parts = [layers[member] for member in members]
    first = parts[0]
    alike = all(part.keys() == first.keys() for part in parts) and len({file.scale_of(m) for m in members}) == 1
    if not alike or not first.keys() <= {"lora_A", "lora_B", "magnitude"}:
        return None
    if not all(torch.equal(part["lora_A"], first["lora_A"]) for part in parts):
        return None
    cut = {p: torch.cat([part[p] for part in parts]) for p in first if p != "lora_A"}
    return {"lora_A": first["lora_A"], **cut}


def _notes(file: AdapterFile) -> list[str]:
    notes = []
    if file.config.use_rslora:
        notes.append("alpha / sqrt(rank) is written as the alpha that gives the same with alpha / rank")
    if "input" in file.norm_axis or file.norm_axis == "mixed":
        notes.append("the norm by input stays: [1, in], which LyCORIS's own loader does not take")
    if any(name.endswith(".unscaled_magnitude") for name in file.tensors):
        notes.append(
            "ai-toolkit's norm stays under its own name (.magnitude), which only ai-toolkit and this project read"
        )
    return notes
