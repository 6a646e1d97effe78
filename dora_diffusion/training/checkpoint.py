"""Checkpoints: one safetensors file that holds everything a run needs to go on with the same bits.

Random numbers need no state: all that a step draws follows from the seed and the step's number (see loop.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from dora_diffusion.errors import AdapterFileError, TrainingError
from dora_diffusion.formats.storage import read_safetensors, write_safetensors
from dora_diffusion.injection import Adapter
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.optimizers import Numbers, group_numbers, set_group_numbers

__all__ = ["Checkpoint", "checkpoint_path", "read_checkpoint", "write_checkpoint"]

# What may differ between a run and its continuation: where it lies and what is shown, nothing that changes a number.
FREE_KEYS = {
    "out",
    "images",
    "validation_images",
    "preview_prompts",
    "preview_seeds",
    "preview_every",
    "device",
    "validate_every",
    "checkpoint_every",
    "save_every",
}


@dataclass(frozen=True)
class Checkpoint:
    """After `step` steps: the adapter's parameters and the optimizer's moments, by name, and its other numbers."""

    step: int
    adapter: dict[str, Tensor]
    moments: dict[str, Tensor]
    groups: list[Numbers]

    def restore(self, adapter: Adapter, optimizer: Optimizer) -> None:
        adapter.load(self.adapter)
        names = list(adapter.named_parameters())
        state = optimizer.state_dict()
        state["state"] = {
            index: {
                key.removeprefix(name + "/"): value for key, value in self.moments.items() if key.startswith(name + "/")
            }
            for index, name in enumerate(names)
        }
        optimizer.load_state_dict(state)
        set_group_numbers(optimizer, self.groups)


def checkpoint_path(out: Path, kind: str) -> Path:
    return out / "checkpoints" / f"{kind}.safetensors"


def write_checkpoint(
    path: Path, step: int, adapter: Adapter, optimizer: Optimizer, config: TrainConfig, data: str
) -> Path:
    """Replace the checkpoint in one move. `data` is the digest of the training pictures. Raises OutputError."""
    tensors = {f"adapter/{name}": p.detach().cpu() for name, p in adapter.named_parameters().items()}
    states = optimizer.state_dict()["state"]
    for index, name in enumerate(adapter.named_parameters()):
        for key, value in states.get(index, {}).items():
            tensors[f"moments/{name}/{key}"] = torch.as_tensor(value).cpu()
    header = {"format": "pt", "step": str(step), "config": config.model_dump_json(), "data": data}
    header["optimizer"] = json.dumps(group_numbers(optimizer))
    return write_safetensors(tensors, path, header)


def read_checkpoint(path: Path, config: TrainConfig, data: str) -> Checkpoint:
    """Read a checkpoint of this very run. Raises TrainingError when it belongs to another configuration."""
    try:
        tensors, header = read_safetensors(path, "checkpoint")
        step = int(header["step"])
        before, groups = json.loads(header["config"]), json.loads(header.get("optimizer", "[]"))
    except (AdapterFileError, KeyError, ValueError) as error:
        raise TrainingError(f"cannot resume from {path}: {error}. Start the run anew with --overwrite.") from error
    now = json.loads(config.model_dump_json())
    defaults = TrainConfig.model_construct(images="", out="").model_dump(mode="json")
    before = {**defaults, **before}  # a checkpoint of an earlier version lacks the keys that came since
    changed = [key for key in now if key not in FREE_KEYS and before.get(key) != now[key]]
    if changed:
        lines = "\n  ".join(f"{key}: was {before.get(key)!r}, is {now[key]!r}" for key in changed)
        raise TrainingError(
            f"cannot resume {path.parent.parent}: the configuration changed, so the result would be of neither.\n"
            f"  {lines}\nResume with the old values, or train into another folder."
        )
    if header.get("data") != data:
        data_of = f"pictures or captions in {config.images}" + (f", or {config.start_from}," * bool(config.start_from))
        raise TrainingError(
            f"cannot resume {path.parent.parent}: the {data_of} changed since. "
            "Put them back, or train into another folder."
        )
    parts: dict[str, dict[str, Tensor]] = {"adapter": {}, "moments": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        parts[part][name] = tensor
    return Checkpoint(step, parts["adapter"], parts["moments"], groups)
