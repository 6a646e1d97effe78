"""The kohya / LyCORIS dialect: `lora_unet_<path with _>.lora_down.weight`, `.lora_up.weight`, `.alpha`, `.dora_scale`.

Read by ComfyUI, Forge, A1111, sd-scripts and LyCORIS. A magnitude is written with the weight's number of axes, [out, 1]
or [1, in]: with one axis it would be spread over the wrong one on square layers. SDXL's UNet and SD3 have the original
names there, as sd-scripts trains them and as Forge looks for SD3; q, k and v of SD3 are put together, each with its own
ranks. The layers of FLUX.1 have diffusers' names behind `lora_transformer_`, those of later transformers behind
`lycoris_`, as ComfyUI looks for them; parts that came from one fused layer are put together again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from dora_diffusion.formats.content import AdapterFile, by_layer
from dora_diffusion.formats.cutting import cut, is_open, is_turned
from dora_diffusion.formats.fusing import Held, fused_groups
from dora_diffusion.formats.lycoris import module_keys
from dora_diffusion.formats.names import TEXT_ENCODERS
from dora_diffusion.formats.original import FLUX, SWAPPED, TRANSFORMERS, Transformer
from dora_diffusion.formats.unet_names import unet_original

__all__ = ["has_halves_turned", "is_xl", "to_keys"]

ENCODER_PREFIX = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_", "text_encoder_3": "lora_te3_"}


def to_keys(file: AdapterFile) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by the keys of a file, and what is worth saying of them."""
    layers = by_layer(file.tensors)
    keys: dict[str, Tensor] = {}
    model = _model(file)
    groups = dict(fused_groups(file, layers, model, differences=_always_fused(file), ranks=_always_fused(file)))
    original = _has_original_names(file, bool(groups))
    in_groups = {layer for _, members in groups.values() for layer in members}
    for name, (held, members) in groups.items():
        keys |= dict(module_keys(f"lora_unet_{name.replace('.', '_')}", held, file, members[0]))
    for layer, held in layers.items():
        if layer not in in_groups:
            name, held = _named(file, layer, held, model, original)
            keys |= dict(module_keys(name, held, file, layer))
    return keys, _notes(file, keys)


def has_halves_turned(file: AdapterFile, layer: str) -> bool:
    """Whether this layer is written by the checkpoint's name, with its two halves in the checkpoint's order."""
    model, layers = _model(file), by_layer(file.tensors)
    groups = fused_groups(file, layers, model, differences=_always_fused(file), ranks=_always_fused(file))
    theirs = model.original(layer)
    named = "rows" in layers[layer] or _has_original_names(file, any(True for _ in groups))
    if theirs is None or not named:
        return False
    return is_turned(model, theirs, layers[layer])


def _model(file: AdapterFile) -> Transformer:
    return TRANSFORMERS.get(file.models[0], FLUX)


def _has_original_names(file: AdapterFile, has_groups: bool) -> bool:
    """Whether a transformer's layers get the checkpoint's names, as its fused layers do."""
    return file.prefix == "transformer" and (has_groups or "sd3" in file.models)


def _named(file: AdapterFile, layer: str, held: Held, model: Transformer, original: bool) -> tuple[str, Held]:
    """The module's name, and its tensors with the rows in the order of the model that has that name."""
    component, _, path = layer.partition(".")
    if component in TEXT_ENCODERS:
        return _encoder_prefix(file, component) + path.replace(".", "_"), held
    if file.prefix == "transformer":
        # Rows in another order than a product has them are in that order under the original's name alone.
        theirs = model.original(layer) if original or "rows" in held else None
        if theirs is None or is_open(model, theirs, held):
            return _transformer_prefix(file) + layer.replace(".", "_"), held
        if is_turned(model, theirs, held):
            [held] = cut(held, [SWAPPED])
        return "lora_unet_" + theirs.replace(".", "_"), held
    theirs = None
    if is_xl(file) and layer not in file.flat:
        theirs = unet_original(layer, file.base.layers_per_block or 2, file.base.plain_up_blocks)
    return "lora_unet_" + (theirs or layer).replace(".", "_"), held


def _encoder_prefix(file: AdapterFile, component: str) -> str:
    """One text encoder is `lora_te_`, several are numbered; a T5 is sd-scripts' third, whatever it is in diffusers."""
    if file.prefix == "transformer":
        t5 = {"flux": "text_encoder_2", "chroma": "text_encoder"}.get(file.models[0])
        return "lora_te3_" if component == t5 else ENCODER_PREFIX[component]
    return ENCODER_PREFIX[component] if component != "text_encoder" or is_xl(file) else "lora_te_"


def _transformer_prefix(file: AdapterFile) -> str:
    return "lora_transformer_" if file.models[0] in ("sd3", "flux") else "lycoris_"


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


def _always_fused(file: AdapterFile) -> bool:
    """Whether programs that read this model's files know fused layers alone, so that the parts have to be one."""
    return file.models[0] == "sd3"


def _is_part(key: str, parts: set[str]) -> bool:
    """Whether the key is of a part of a fused layer; `parts` have "N" for a block's number."""
    name = re.sub(r"_\d+_", "_N_", key.removesuffix(".diff_b"), count=1)
    return any(name.endswith("_" + part.replace(".", "_")) for part in parts)


def _notes(file: AdapterFile, keys: Mapping[str, Tensor]) -> list[str]:
    notes = []
    apart = [key for key in keys if "sd3" in file.models and key.startswith("lora_transformer_")]
    if apart:
        notes.append(
            f"{len({key.partition('.')[0] for key in apart})} layers of Stable Diffusion 3 have no name of the "
            "original checkpoint of their own, and keep diffusers' (lora_transformer_): ComfyUI reads them, Forge not"
        )
    fused = [(ours, names) for (_, ours), table in _model(file).fused.items() for names, _ in table.values()]
    parts = {f"{ours}.N.{name}" for ours, names in fused for name in names}
    lost = [key for key in keys if key.endswith(".diff_b") and _is_part(key, parts)]
    if lost:
        notes.append(
            f"{len(lost)} biases are of parts of one layer of the original checkpoint ({lost[0]}): ComfyUI reads the "
            "weights of such parts, and not their biases (--to diff puts them together where all parts are there)"
        )
    if (
        file.dialect in ("PEFT", "diffusers")
        and file.base.model_class == "unknown"
        and any(".diff_b" in k for k in keys)
    ):
        notes.append(
            "lora_B.bias is written as .diff_b, which other programs add to a layer only where it has a bias; the file "
            "does not say whether its base has them (--base does)"
        )
    in_encoders = {key.partition(".")[0] for key in keys if key.startswith("lora_te") and "layer_norm" in key}
    if any(re.match(r"lora_te[12]?_text_model", name) for name in in_encoders):
        notes.append(
            f"{len(in_encoders)} normalisation layers are of text encoders: ComfyUI looks for CLIP's projections alone "
            "under such names (lora_te), A1111 and LyCORIS for all layers"
        )
    if is_xl(file) and file.base.layers_per_block is None and any("put_blocks_" in key for key in keys):
        notes.append(
            "the original names are those of a UNet with two layers in a block, as SDXL has them; the file does not "
            "say how many its own has (--base does)"
        )
    if file.config.use_rslora:
        notes.append("alpha / sqrt(rank) is written as the alpha that gives the same with alpha / rank")
    if "input" in file.norm_axis or file.norm_axis == "mixed":
        notes.append("the norm by input stays: [1, in], which LyCORIS's own loader does not take")
    if any(name.endswith(".unscaled_magnitude") for name in file.tensors):
        notes.append(
            "ai-toolkit's norm stays under its own name (.magnitude), which only ai-toolkit and this project read"
        )
    return notes
