"""The configuration of a file's adapter: ranks from its tensors, alphas from wherever its dialect keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from dora_diffusion.adapters.injection import AdapterConfig, AnyKind, Parametrisation
from dora_diffusion.errors import AdapterFileError, ConfigError
from dora_diffusion.formats.content import AdapterFile, Raw
from dora_diffusion.formats.description import HEADER_KEY, Description
from dora_diffusion.formats.forms import form_of, name_of
from dora_diffusion.formats.scales import PeftConfig, alpha_in_header, overruled

__all__ = ["config_of", "fold_scale_of_whole", "read_description", "says_dora"]

N = TypeVar("N", int, float)
Parameters = Mapping[str, Mapping[str, Tensor]]


def read_description(path: Path, header: Mapping[str, str]) -> Description | None:
    try:
        return Description.model_validate_json(header[HEADER_KEY]) if HEADER_KEY in header else None
    except ValidationError as error:
        raise AdapterFileError(f"{path} has a damaged header ({error}). Download or save it again.") from error


def says_dora(file: AdapterFile, prefix: str) -> str:
    """Where the file says that it is a DoRA; empty where it does not."""
    if file.description and file.description.kind == "dora":
        return f"the header ({HEADER_KEY}) says that it is a DoRA"
    fields = PeftConfig(file.header, prefix, file.raw.peft_config if file.raw else None).fields
    return "PEFT's configuration says use_dora" if any(held.get("use_dora") is True for held in fields.values()) else ""


def config_of(file: AdapterFile, parameters: Parameters, prefix: str) -> tuple[AdapterConfig, list[str]]:
    """The configuration of these layers of a file that was just read, and what is worth saying of it.

    Ranks come from the tensors. Alphas: of the module, else PEFT's configuration, else what the user says, else the
    header, else the rank, as all programs have it. Raises AdapterFileError.
    """
    kinds = {_kind(held) for held in parameters.values()}
    forms = {name_of(held) for held in parameters.values()} - {"difference"}
    kind: AnyKind = "dora" if "dora" in kinds else "lora" if "lora" in kinds else "full"
    parametrisation: Parametrisation = "mixed" if len(forms) > 1 else next(iter(forms), "lora")
    ranks = {layer: form_of(held).rank_of(held) for layer, held in parameters.items()} or {"": 1}
    # Norms and biases, which have none to speak of, do not outvote the layers that have.
    voting = [r for layer, r in ranks.items() if layer and name_of(parameters[layer]) != "difference"]
    rank = _most_common(voting or list(ranks.values())) or 1
    raw, description = file.raw, file.description
    assert raw is not None
    try:
        peft = PeftConfig(file.header, prefix, raw.peft_config)
        if more := peft.more_than_tensors():
            raise AdapterFileError(f"{file.path} {more[0]}: its tensors alone are another model. {more[1]}.")
        alphas, notes = _alphas(file, raw, parameters, ranks, peft)
        voted = [a for layer, a in alphas.items() if not voting or name_of(parameters[layer]) != "difference"]
        usual = peft.default if peft.default is not None else _most_common(voted) or float(rank)
        config = AdapterConfig(
            kind=kind,
            rank=rank,
            alpha=usual,
            dropout=description.dropout if description else 0.0,
            target_modules=description.target_modules if description else tuple(parameters) or ("none",),
            use_rslora=peft.stabilised,
            rank_pattern={layer: r for layer, r in ranks.items() if r != rank},
            alpha_pattern={layer: a for layer, a in alphas.items() if a != usual},
            parametrisation=parametrisation,
            **_of_lokr(description if parametrisation == "lokr" else None),  # type: ignore[arg-type]
        )
    except (ConfigError, ValueError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"{file.path} has a damaged header ({error}). Download or save it again.") from error
    return config, notes


def _alphas(
    file: AdapterFile, raw: Raw, parameters: Parameters, ranks: Mapping[str, int], peft: PeftConfig
) -> tuple[dict[str, float], list[str]]:
    said: dict[str, float | None] = {}
    others: list[tuple[float | None, float | None]] = []  # an alpha of a layer, and PEFT's configuration's
    for layer, held in parameters.items():
        if "alpha" in held:  # a module's alpha is divided by the rank, whatever PEFT's configuration says of its root
            said[layer] = _shortest(held["alpha"]) * (ranks[layer] ** -0.5 if peft.stabilised else 1)
            others.append((said[layer], peft.alpha_of(layer, ranks[layer])))
        else:
            said[layer] = None if "unscaled_magnitude" in held else _of_peft(peft, layer, held, ranks[layer])
    scaled = {layer for layer, held in parameters.items() if form_of(held).is_scaled(held)}
    silent = [layer for layer, alpha in said.items() if alpha is None and layer in scaled]
    notes = peft.overruled_ranks({layer: rank for layer, rank in ranks.items() if layer in scaled})
    if any(own != its for own, its in others if own is not None and its is not None):
        notes.append("layers have another .alpha than PEFT's configuration says: theirs counts")
    elsewhere = raw.alpha
    if elsewhere is None and any("unscaled_magnitude" not in parameters[layer] for layer in silent):
        elsewhere, note = alpha_in_header(file.path, file.header)
        notes += [note] if note else []
    elif elsewhere is not None and not silent:
        notes.append(f"the alpha that was given, {elsewhere:g}, is not used: the file has its own")
    if not peft.stabilised:
        own = scaled - set(silent)
        notes += overruled(file.header, {alpha for layer, alpha in said.items() if alpha and layer in own})
    for layer in silent:
        if elsewhere is not None:
            said[layer] = elsewhere
        elif "unscaled_magnitude" in parameters[layer]:
            said[layer] = _not_saved(file.path, raw.peft_named, ranks[layer])
    return {layer: float(ranks[layer]) if alpha is None else alpha for layer, alpha in said.items()}, notes


def _not_saved(path: Path, peft_named: bool, rank: int) -> float:
    """ai-toolkit saves no alpha. In PEFT's naming it trains with alpha = rank; in kohya's with any."""
    if peft_named:
        return float(rank)
    raise AdapterFileError(
        f"{path} is ai-toolkit's, which does not save alpha, and trains Stable Diffusion with whatever its "
        "configuration says (1 if nothing). Look there (network: linear_alpha) and say it: load_adapter(..., alpha=1), "
        "--alpha 1."
    )


def _of_peft(peft: PeftConfig, layer: str, held: Mapping[str, Tensor], rank: int) -> float | None:
    """What PEFT's configuration says of a layer; a form without a scale has none, as if alpha were the rank."""
    alpha = peft.alpha_of(layer, rank)
    return alpha if form_of(held).is_scaled(held) else float(rank) * (rank**-0.5 if peft.stabilised else 1)


def fold_scale_of_whole(file: AdapterFile, parameters: Mapping[str, dict[str, Tensor]], prefix: str) -> list[str]:
    """Multiply PEFT's alpha / r into the first of two whole factors of a LoKr, which has no scale elsewhere.

    Raises AdapterFileError.
    """
    whole = {layer: held for layer, held in parameters.items() if {"lokr_w1", "lokr_w2"} <= held.keys()}
    if not whole or file.raw is None or file.raw.peft_config is None:
        return []
    try:
        peft = PeftConfig(file.header, prefix, file.raw.peft_config)
        scales = {layer: peft.scale_of_whole(layer) for layer in whole}
    except (ValueError, TypeError, RecursionError) as error:
        raise AdapterFileError(f"{file.path} has a damaged header ({error}). Download or save it again.") from error
    for layer, scale in scales.items():
        if scale != 1:
            whole[layer]["lokr_w1"] = whole[layer]["lokr_w1"].float() * scale
    shown = ", ".join(f"{scale:g}" for scale in sorted(set(scales.values()) - {1.0}))
    said = f"PEFT scales a LoKr of two whole factors by alpha / r = {shown}, other programs by 1: it is multiplied in"
    return [said] if shown else []


def _of_lokr(description: Description | None) -> dict[str, object]:
    """How a LoKr that was trained here was asked for; its tensors alone count."""
    return {} if description is None else {"factor": description.factor, "full_matrix": description.full_matrix}


def _most_common(values: list[N]) -> N | None:
    return max(set(values), key=values.count) if values else None


def _shortest(alpha: Tensor) -> float:
    """A float32 as the shortest number that is written so: 0.1, not 0.10000000149."""
    return float(str(np.float32(alpha.item()))) if alpha.dtype == torch.float32 else float(alpha)


def _kind(held: Mapping[str, Tensor]) -> AnyKind:
    if name_of(held) == "difference":
        return "full"
    return "dora" if any("magnitude" in parameter for parameter in held) else "lora"
