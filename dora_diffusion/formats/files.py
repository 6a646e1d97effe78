"""Read, write and report adapter files."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from dora_diffusion.errors import AdapterFileError, AdapterMismatchError, ConfigError, nearest
from dora_diffusion.formats import diffusers as dialect
from dora_diffusion.formats.description import HEADER_KEY, BaseIdentity, Description, identify_base
from dora_diffusion.formats.storage import read_safetensors, write_safetensors
from dora_diffusion.frozen import FrozenLayer
from dora_diffusion.injection import Adapter, AdapterConfig, adaptable_layers, check_strength, inject_into

__all__ = [
    "AdapterFile",
    "attach",
    "denoiser_of",
    "load_adapter",
    "read_adapter_file",
    "save_adapter",
]

MENTIONED = 5  # keys named in one message; the rest is counted
OTHER_DIALECTS = {
    "dora_scale": "kohya / LyCORIS DoRA",
    "lora_down": "kohya / LyCORIS LoRA",
    "weight_m_wdecomp": "NVlabs DoRA",
    "hada_w": "LyCORIS LoHa",
    "lokr_w": "LyCORIS LoKr",
}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from its file: `tensors` by `<layer>.lora_A`, `.lora_B`, `.magnitude`."""

    path: Path
    prefix: str
    config: AdapterConfig
    tensors: dict[str, Tensor]
    description: Description | None

    @property
    def layers(self) -> list[str]:
        return [name.removesuffix(".lora_A") for name in self.tensors if name.endswith(".lora_A")]

    @property
    def base(self) -> BaseIdentity:
        return self.description.base if self.description else BaseIdentity()


def denoiser_of(pipe_or_model: object) -> nn.Module:
    """The UNet or transformer of a pipeline, or the module itself. Raises AdapterMismatchError."""
    pipe_or_model = getattr(pipe_or_model, "pipe", pipe_or_model)  # a Base, as load_base gives it
    for name in ("unet", "transformer"):
        module = getattr(pipe_or_model, name, None)
        # A text encoder has a `transformer` too; a pipeline is no module.
        if isinstance(module, nn.Module) and not isinstance(pipe_or_model, nn.Module):
            return module
    if isinstance(pipe_or_model, nn.Module):
        return pipe_or_model
    raise AdapterMismatchError(
        f"cannot load an adapter into a {type(pipe_or_model).__name__}: "
        "give a diffusers pipeline with a unet or a transformer, or one of these models itself."
    )


def save_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    training: Mapping[str, str | int | float | None] | None = None,
    base_name: str | None = None,
) -> Path:
    """Write the adapter in PEFT/diffusers layout, which stock `pipe.load_lora_weights(path)` reads too.

    The header carries the configuration, the base's identity and `training`, a summary of the run. The file appears
    under its name only when it is whole. Raises OutputError.
    """
    layers = list(adapter.layers)
    if not layers:
        adapter._require_layers("save")
    prefix = "transformer" if "Transformer" in type(adapter.model).__name__ else "unet"
    base = identify_base(adapter.model)
    config = adapter.config
    description = Description(
        kind=config.kind,
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        use_rslora=config.use_rslora,
        target_modules=config.target_modules,
        base=base.model_copy(update={"name": base_name}) if base_name else base,
        training=dict(training or {}),
    )
    tensors = {name: p.detach().to("cpu", torch.float32) for name, p in adapter.named_parameters().items()}
    metadata = {
        "format": "pt",
        dialect.METADATA_KEY: dialect.peft_config(config, layers, prefix),
        HEADER_KEY: description.model_dump_json(),
    }
    return write_safetensors(dialect.to_keys(tensors, prefix), Path(path), metadata)


def read_adapter_file(path: str | os.PathLike[str]) -> AdapterFile:
    """Read an adapter in PEFT/diffusers layout. Raises AdapterFileError."""
    path = Path(path)
    raw, header = read_safetensors(path)
    prefix, tensors, unknown = dialect.from_keys(raw)
    if unknown or not tensors:
        raise AdapterFileError(_unreadable(path, unknown))
    layers = sorted({name.rpartition(".")[0] for name in tensors})
    halves = [f"{layer}.{p}" for layer in layers for p in ("lora_A", "lora_B") if f"{layer}.{p}" not in tensors]
    kind = "dora" if any(name.endswith(".magnitude") for name in tensors) else "lora"
    if kind == "dora":
        halves += [f"{layer}.magnitude" for layer in layers if f"{layer}.magnitude" not in tensors]
    if halves:
        raise AdapterFileError(f"{path} is incomplete: {_some(halves)} missing. Download or train it again.")
    torn = [layer for layer in layers if not _pair_up(tensors[f"{layer}.lora_A"], tensors[f"{layer}.lora_B"])]
    if torn:
        raise AdapterFileError(
            f"{path} is damaged: lora_A and lora_B have no rank in common in {_some(torn)}. Download or save it again."
        )
    broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if broken:
        raise AdapterFileError(
            f"{path} holds values that are not finite, in {_some(broken)}. Its training went wrong: "
            "use an earlier checkpoint, or train again with a lower learning rate."
        )
    try:
        description = Description.model_validate_json(header[HEADER_KEY]) if HEADER_KEY in header else None
        config = _config(kind, layers, tensors, dialect.scales(header.get(dialect.METADATA_KEY), prefix), description)
    except (ValidationError, ConfigError, ValueError, TypeError, re.error) as error:
        raise AdapterFileError(f"{path} has a damaged header ({error}). Download or save it again.") from error
    return AdapterFile(path, prefix, config, tensors, description)


def _pair_up(A: Tensor, B: Tensor) -> bool:
    """Whether A is [r, in, ...] and B [out, r, ...] for one r of at least 1."""
    return A.dim() == B.dim() and A.dim() in (2, 4) and A.shape[0] == B.shape[1] and min(*A.shape, *B.shape) > 0


def _config(
    kind: str,
    layers: list[str],
    tensors: Mapping[str, Tensor],
    peft: Mapping[str, object],
    description: Description | None,
) -> AdapterConfig:
    """Ranks come from the tensors, alphas from the header; without one alpha is the rank, as diffusers has it."""
    ranks = {layer: tensors[f"{layer}.lora_A"].shape[0] for layer in layers}
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    patterns = peft.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError("alpha_pattern is no table")
    default = peft.get("lora_alpha")
    alphas = {layer: float(default if default is not None else ranks[layer]) for layer in layers}  # type: ignore[arg-type]
    for layer in layers:  # as PEFT matches: the end of the name at a dot, and the first that fits
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", layer):
                alphas[layer] = float(value)
                break
    alpha = float(default if default is not None else rank)  # type: ignore[arg-type]
    return AdapterConfig(
        kind=kind,  # type: ignore[arg-type]
        rank=rank,
        alpha=alpha,
        dropout=description.dropout if description else 0.0,
        target_modules=description.target_modules if description else tuple(layers),
        use_rslora=bool(peft.get("use_rslora", False)),
        rank_pattern={layer: r for layer, r in ranks.items() if r != rank},
        alpha_pattern={layer: a for layer, a in alphas.items() if a != alpha},
    )


def load_adapter(
    pipe_or_model: object,
    path: str | os.PathLike[str],
    *,
    strength: float = 1.0,
    name: str | None = None,
) -> Adapter:
    """Load an adapter file into a diffusers pipeline, or into a bare UNet or transformer.

    Raises AdapterFileError for a file that is no sound adapter and AdapterMismatchError when any of its layers is not
    in the model or has another shape: nothing is loaded in part. Warns when the base has other weights.
    """
    model = denoiser_of(pipe_or_model)
    return attach(model, read_adapter_file(path), strength=strength, name=name)


def attach(model: nn.Module, file: AdapterFile, *, strength: float = 1.0, name: str | None = None) -> Adapter:
    """`load_adapter` for a file that was read already."""
    check_strength(strength)
    views = adaptable_layers(model)
    problems = _misfits(file, views)
    if problems:
        raise AdapterMismatchError(_mismatch(file, identify_base(model), problems))
    here = identify_base(model, list(file.base.sketch) or None)
    if not file.base.same_weights(here):
        warnings.warn(
            f"{file.path.name} was trained on {file.base.name!r} (fingerprint {file.base.fingerprint}), this base is "
            f"{here.name!r} ({here.fingerprint}): same layers, other weights. It is loaded; its effect may differ.",
            stacklevel=3,
        )
    config = replace(file.config, dropout=0.0)
    adapter = inject_into(model, config, {layer: views[layer] for layer in file.layers}, name=name)
    adapter.load(file.tensors)
    adapter.strength = strength
    return adapter


def _misfits(file: AdapterFile, views: Mapping[str, FrozenLayer]) -> list[str]:
    """One line for each layer of the file that the model lacks or has in another shape."""
    problems = []
    for layer in file.layers:
        if layer not in views:
            near = nearest(layer, views, 1)
            problems.append(f"{layer}: not in this model" + (f" (nearest: {near[0]})" if near else ""))
            continue
        view = views[layer]
        A, B = file.tensors[f"{layer}.lora_A"], file.tensors[f"{layer}.lora_B"]
        wanted = (view.in_shape, (view.out_features, A.shape[0], *view.up_shape))
        if (tuple(A.shape[1:]), tuple(B.shape)) != wanted:
            problems.append(
                f"{layer}: adapter for {B.shape[0]} x {list(A.shape[1:])}, "
                f"this layer has {view.out_features} x {list(view.in_shape)}"
            )
        elif (m := file.tensors.get(f"{layer}.magnitude")) is not None and m.numel() != view.out_features:
            problems.append(f"{layer}: magnitude of {m.numel()} values for {view.out_features} outputs")
    return problems


def _mismatch(file: AdapterFile, here: BaseIdentity, problems: list[str]) -> str:
    fitting = len(file.layers) - len(problems)
    lines = "\n  ".join(problems[:MENTIONED])
    more = f"\n  and {len(problems) - MENTIONED} more" if len(problems) > MENTIONED else ""
    return (
        f"{file.path} does not fit this base: {fitting} of {len(file.layers)} layers match.\n  {lines}{more}\n"
        f"Trained on {file.base.name!r} ({file.base.model_class}, fingerprint {file.base.fingerprint}); "
        f"this base is {here.name!r} ({here.model_class}, {here.fingerprint}). Load it with the base it was trained on."
    )


def _unreadable(path: Path, unknown: list[str]) -> str:
    for mark, program in OTHER_DIALECTS.items():
        if any(mark in key for key in unknown):
            return (
                f"{path} is written as {program} ('{unknown[0]}'), which this version does not read yet. "
                "Give a file in PEFT/diffusers layout (keys with lora_A and lora_B)."
            )
    return (
        f"{path} is no adapter that this version reads: {_some(unknown) or 'it has no tensors'}. "
        "Give a file in PEFT/diffusers layout (keys with lora_A and lora_B)."
    )


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - MENTIONED} more" if len(keys) > MENTIONED else ""
    return ", ".join(keys[:MENTIONED]) + more
