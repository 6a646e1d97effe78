"""Files from one dialect to another: exact where the dialect can hold the adapter, measured where it cannot.

diffusers, kohya and comfyui are the same tensors under other names. `diff` is the whole W' - W0 of each layer, which
every program adds alike; `lora` its best approximation of a rank (Eckart and Young 1936). Both need the base.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dora_diffusion.adapters.injection import AdapterConfig
from dora_diffusion.adapters.layers import LoRAUpdate
from dora_diffusion.adapters.whole import BiasUpdate
from dora_diffusion.errors import AdapterFileError, ConfigError
from dora_diffusion.formats.anatomy import MODEL_LABEL, model_of
from dora_diffusion.formats.content import AdapterFile, by_layer
from dora_diffusion.formats.description import identify_base
from dora_diffusion.formats.findings import counted, some
from dora_diffusion.formats.forms import form_of
from dora_diffusion.formats.loading import attach, by_the_models_names, denoiser_of, given_a_bias
from dora_diffusion.formats.placing import open_names
from dora_diffusion.formats.reading import read_adapter_file
from dora_diffusion.formats.writing import LAYOUT_LABEL, Layout, describe, file_layer, keys_in, write_adapter_file

__all__ = ["DTYPES", "TARGETS", "Conversion", "Target", "check_options", "convert_adapter"]

Target = Literal["diffusers", "kohya", "comfyui", "diff", "lora"]
TARGETS: tuple[Target, ...] = ("diffusers", "kohya", "comfyui", "diff", "lora")
# The layout that each is written in.
LAYOUT_OF: Mapping[Target, Layout] = {
    "diffusers": "diffusers",
    "kohya": "kohya",
    "comfyui": "comfyui",
    "diff": "kohya",
    "lora": "kohya",
}
NOT_ROUNDED = (".rows", ".constraint", ".oft_scaled")  # numbers beside the weights, as alpha is one
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


GIVES_BIASES = (
    "{path} gives a bias (lora_B.bias) to layers that have none in this base, among them {layer}. Programs add a "
    "change of a bias to one that is there, so that no other layout holds it. Write it for PEFT and diffusers: --to "
    "diffusers."
)


@dataclass(frozen=True)
class Conversion:
    """What was written, and what it cost: `residuals` by layer, ||dW - dW'|| / ||dW|| of the update, for `lora`;
    `rounding` the same of the tensor that rounding changed most, where a dtype was asked for."""

    path: Path
    file: AdapterFile
    notes: tuple[str, ...]
    residuals: Mapping[str, float]
    rounding: float | None
    rounded_worst: str

    def report(self) -> Iterator[str]:
        """What a person wants to know of it, line by line."""
        for layer, residual in sorted(self.residuals.items(), key=lambda item: -item[1]):
            yield f"  {residual:8.3%} of the update is left out in {layer}"
        if self.residuals:
            mean = sum(self.residuals.values()) / len(self.residuals)
            worst = max(self.residuals.values())
            yield f"rank {self.file.config.rank}: {mean:.3%} of the update left out on average, {worst:.3%} at worst"
        if self.rounding is not None:
            yield f"rounding changes a tensor by {self.rounding:.2e} of its size at most ({self.rounded_worst})"
        yield from (f"note: {note}" for note in self.notes)
        if self.file.left_out:
            yield f"left out: {counted(len(self.file.left_out))} of the file"
        yield f"{self.path}: {self.file.config.kind_label}, {len(self.file.layers)} layers, read as {self.file.dialect}"


def convert_adapter(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: Target,
    *,
    base: object = None,
    dtype: str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    partial: bool = False,
) -> Conversion:
    """Write the adapter in another dialect. `base` is a pipeline or model, which `diff` and `lora` need; `partial`
    leaves out what cannot be read or does not fit the base, and says so.

    Raises AdapterFileError for what the dialect cannot hold, ConfigError for options that cannot be used, OutputError.
    """
    check_options(to, dtype, rank, alpha, base is not None)
    file = read_adapter_file(source, alpha=alpha, partial=partial)
    file.check_universal()
    residuals: dict[str, float] = {}
    layout = LAYOUT_OF[to]
    if to in ("diff", "lora"):
        file, residuals = _by_difference(file, base, to, rank, partial)
    elif base is not None:
        file = _with_base(file, base, partial)
        if layout == "kohya" and (given := given_a_bias(base, file)):
            raise AdapterFileError(GIVES_BIASES.format(path=file.path, layer=given[0]))
    else:
        _check_told(file, layout)
    file, rounding, worst = _rounded(file, dtype)
    conversion: dict[str, str | int | float | None] = {"from": file.dialect, "to": to}
    conversion |= {"dtype": dtype, "rounding": rounding} if dtype else {}
    conversion |= {"worst_residual": max(residuals.values())} if residuals else {}
    path, notes = write_adapter_file(file, Path(out), layout, conversion)
    return Conversion(path, file, (*file.notes, *notes), residuals, rounding, worst)


def check_options(to: str, dtype: str | None, rank: int | None, alpha: float | None, has_base: bool) -> None:
    """Raise ConfigError for options that do not go together; nothing is read."""
    if to not in TARGETS:
        raise ConfigError(f"to is {to!r}; it must be one of {', '.join(TARGETS)}.")
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; it must be one of {', '.join(DTYPES)}.")
    if rank is not None and (to != "lora" or rank < 1):
        raise ConfigError(f"rank is {rank}; it goes with --to lora, and is at least 1.")
    if alpha is not None and not alpha > 0:
        raise ConfigError(f"alpha is {alpha:g}; it must be above 0.")
    if to in ("diff", "lora") and not has_base:
        raise ConfigError(f"--to {to} computes W' - W0 of each layer, so it needs the base: give --base.")


def _with_base(file: AdapterFile, base: object, partial: bool) -> AdapterFile:
    """The file with its layers by the base's own paths, and the base described."""
    here = by_the_models_names(base, file, partial)
    renamed = {layer: file_layer(layer) for layer in here.layers}
    tensors = {f"{renamed[la]}.{p}": t for la, held in by_layer(here.tensors).items() for p, t in held.items()}
    config = replace(
        here.config,
        dropout=file.config.dropout,
        rank_pattern={renamed[la]: r for la, r in here.config.rank_pattern.items()},
        alpha_pattern={renamed[la]: a for la, a in here.config.alpha_pattern.items()},
    )
    identity = identify_base(denoiser_of(base))
    named = replace(here, tensors=tensors, config=config, written={}, models=(model_of(identity.model_class),))
    named = replace(named, fellows={renamed[la]: tuple(renamed[f] for f in fs) for la, fs in here.fellows.items()})
    identity = identity.model_copy(update={"name": file.base.name}) if file.base.name != "unknown" else identity
    training = file.description.training if file.description else None
    return replace(named, description=describe(named, identity, training))


def _check_told(file: AdapterFile, layout: Layout) -> None:
    """Raises AdapterFileError where nothing in the file says which layers its names mean, or how to name them."""
    models = [MODEL_LABEL[model] for model in file.models]
    if unclear := open_names(file):
        raise AdapterFileError(
            f"{file.path}: {some(unclear)} would be other layers in {' than in '.join(models)}, and nothing in the "
            "file says which it is for. Give the base with --base."
        )
    names = {tuple(keys_in(replace(file, models=(m,)), layout)[0]) for m in file.models} if len(models) > 1 else set()
    if layout != "diffusers" and len(names) > 1:
        raise AdapterFileError(
            f"{file.path} has layers that {' and '.join(models)} all have, and each goes by other names in "
            f"{LAYOUT_LABEL[layout]} layout. Give the base with --base."
        )


@torch.no_grad()
def _by_difference(
    file: AdapterFile, base: object, to: Target, rank: int | None, partial: bool
) -> tuple[AdapterFile, dict[str, float]]:
    named = _with_base(file, base, partial)
    if to == "lora":
        _check_all_low_rank(named)
    rank = rank or file.config.rank
    adapter = attach(base, named)
    tensors: dict[str, Tensor] = {}
    residuals: dict[str, float] = {}
    try:
        for path, update in adapter.updates().items():
            layer, delta = file_layer(path), update.delta_weight().cpu()
            if to == "diff":
                tensors |= {
                    f"{layer}.{name}": tensor
                    for name, tensor in whole_difference(file.path, layer, update, delta).items()
                }
            else:
                A, B, residuals[layer] = best_low_rank(delta, rank)
                tensors |= {f"{layer}.lora_A": A, f"{layer}.lora_B": B}
    finally:
        adapter.eject()
    ranks = {la: form_of(held).rank_of(held) for la, held in by_layer(tensors).items()}
    config = AdapterConfig(
        kind="full" if to == "diff" else "lora",
        rank=max(ranks.values()),
        alpha=float(max(ranks.values())),
        target_modules=named.config.target_modules,
        rank_pattern={layer: r for layer, r in ranks.items() if r != max(ranks.values())},
        alpha_pattern={layer: float(r) for layer, r in ranks.items() if r != max(ranks.values())},
    )
    return replace(named, tensors=tensors, config=config, notes=file.notes), residuals


def whole_difference(path: Path, layer: str, update: LoRAUpdate, delta: Tensor) -> dict[str, Tensor]:
    """The parameters of a whole difference that is the update: of the weight, and of the bias where it changes it.
    Raises AdapterFileError for a bias that the base's layer does not have."""
    held = {} if isinstance(update, BiasUpdate) else {"difference": delta}
    if update.bias_difference is not None:
        if not update.frozen.has_bias:
            raise AdapterFileError(GIVES_BIASES.format(path=path, layer=layer))
        held["bias_difference"] = update.bias_difference.detach().cpu()
    return held


def _check_all_low_rank(file: AdapterFile) -> None:
    """Raises AdapterFileError for changes that no product B A is."""
    if file.vectors:
        raise AdapterFileError(
            f"{file.path} changes {file.vectors}, which a LoRA cannot hold. Write it as differences, which are exact "
            "everywhere (--to diff), or in kohya's layout, which keeps all as it is (--to kohya)."
        )


def best_low_rank(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """A [r, in, ...] and B [out, r, ...] with B A closest to delta, and the part left out: ||delta - B A|| / ||delta||.

    In float64 by the eigenvectors of the smaller of dW dW^T and dW^T dW, which is quicker than a whole SVD.
    """
    W = delta.flatten(1).double()
    tall = W.shape[0] > W.shape[1]
    gram = W.T @ W if tall else W @ W.T
    rank = min(rank, gram.shape[0])
    U = torch.linalg.eigh(gram).eigenvectors[:, -rank:].flip(1)  # [n, r], the largest first
    B, A = (W @ U, U.T) if tall else (U, U.T @ W)
    norm = W.norm()
    residual = float((W - B @ A).norm() / norm) if norm > 0 else 0.0
    # B and A of about the same size, so that half precision serves both.
    size = (B.norm() / A.norm().clamp_min(1e-30)).sqrt().clamp_min(1e-30)
    A, B = (A * size).float(), (B / size).float()
    ones = (1,) * (delta.dim() - 2)
    return A.reshape(rank, *delta.shape[1:]), B.reshape(-1, rank, *ones), residual


def _rounded(file: AdapterFile, dtype: str | None) -> tuple[AdapterFile, float | None, str]:
    """The file in a dtype, the largest relative change of a tensor, and which it was. Raises AdapterFileError."""
    if dtype is None:
        return file, None, ""
    tensors, worst, name_of_worst = {}, 0.0, ""
    for name, tensor in file.tensors.items():
        if name.endswith(NOT_ROUNDED):
            tensors[name] = tensor
            continue
        rounded = tensor.to(DTYPES[dtype])
        if not rounded.isfinite().all():
            raise AdapterFileError(f"{file.path}: {name} has values too large for {dtype}. Use bfloat16 or float32.")
        norm = tensor.double().norm()
        change = float((rounded.double() - tensor.double()).norm() / norm) if norm > 0 else 0.0
        if change > worst:
            worst, name_of_worst = change, name
        tensors[name] = rounded
    return replace(file, tensors=tensors), worst, name_of_worst
