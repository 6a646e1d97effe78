"""What an adapter file is, in facts: read from its tensors and its header, and laid against a base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import nn

from dora_diffusion.comparison.cache import file_digest
from dora_diffusion.formats.description import identify_base
from dora_diffusion.formats.files import AdapterFile, read_adapter_file
from dora_diffusion.injection import adaptable_layers

__all__ = ["AdapterCard", "Fit", "card_of", "fit_of"]


@dataclass(frozen=True)
class Fit:
    """How an adapter fits a base: layers of its file that the base has, those it lacks, and the base's fingerprint."""

    matched: int
    unmatched: tuple[str, ...]
    fingerprint: str
    same_weights: bool


@dataclass(frozen=True)
class AdapterCard:
    """`kind` is what the tensors say, whatever the header claims; `parameters` counts the trained numbers."""

    kind: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    layers: int
    parameters: int
    size: int
    sha256: str
    base_name: str
    base_class: str
    base_fingerprint: str
    steps: int | None


def card_of(path: Path) -> AdapterCard:
    """Raises AdapterFileError."""
    file = read_adapter_file(path)
    described = file.description
    steps = described.training.get("steps") if described else None
    return AdapterCard(
        kind=file.config.kind_label,
        rank=file.config.rank,
        alpha=file.config.alpha,
        targets=_targets(file),
        layers=len(file.layers),
        parameters=sum(tensor.numel() for tensor in file.tensors.values()),
        size=path.stat().st_size,
        sha256=file_digest(path),
        base_name=file.base.name,
        base_class=file.base.model_class,
        base_fingerprint=file.base.fingerprint if described else "",
        steps=int(steps) if isinstance(steps, int | float) else None,
    )


def fit_of(path: Path, model: nn.Module) -> Fit:
    """Raises AdapterFileError."""
    file = read_adapter_file(path)
    views = adaptable_layers(model)
    unmatched = tuple(layer for layer in file.layers if not _matches(file, layer, views))
    here = identify_base(model, list(file.base.sketch) or None)
    return Fit(len(file.layers) - len(unmatched), unmatched, here.fingerprint, file.base.same_weights(here))


def _matches(file: AdapterFile, layer: str, views: dict) -> bool:
    if layer not in views:
        return False
    A, B = file.tensors[f"{layer}.lora_A"], file.tensors[f"{layer}.lora_B"]
    return tuple(A.shape[1:]) == tuple(views[layer].in_shape) and B.shape[0] == views[layer].out_features


def _targets(file: AdapterFile) -> tuple[str, ...]:
    """The last parts of the layers' names, such as to_q and to_out.0."""
    names = []
    for layer in file.layers:
        parts = layer.split(".")
        names.append(".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1])
    return tuple(dict.fromkeys(names))
