"""The PEFT / diffusers dialect: `unet.<layer>.lora_A.weight`, `.lora_B.weight`, `.lora_magnitude_vector`.

The scale is in the JSON under `lora_adapter_metadata` in the safetensors header: PEFT's LoraConfig, each key behind the
model's prefix ("unet.r", "unet.lora_alpha", ...). Without it diffusers takes alpha = rank in every layer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from torch import Tensor

from dora_diffusion.injection import AdapterConfig

__all__ = ["LEAVES", "METADATA_KEY", "PREFIXES", "from_keys", "peft_config", "scales", "to_keys"]

METADATA_KEY = "lora_adapter_metadata"
PREFIXES = ("unet", "transformer")
# What a key ends with, and the parameter of ours that it holds. PEFT reads both spellings of the magnitude; the first
# one of each parameter is written.
LEAVES = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
}
_ENDING = {parameter: leaf for leaf, parameter in reversed(LEAVES.items())}


def to_keys(parameters: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """`<layer>.lora_A` and so on, to the keys of a file. A convolution's magnitude is [1, out, 1, 1] there."""
    tensors = {}
    for name, tensor in parameters.items():
        layer, _, parameter = name.rpartition(".")
        if parameter == "magnitude" and parameters[f"{layer}.lora_A"].dim() == 4:
            tensor = tensor.reshape(1, -1, 1, 1)
        tensors[f"{prefix}.{layer}.{_ENDING[parameter]}"] = tensor
    return tensors


def from_keys(tensors: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor], list[str]]:
    """The prefix, the parameters by `<layer>.<parameter>`, and the keys that belong to neither."""
    prefix = next((p for p in PREFIXES if any(key.startswith(p + ".") for key in tensors)), "")
    parameters, unknown = {}, []
    for key, tensor in tensors.items():
        leaf = next((leaf for leaf in LEAVES if key.endswith("." + leaf)), None)
        if leaf is None or not key.startswith(prefix + "." if prefix else ""):
            unknown.append(key)
            continue
        layer = key[: -len(leaf) - 1].removeprefix(prefix + "." if prefix else "")
        parameters[f"{layer}.{LEAVES[leaf]}"] = tensor.flatten() if LEAVES[leaf] == "magnitude" else tensor
    return prefix, parameters, unknown


def peft_config(config: AdapterConfig, layers: list[str], prefix: str) -> str:
    """The header's JSON, from which diffusers builds PEFT's LoraConfig."""
    fields = {
        "r": config.rank,
        "lora_alpha": config.alpha,
        "rank_pattern": {f"^{name}": rank for name, rank in config.rank_pattern.items()},
        "alpha_pattern": {f"^{name}": alpha for name, alpha in config.alpha_pattern.items()},
        "lora_dropout": config.dropout,
        "target_modules": layers,
        "use_dora": config.kind == "dora",
        "use_rslora": config.use_rslora,
        "peft_type": "LORA",
        "bias": "none",
    }
    return json.dumps({f"{prefix}.{key}": value for key, value in fields.items()}, sort_keys=True)


def scales(header: str | None, prefix: str) -> dict[str, object]:
    """LoraConfig's fields from the header's JSON, without the prefix; empty when there are none. Raises ValueError."""
    if header is None:
        return {}
    fields = json.loads(header)
    if not isinstance(fields, dict):
        raise ValueError(f"{METADATA_KEY} is no table")
    start = prefix + "." if prefix else ""
    return {key.removeprefix(start): value for key, value in fields.items() if key.startswith(start)}
