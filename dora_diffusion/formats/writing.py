"""Adapters to files, in each dialect, with their whole description in the header."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dora_diffusion.adapters.fellows import SharedNormDoRAUpdate
from dora_diffusion.adapters.injection import Adapter
from dora_diffusion.formats import diffusers, kohya
from dora_diffusion.formats.anatomy import model_of
from dora_diffusion.formats.content import AdapterFile
from dora_diffusion.formats.description import HEADER_KEY, BaseIdentity, Description, identify_base
from dora_diffusion.formats.forms import with_axes
from dora_diffusion.formats.modelspec import modelspec
from dora_diffusion.formats.scales import ALPHA_KEYS, RANK_KEYS
from dora_diffusion.formats.storage import write_safetensors

__all__ = ["Layout", "describe", "file_layer", "file_of", "save_adapter", "write_adapter_file"]

Layout = Literal["diffusers", "kohya"]
Summary = Mapping[str, str | int | float | None]


def save_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    training: Summary | None = None,
    base_name: str | None = None,
) -> Path:
    """Write the adapter in PEFT/diffusers layout, which stock `pipe.load_lora_weights(path)` reads too.

    What that layout has no name for, a norm by input and forms like LoKr, is written in kohya's. The header carries the
    configuration, the base's identity and `training`, a summary of the run. The file appears under its name only when
    it is whole. Raises OutputError, and AdapterFileError for an adapter that the layout cannot hold (a whole
    difference).
    """
    file = file_of(adapter, Path(path), training=training, base_name=base_name)
    held_by_peft = file.norm_axis != "input" and file.config.parametrisation == "lora"
    return write_adapter_file(file, Path(path), "diffusers" if held_by_peft else "kohya")[0]


def file_of(
    adapter: Adapter, path: Path, *, training: Summary | None = None, base_name: str | None = None
) -> AdapterFile:
    """The adapter in a model as the file it would be. Raises AdapterStateError."""
    if not adapter.layers:
        adapter._require_layers("save")
    base = identify_base(adapter.model)
    tensors = {
        f"{file_layer(path)}.{name}": tensor
        for path, update in adapter.updates().items()
        for name, tensor in with_axes(
            {name: p.detach().to("cpu", torch.float32) for name, p in update.named_parameters()}, update.frozen.in_shape
        ).items()
    }
    config = adapter.config
    config = replace(
        config,
        rank_pattern={file_layer(layer): rank for layer, rank in config.rank_pattern.items()},
        alpha_pattern={file_layer(layer): alpha for layer, alpha in config.alpha_pattern.items()},
    )
    prefix = "transformer" if "Transformer" in type(adapter.model).__name__ else "unet"
    file = AdapterFile(path, prefix, config, tensors, None, models=(model_of(base.model_class),))
    file = replace(file, fellows=_fellows(adapter))
    base = base.model_copy(update={"name": base_name}) if base_name else base
    return replace(file, description=describe(file, base, training))


def _fellows(adapter: Adapter) -> dict[str, tuple[str, ...]]:
    """The parts of fused layers whose updates share a norm."""
    updates = adapter.updates()
    names = {id(update): file_layer(path) for path, update in updates.items()}
    shared = [update for update in updates.values() if isinstance(update, SharedNormDoRAUpdate)]
    return {names[id(update)]: tuple(names[id(fellow)] for fellow in update.fellows) for update in shared}


def file_layer(name: str) -> str:
    """transformers 5 has a CLIPTextModel without `text_model`; files name it all the same."""
    encoder, _, path = name.partition(".")
    return (
        f"{encoder}.text_model.{path}" if encoder.startswith("text_encoder") and path.startswith("encoder.") else name
    )


def describe(file: AdapterFile, base: BaseIdentity, training: Summary | None = None) -> Description:
    config = file.config
    return Description(
        kind=config.kind,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        use_rslora=config.use_rslora,
        target_modules=config.target_modules,
        norm_axis=file.norm_axis,  # type: ignore[arg-type]
        parametrisation=config.parametrisation,
        factor=config.factor,
        full_matrix=config.full_matrix,
        base=base,
        training=dict(training or {}),
    )


def write_adapter_file(
    file: AdapterFile, path: Path, layout: Layout, conversion: Summary | None = None
) -> tuple[Path, list[str]]:
    """Write the file in a layout; with it come notes on what the layout says otherwise.

    Other programs' entries in the header are kept, ours are written anew. Raises OutputError, AdapterFileError.
    """
    description = file.description or describe(file, BaseIdentity())
    description = description.model_copy(
        update={
            "norm_axis": file.norm_axis,
            "kind": file.config.kind,
            "parametrisation": file.config.parametrisation,
            "factor": file.config.factor,
            "full_matrix": file.config.full_matrix,
            "rank": file.config.rank,
            "alpha": file.config.alpha,
            "use_rslora": file.config.use_rslora,
            "conversion": {**description.conversion, **(conversion or {})},
        }
    )
    anew = {HEADER_KEY, diffusers.METADATA_KEY, *ALPHA_KEYS, *RANK_KEYS}  # what is said here, as it is now
    kept = {key: value for key, value in file.header.items() if key not in anew}
    metadata = {**kept, "format": "pt", HEADER_KEY: description.model_dump_json()}
    if layout == "kohya":
        metadata = {**modelspec(replace(file, path=path), description, is_xl=kohya.is_xl(file)), **metadata}
    if layout == "diffusers":
        tensors: dict[str, Tensor] = diffusers.to_keys(file)
        notes: list[str] = []
        metadata[diffusers.METADATA_KEY] = diffusers.peft_config(file)
    else:
        tensors, notes = kohya.to_keys(file)
    return write_safetensors(tensors, path, metadata), notes
