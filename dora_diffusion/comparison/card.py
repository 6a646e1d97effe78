"""What an adapter file is, in facts: read from its tensors and its header."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.comparison.cache import file_digest
from dora_diffusion.formats.files import AdapterFile, read_what_fits

__all__ = ["AdapterCard", "card_of"]


@dataclass(frozen=True)
class AdapterCard:
    """`kind` is what the tensors say, whatever the header claims; `parameters` counts the trained numbers, `left_out`
    the keys that are not read."""

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
    left_out: int = 0


def card_of(path: Path) -> AdapterCard:
    """Of what can be read of the file. Raises AdapterFileError where that is nothing."""
    file = read_what_fits(path)
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
        left_out=len(file.left_out),
    )


def _targets(file: AdapterFile) -> tuple[str, ...]:
    """The last parts of the layers' names, such as to_q and to_out.0."""
    names = []
    for layer in file.layers:
        parts = layer.split(".")
        names.append(".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1])
    return tuple(dict.fromkeys(names))
