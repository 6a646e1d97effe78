"""A base with adapters in its weights, saved as a diffusers pipeline: right in every program that reads the folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from dora_diffusion.errors import ConfigError, OutputError
from dora_diffusion.formats.files import load_adapter
from dora_diffusion.markdown import code, plain
from dora_diffusion.models.loading import Base
from dora_diffusion.outputs import make_folder, scratch_folder, writing
from dora_diffusion.paths import obstacle

__all__ = ["check_new_folder", "save_merged"]

CARD = """# {title}, with adapters in its weights

Made with DoRA Diffusion from the base {base} and

{adapters}

A diffusers pipeline in {dtype}: `DiffusionPipeline.from_pretrained("FOLDER")`.
"""


def save_merged(
    base: Base, adapters: Sequence[Path], strengths: Sequence[float], out: Path, dtype: torch.dtype = torch.float16
) -> Path:
    """Merge the adapters into the base's weights and save the whole pipeline in `out`; the base is changed.

    The folder appears when it is whole. Raises the errors of loading, ConfigError for a folder that holds something or
    a dtype that is too small for a weight, OutputError.
    """
    check_new_folder(out)
    loaded = [load_adapter(base, path, strength=value) for path, value in zip(adapters, strengths, strict=True)]
    loaded[0].merge(*loaded[1:])
    for name, part in base.pipe.components.items():
        if isinstance(part, nn.Module):
            _cast(part, name, dtype)
    lines = "\n".join(
        f"- {code(path.name)} at strength {value:g}" for path, value in zip(adapters, strengths, strict=True)
    )
    dtype_name = str(dtype).removeprefix("torch.")
    card = CARD.format(title=plain(base.name), base=code(base.name), adapters=lines, dtype=dtype_name)
    with writing(out), scratch_folder(out) as scratch:
        whole = scratch / "base"
        base.pipe.save_pretrained(whole)
        (whole / "README.md").write_text(card, encoding="utf-8")
        whole.replace(os.path.realpath(out))
    return out


def check_new_folder(out: Path) -> None:
    """Make sure that a folder can be made here. Raises ConfigError and OutputError."""
    if reason := obstacle(out):
        raise OutputError(f"cannot write {out}: it {reason}. Give another --out.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} holds something already. Give another --out.")
    make_folder(out.parent)


def _cast(part: nn.Module, name: str, dtype: torch.dtype) -> None:
    part.to(dtype)
    for key, weight in part.named_parameters():
        if not weight.isfinite().all():
            raise ConfigError(f"{name}: {key} has values too large for {dtype}. Use --dtype bfloat16 or float32.")
