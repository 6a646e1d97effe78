"""Checkpoints: one safetensors file that holds everything a run needs to go on with the same bits.

Random numbers need no state: all that a step draws follows from the seed and the step's number (see loop.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from dora_diffusion.adapters.injection import Adapter, Kind
from dora_diffusion.errors import AdapterFileError, TrainingError
from dora_diffusion.formats.storage import read_header, read_safetensors, write_safetensors
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.optimizers import Numbers, group_numbers, set_group_numbers

__all__ = ["Checkpoint", "checkpoint_path", "kept_step", "read_checkpoint", "write_checkpoint"]

ANEW = "Start the run anew with --overwrite, or with another --out."

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
        """Raises TrainingError for a checkpoint of another adapter."""
        shapes = {name: p.shape for name, p in adapter.named_parameters().items()}
        if shapes != {name: tensor.shape for name, tensor in self.adapter.items()}:
            raise TrainingError(f"the checkpoint holds other parameters than the run's adapter. {ANEW}")
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


def kept_step(out: Path, kind: Kind) -> int | None:
    """How many steps are in the checkpoint of this kind; None where there is none that can be read."""
    try:
        return int(read_header(checkpoint_path(out, kind), "checkpoint").metadata["step"])
    except (AdapterFileError, KeyError, ValueError):
        return None


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
    header["sum"] = _sum(step, tensors)
    return write_safetensors(tensors, path, header)


def read_checkpoint(path: Path, config: TrainConfig, data: str) -> Checkpoint:
    """Read a checkpoint of this very run. Raises TrainingError when it belongs to another configuration."""
    step, tensors, header, before, groups = _read(path)
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
        parts.setdefault(part, {})[name] = tensor
    return Checkpoint(step, parts["adapter"], parts["moments"], groups)


def _read(path: Path) -> tuple[int, dict[str, Tensor], dict[str, str], dict[str, object], list[Numbers]]:
    """What is in the file: the step, tensors, the header, and in it the configuration and the optimizer's numbers."""
    try:
        tensors, header = read_safetensors(path, "checkpoint")
        step = int(header["step"])
        before, groups = json.loads(header["config"]), json.loads(header.get("optimizer", "[]"))
        if not isinstance(before, dict) or not isinstance(groups, list):
            raise ValueError("its header is not as it was written")
        if not 0 < step < int(before["steps"]):
            raise ValueError(f"it says that {step} of {before['steps']} steps were done")
        if header.get("sum", found := _sum(step, tensors)) != found:  # earlier versions wrote none
            raise ValueError("its numbers are not those that were written, so it is damaged")
    except (AdapterFileError, KeyError, TypeError, ValueError, RecursionError) as error:
        said = f"its header has no {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
        raise TrainingError(f"cannot resume from {path}: {said}. {ANEW}") from error
    return step, tensors, header, before, groups


def _sum(step: int, tensors: Mapping[str, Tensor]) -> str:
    """A hash of the step and all numbers: a file whose bytes a disk has lost has its whole length all the same."""
    digest = hashlib.sha256(str(step).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
