"""What a file says of itself, without a base: kind, dialect, sizes, how it was trained."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from dora_diffusion.formats.content import by_layer
from dora_diffusion.formats.description import MADE_FOR_KEY
from dora_diffusion.formats.files import read_adapter_file
from dora_diffusion.formats.findings import counted
from dora_diffusion.formats.forms import form_of
from dora_diffusion.inspection.changes import source_kind, weight_files

__all__ = ["Summary", "summarise"]

CHUNK = 1 << 20


@dataclass(frozen=True)
class Summary:
    """One file or folder. Ranks and alphas with the number of layers that have them; what is unknown is None or empty.

    `targets` are the ends of the layers' names, with their number.
    """

    path: Path
    kind: str
    dialect: str
    size: int
    sha256: str
    ranks: dict[int, int] = field(default_factory=dict)
    alphas: dict[float, int] = field(default_factory=dict)
    use_rslora: bool = False
    norm_axis: str = "none"
    targets: dict[str, int] = field(default_factory=dict)
    layers: int = 0
    parameters: int = 0
    base: str = ""
    fingerprint: str = ""
    training: dict[str, str | int | float | None] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def rank(self) -> int | None:
        """The rank that most layers have."""
        return max(self.ranks, key=lambda r: self.ranks[r]) if self.ranks else None


def summarise(path: Path, partial: bool = False) -> Summary:
    """Read the file and describe it, or with `partial` what can be read of it. Raises AdapterFileError."""
    kind = source_kind(path)
    if kind != "adapter":
        files = weight_files(path)
        dialect = "original checkpoint" if kind == "checkpoint" else "diffusers model"
        return Summary(path, "full fine-tuning", dialect, sum(p.stat().st_size for p in files), _digest(files))
    file = read_adapter_file(path, partial=partial)
    config = file.config
    ranked = [layer for layer, held in by_layer(file.tensors).items() if form_of(held).is_scaled(held)]
    known = file.description is not None
    made_for = file.header.get(MADE_FOR_KEY)
    alone = (f"made for one program alone, wrong in every other: {made_for}",) if made_for else ()
    return Summary(
        path=path,
        kind=config.kind_label,
        dialect=file.dialect,
        size=file.path.stat().st_size,
        sha256=_digest([file.path]),
        ranks=dict(Counter(config.rank_of(layer) for layer in ranked)),
        alphas=dict(Counter(config.alpha_of(layer) for layer in ranked)),
        use_rslora=config.use_rslora,
        norm_axis=file.norm_axis,
        targets=dict(Counter(_target(layer) for layer in file.layers).most_common()),
        layers=len(file.layers),
        parameters=sum(tensor.numel() for tensor in file.tensors.values()),
        base=file.base.name if known else "",
        fingerprint=file.base.fingerprint if known else "",
        training=dict(file.description.training) if file.description else {},
        notes=(
            *((f"it changes {file.vectors} too",) if file.vectors else ()),
            *file.notes,
            *alone,
            *([f"left out: {counted(len(file.left_out))}"] if file.left_out else []),
        ),
    )


def _target(layer: str) -> str:
    """What a layer is in its block: "attn1.to_q", "ff.net.2"; a layer of no block keeps its name."""
    return re.sub(r"^.*(?:blocks|block|attentions|resnets|samplers|layers)\.\d+\.", "", layer)


def _digest(files: list[Path]) -> str:
    """SHA-256 of the file, or of several one after the other."""
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
