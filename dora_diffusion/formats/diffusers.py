"""The PEFT / diffusers dialect: `unet.<layer>.lora_A.weight`, `.lora_B.weight`, `.lora_magnitude_vector`.

The scale is in the JSON under `lora_adapter_metadata` in the safetensors header: PEFT's LoraConfig of each component,
each key behind its prefix ("unet.r", "text_encoder.lora_alpha"). Without it diffusers takes alpha = rank everywhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dora_diffusion.adapters.injection import AdapterConfig
from dora_diffusion.errors import AdapterFileError
from dora_diffusion.formats.content import AdapterFile, by_layer
from dora_diffusion.formats.forms import form_of
from dora_diffusion.formats.names import TEXT_ENCODERS

__all__ = ["METADATA_KEY", "can_hold", "peft_config", "scales", "to_keys"]

METADATA_KEY = "lora_adapter_metadata"
ENDINGS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
    "bias_difference": "lora_B.bias",
}
CANNOT_HOLD = {
    "input_magnitude": "a norm by input, which PEFT does not compute",
    "unscaled_magnitude": "ai-toolkit's norm without alpha / rank, which PEFT does not compute",
    "shared_magnitude": "a norm by input over the rows of a fused layer, which PEFT does not compute",
    "difference": "a whole difference, which PEFT does not have",
    "replacement": "a whole weight in the place of the base's, which PEFT does not have",
    "bias_difference": "a change of the bias without B A, or beside a magnitude, which PEFT does not have",
}


def to_keys(file: AdapterFile) -> dict[str, Tensor]:
    """The tensors by the keys of a file. A convolution's magnitude is [1, out, 1, 1] there. Raises AdapterFileError."""
    tensors = {}
    for layer, held in _with_all_biases(file).items():
        for parameter, tensor in held.items():
            if parameter not in ENDINGS or (parameter == "bias_difference" and not _holds_bias(held)):
                reason = CANNOT_HOLD.get(parameter) or f"{form_of(held).label}, which this layout does not hold"
                raise AdapterFileError(
                    f"{file.path}: {layer} has {reason}. Write it as a difference, which is exact everywhere "
                    "(--to diff, with the base), or as it is (--to kohya)."
                )
            if layer in file.flat:
                raise AdapterFileError(
                    f"{file.path}: where the dots go in {layer!r} only the model can tell. Give the base with --base."
                )
            if parameter == "magnitude" and held["lora_A"].dim() == 4:
                tensor = tensor.reshape(1, -1, 1, 1)
            if parameter == "bias_difference":
                tensor = tensor / file.scale_of(layer)  # PEFT scales it with B A
            in_encoder = layer.startswith(TEXT_ENCODERS)
            # diffusers' models take both spellings of the magnitude, transformers' only the longer one.
            ending = ENDINGS[parameter] + ".weight" * (in_encoder and parameter == "magnitude")
            tensors[f"{layer}.{ending}" if in_encoder else f"{file.prefix}.{layer}.{ending}"] = tensor
    return tensors


def can_hold(file: AdapterFile) -> bool:
    """Whether every update of the file is one that PEFT has."""
    layers = by_layer(file.tensors).values()
    return all(
        held.keys() <= ENDINGS.keys() and ("bias_difference" not in held or _holds_bias(held)) for held in layers
    )


def _holds_bias(held: Mapping[str, Tensor]) -> bool:
    return "lora_B" in held and not any("magnitude" in parameter for parameter in held)


def _with_all_biases(file: AdapterFile) -> dict[str, dict[str, Tensor]]:
    """The layers; where one of a component has a bias, zeros in all, as PEFT has one in every layer or in none."""
    layers = by_layer(file.tensors)
    components = {
        la.partition(".")[0] if la.startswith(TEXT_ENCODERS) else "" for la in layers if "bias_difference" in layers[la]
    }
    for layer, held in layers.items():
        component = layer.partition(".")[0] if layer.startswith(TEXT_ENCODERS) else ""
        if component in components and _holds_bias(held) and "bias_difference" not in held:
            held["bias_difference"] = torch.zeros(len(held["lora_B"]), dtype=held["lora_B"].dtype)
    return layers


def peft_config(file: AdapterFile) -> str:
    """The header's JSON, from which diffusers builds PEFT's LoraConfig of each component."""
    fields: dict[str, object] = {}
    for prefix in (file.prefix, *TEXT_ENCODERS):
        layers = [layer for layer in file.layers if layer.startswith(f"{prefix}.") == (prefix in TEXT_ENCODERS)]
        if prefix == file.prefix:
            layers = [layer for layer in layers if not layer.startswith(TEXT_ENCODERS)]
        start = f"{prefix}." if prefix in TEXT_ENCODERS else ""
        if layers:
            held = _lora_config(file.config, [layer.removeprefix(start) for layer in layers], start)
            is_dora = any(f"{layer}.magnitude" in file.tensors for layer in layers)
            has_biases = any(f"{layer}.bias_difference" in file.tensors for layer in layers)
            held |= {"use_dora": is_dora} | ({"lora_bias": True} if has_biases else {})
            fields |= {f"{prefix}.{key}": value for key, value in held.items()}
    return json.dumps(fields, sort_keys=True)


def _lora_config(config: AdapterConfig, names: list[str], start: str) -> dict[str, object]:
    def patterns(by_layer: Mapping[str, float]) -> dict[str, float]:
        inside = {layer.removeprefix(start): value for layer, value in by_layer.items() if layer.startswith(start)}
        return {_pattern(name, start): value for name, value in inside.items() if name in names}

    return {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "rank_pattern": patterns(config.rank_pattern),
        "alpha_pattern": patterns(config.alpha_pattern),
        "lora_dropout": config.dropout,
        "target_modules": [_without_text_model(name, start) for name in names],
        "use_rslora": config.use_rslora,
        "peft_type": "LORA",
        "bias": "none",
    }


def _pattern(name: str, start: str) -> str:
    """What PEFT matches with the end of a layer's name."""
    return re.escape(_without_text_model(name, start)) if start else f"^{re.escape(name)}"


def _without_text_model(name: str, start: str) -> str:
    """transformers 5 has a CLIPTextModel without `text_model`; diffusers takes it out of the keys, not out of these.
    The end of the name is enough for PEFT."""
    return name.removeprefix("text_model.") if start else name


def scales(header: str | None, prefix: str) -> dict[str, object]:
    """LoraConfig's fields from the header's JSON, without the prefix; empty when there are none. Raises ValueError."""
    if header is None:
        return {}
    fields = json.loads(header)
    if not isinstance(fields, dict):
        raise ValueError(f"{METADATA_KEY} is no table")
    start = prefix + "." if prefix else ""
    return {key.removeprefix(start): value for key, value in fields.items() if key.startswith(start)}
