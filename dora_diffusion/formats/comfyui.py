"""ComfyUI's dialect: `diffusion_model.<checkpoint's path>.lora_A.weight`, `.lora_B.weight`, `.alpha`, `.dora_scale`.

The one form that ComfyUI takes for every model, and for the newer ones alone (Qwen-Image, Z-Image, FLUX.2, Chroma). A
magnitude has the weight's number of axes, as in kohya's dialect. Parts of a fused layer that have no A in common keep
diffusers' names, behind the prefix where ComfyUI looks for these: it computes each in its own rows. A CLIP goes by
diffusers' name too, which ComfyUI knows for it, and a T5 by what ComfyUI calls it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from dora_diffusion.errors import AdapterFileError
from dora_diffusion.formats.anatomy import MODEL_LABEL
from dora_diffusion.formats.content import AdapterFile, by_layer
from dora_diffusion.formats.cutting import cut, is_open, is_turned
from dora_diffusion.formats.fusing import Held, fused_groups
from dora_diffusion.formats.lycoris import module_keys
from dora_diffusion.formats.names import TEXT_ENCODERS
from dora_diffusion.formats.original import SWAPPED, TRANSFORMERS, Transformer
from dora_diffusion.formats.unet_names import unet_original

__all__ = ["to_keys", "turned_in_comfyui"]

PREFIX = "diffusion_model."
HALVES = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}  # kohya's names and PEFT's
# Where ComfyUI looks for diffusers' names of a fused layer's parts.
APART = {
    "sd3": "transformer.",
    "flux": "transformer.",
    "chroma": "transformer.",
    "flux2": "transformer.",
    "z-image": PREFIX,
}
CLIPS = {
    "unet": ("text_encoder", "text_encoder_2"),
    "sd3": ("text_encoder", "text_encoder_2"),
    "flux": ("text_encoder",),
}
CLIP_LAYER = re.compile(r"text_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12])")
T5S = {"sd3": "text_encoder_3", "flux": "text_encoder_2", "chroma": "text_encoder"}
CANNOT_HOLD = {
    "unscaled_magnitude": "ai-toolkit's norm without alpha / rank, which ComfyUI does not compute",
    **dict.fromkeys(("output_factor", "input_factor"), "IA3's factors, which ComfyUI does not read"),
}


def to_keys(file: AdapterFile) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by the keys of a file, and what is worth saying of them. Raises AdapterFileError."""
    layers = by_layer(file.tensors)
    groups = dict(_groups(file, layers))
    in_groups = {layer for _, members in groups.values() for layer in members}
    keys: dict[str, Tensor] = {}
    for name, (held, members) in groups.items():
        keys |= _module(PREFIX + name, held, file, members[0])
    for layer, held in layers.items():
        if layer not in in_groups:
            name = _name(file, layer, held)
            turned = cut(held, [SWAPPED])[0] if turned_in_comfyui(file, layer) else held
            keys |= _module(name, turned, file, layer)
    return keys, _notes(file)


def _module(name: str, held: Held, file: AdapterFile, layer: str) -> Held:
    if wrong := next((CANNOT_HOLD[p] for p in held if p in CANNOT_HOLD), ""):
        raise AdapterFileError(
            f"{file.path}: {layer} has {wrong}. Write it as a difference, which is exact everywhere "
            "(--to diff, with the base)."
        )
    keys = {}
    for key, tensor in module_keys(name, held, file, layer):
        ending = key.removeprefix(f"{name}.")
        keys[f"{name}.{HALVES.get(ending, ending)}"] = tensor
    return keys


def turned_in_comfyui(file: AdapterFile, layer: str) -> bool:
    """Whether this layer is written by the checkpoint's name, with its two halves in the checkpoint's order."""
    model = _model(file)
    theirs = model.original(layer) if model is not None else None
    return model is not None and theirs is not None and is_turned(model, theirs, by_layer(file.tensors)[layer])


def _model(file: AdapterFile) -> Transformer | None:
    return TRANSFORMERS.get(file.models[0])


def _groups(file: AdapterFile, layers: Mapping[str, Held]) -> list[tuple[str, tuple[Held, list[str]]]]:
    model = _model(file)
    return [] if model is None else list(fused_groups(file, layers, model, differences=True, ranks=False))


def _name(file: AdapterFile, layer: str, held: Held) -> str:
    """The module's name. Raises AdapterFileError for a layer that ComfyUI has no name for, or none that is known."""
    family = file.models[0]
    component, _, path = layer.partition(".")
    if layer in file.flat:
        raise AdapterFileError(
            f"{file.path}: where the dots go in {layer!r} only the model can tell. Give the base with --base."
        )
    found = (
        _in_encoder(family, component, path) if component in TEXT_ENCODERS else _in_denoiser(file, family, layer, held)
    )
    if found is None:
        raise AdapterFileError(
            f"{file.path}: ComfyUI's name for {layer} of {MODEL_LABEL[family]} is not known here, so that it would not "
            "be read there. Write kohya's layout (--to kohya), and see what parity says of it."
        )
    return found


def _in_encoder(family: str, component: str, path: str) -> str | None:
    if component in CLIPS.get(family, ()) and CLIP_LAYER.fullmatch(path):
        return f"{component}.{path}"
    return f"text_encoders.t5xxl.transformer.{path}" if T5S.get(family) == component else None


def _in_denoiser(file: AdapterFile, family: str, layer: str, held: Held) -> str | None:
    model = TRANSFORMERS.get(family)
    if model is None:
        theirs = unet_original(layer, file.base.layers_per_block or 2, file.base.plain_up_blocks)
        return PREFIX + theirs if theirs and family == "unet" else None
    if (theirs := model.original(layer)) and not is_open(model, theirs, held):
        return PREFIX + theirs
    return APART[family] + layer if family in APART and model.has(layer) else None


def _notes(file: AdapterFile) -> list[str]:
    notes = []
    if file.models[0] == "unet" and file.base.layers_per_block is None:
        notes.append(
            "the original names are those of a UNet with two layers in a block, as Stable Diffusion 1, 2 and XL have "
            "them; the file does not say how many its own has (--base does)"
        )
    if any(name.endswith(".magnitude") for name in file.tensors):
        notes.append(
            "ComfyUI reads the norm by output, and divides by ||W0|| where it should divide by ||W0 + s B A|| "
            "(ComfyUI#15458): parity says how far off that is, and parity --repair comfyui writes a file that is right"
        )
    if file.config.use_rslora:
        notes.append("alpha / sqrt(rank) is written as the alpha that gives the same with alpha / rank")
    return notes
