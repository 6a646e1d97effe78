"""The configuration of a file's adapter: ranks from its tensors, alphas from wherever its dialect keeps them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor

from dora_diffusion.errors import AdapterFileError, ConfigError
from dora_diffusion.formats import diffusers
from dora_diffusion.formats.description import HEADER_KEY, Description
from dora_diffusion.formats.names import TEXT_ENCODERS
from dora_diffusion.injection import AdapterConfig, AnyKind

__all__ = ["config_of", "read_description"]

Parameters = Mapping[str, Mapping[str, Tensor]]
# A group that repeats something repeated can take for ever to match; no pattern of modules needs one.
_ENDLESS = re.compile(r"[*+}]\)?[*+{]|\([^()]*[*+}|][^()]*\)[*+{]")
MAX_PATTERN = 300


def read_description(path: Path, header: Mapping[str, str]) -> Description | None:
    try:
        return Description.model_validate_json(header[HEADER_KEY]) if HEADER_KEY in header else None
    except ValidationError as error:
        raise _damaged(path, error) from error


def config_of(
    path: Path,
    parameters: Parameters,
    peft_named: bool,
    header: Mapping[str, str],
    prefix: str,
    description: Description | None,
    peft_config: str | None,
    alpha: float | None,
) -> AdapterConfig:
    """Ranks come from the tensors. Alphas: of the module, else PEFT's configuration, else the rank, as all have it."""
    kinds = {_kind(held) for held in parameters.values()}
    kind: AnyKind = "dora" if "dora" in kinds else "lora" if "lora" in kinds else "full"
    ranks = {layer: _rank(held) for layer, held in parameters.items()} or {"": 1}
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    try:
        peft = _Peft(header, prefix, peft_config)
        alphas = {}
        for layer, held in parameters.items():
            if "alpha" in held:
                alphas[layer] = _shortest(held["alpha"]) * (
                    ranks[layer] ** 0.5 / ranks[layer] if peft.stabilised else 1
                )
            elif "unscaled_magnitude" in held:
                alphas[layer] = _not_saved(path, alpha, peft_named, ranks[layer])
            else:
                alphas[layer] = peft.alpha_of(layer, ranks[layer])
        usual = peft.default if peft.default is not None else _most_common(list(alphas.values())) or float(rank)
        return AdapterConfig(
            kind=kind,
            rank=rank,
            alpha=usual,
            dropout=description.dropout if description else 0.0,
            target_modules=description.target_modules if description else tuple(parameters) or ("none",),
            use_rslora=peft.stabilised,
            rank_pattern={layer: r for layer, r in ranks.items() if r != rank},
            alpha_pattern={layer: a for layer, a in alphas.items() if a != usual},
        )
    except (ConfigError, ValueError, TypeError, re.error, RecursionError, OverflowError) as error:
        raise _damaged(path, error) from error


class _Peft:
    """PEFT's LoraConfig of each component, from a diffusers header or from a PEFT folder; empty without either."""

    def __init__(self, header: Mapping[str, str], prefix: str, folder_config: str | None) -> None:
        text = header.get(diffusers.METADATA_KEY)
        # On a bare model diffusers writes them without the prefix.
        self.fields = {"": diffusers.scales(text, prefix) or diffusers.scales(text, "")}
        self.fields |= {encoder: diffusers.scales(text, encoder) for encoder in TEXT_ENCODERS}
        if folder_config is not None:
            self.fields[""] = diffusers.scales(folder_config, "")
        for fields in self.fields.values():
            for pattern in _patterns(fields):
                if len(pattern) > MAX_PATTERN or _ENDLESS.search(pattern):
                    raise ValueError(f"the alpha_pattern {pattern[:80]!r} could take for ever to match")
        default = self._default("")
        self.default = default if default is not None else next(filter(None, map(self._default, TEXT_ENCODERS)), None)
        # One flag for the whole adapter; a component with the other one gets alphas that mean the same.
        self.stabilised = any(self._is_stabilised(component) for component in self.fields)

    def _default(self, component: str) -> float | None:
        value = self.fields[component].get("lora_alpha")
        return None if value is None else float(value)  # type: ignore[arg-type]

    def _is_stabilised(self, component: str) -> bool:
        return bool(self.fields[component].get("use_rslora", False))

    def alpha_of(self, layer: str, rank: int) -> float:
        """As PEFT matches: the end of the name at a dot, and the first pattern that fits; else the default."""
        first, _, rest = layer.partition(".")
        component, name = (first, rest) if first in TEXT_ENCODERS else ("", layer)
        default = self._default(component)
        alpha = float(rank) if default is None else default
        for pattern, value in _patterns(self.fields[component]).items():
            if re.match(rf"(.*\.)?({pattern})$", name):
                alpha = float(value)  # type: ignore[arg-type]
                break
        if self.stabilised and not self._is_stabilised(component):
            return alpha / math.sqrt(rank)
        return alpha


def _patterns(fields: Mapping[str, object]) -> Mapping[str, object]:
    patterns = fields.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError("alpha_pattern is no table")
    return patterns


def _not_saved(path: Path, alpha: float | None, prefix: bool, rank: int) -> float:
    """ai-toolkit saves no alpha. In PEFT's naming it trains with alpha = rank; in kohya's with any."""
    if alpha is not None:
        return alpha
    if prefix:
        return float(rank)
    raise AdapterFileError(
        f"{path} is ai-toolkit's, which does not save alpha, and trains Stable Diffusion with whatever its "
        "configuration says (1 if nothing). Look there (network: linear_alpha) and say it: load_adapter(..., alpha=1), "
        "--alpha 1."
    )


def _most_common(values: list[float]) -> float | None:
    return max(set(values), key=values.count) if values else None


def _shortest(alpha: Tensor) -> float:
    """A float32 as the shortest number that is written so: 0.1, not 0.10000000149."""
    return float(str(np.float32(alpha.item()))) if alpha.dtype == torch.float32 else float(alpha)


def _damaged(path: Path, error: Exception) -> AdapterFileError:
    return AdapterFileError(f"{path} has a damaged header ({error}). Download or save it again.")


def _kind(held: Mapping[str, Tensor]) -> AnyKind:
    if "difference" in held:
        return "full"
    return "dora" if any("magnitude" in parameter for parameter in held) else "lora"


def _rank(held: Mapping[str, Tensor]) -> int:
    return held["lora_A"].shape[0] if "lora_A" in held else min(held["difference"].flatten(1).shape)
