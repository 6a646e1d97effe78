"""Run by InvokeAI's own Python: what InvokeAI makes of adapter files, without this project.

    python stock_invokeai.py FOLDER

FOLDER holds `weights.safetensors`, the base's weights by InvokeAI's names, and `jobs.json`, a list of {"file",
"strength", "base"}. For the n-th job the change of every weight is written to FOLDER/n.safetensors, or FOLDER/n.txt
says why InvokeAI refuses the file.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from invokeai.backend.model_manager.load.model_loaders.lora import LoRALoader
from invokeai.backend.model_manager.taxonomy import BaseModelType, ModelFormat
from invokeai.backend.patches.layer_patcher import LayerPatcher
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX = {"sd-1": "lora_unet_", "sdxl": "lora_unet_", "flux": "lora_transformer-"}


def model_of(weights: dict[str, Tensor]) -> nn.Module:
    """Modules with these weights under these names: all that is needed to find them and to change them."""
    root = nn.Module()
    for name, weight in weights.items():
        *path, leaf = name.split(".")
        parent = root
        for part in path:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        parent.register_parameter(leaf, nn.Parameter(weight, requires_grad=False))
    return root


def change(weights: dict[str, Tensor], file: str, strength: float, base: str) -> dict[str, Tensor]:
    """The weights with the adapter minus the weights without, in float64; those that are not changed are left out."""
    loader = LoRALoader.__new__(LoRALoader)  # its own constructor wants the whole application
    loader._model_base, loader._torch_dtype = BaseModelType(base), torch.float32
    patch = loader._load_model(SimpleNamespace(path=file, format=ModelFormat.LyCORIS, base=loader._model_base))
    model = model_of(weights)
    with LayerPatcher.apply_smart_model_patches(
        model=model,
        patches=[(patch, strength)],
        prefix=PREFIX[base],
        dtype=torch.float32,
        force_direct_patching=True,
    ):
        changes = {n: p.double() - weights[n].double() for n, p in model.named_parameters() if p is not weights[n]}
        return {name: delta for name, delta in changes.items() if delta.any()}


def main() -> None:
    logging.disable(logging.ERROR)
    folder = Path(sys.argv[1])
    weights = load_file(folder / "weights.safetensors")
    for n, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        try:
            save_file(change(weights, **job), folder / f"{n}.safetensors")
        except Exception as error:
            (folder / f"{n}.txt").write_text(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
