"""Where a file says its alphas: PEFT's configuration, and what other programs write into the header.

Everything here comes from a file, so every value is checked before it is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from dora_diffusion.adapters.injection import MAX_ALPHA
from dora_diffusion.errors import AdapterFileError
from dora_diffusion.formats import diffusers
from dora_diffusion.formats.names import TEXT_ENCODERS
from dora_diffusion.formats.patterns import Patterns

__all__ = ["ALPHA_KEYS", "RANK_KEYS", "PeftConfig", "alpha_in_header", "overruled"]

# The header's entries that name an alpha and a rank for the whole file, in the words of several programs.
_NAMES = ("", "unet.", "transformer.")
ALPHA_KEYS = ("alpha", "network_alpha", "ss_network_alpha", *(f"{name}lora_alpha" for name in _NAMES))
RANK_KEYS = ("rank", "network_dim", "ss_network_dim", *(f"{name}r" for name in _NAMES))

# What PEFT's configuration says of an adapter that A and B alone do not, so that W0 + s B A is another model.
# The values that say it (None: any that is set), and what it is.
_BASE_CHANGED = "is taken relative to a base that PEFT changes first"
_WAY_OUT = (
    "Load it in PEFT over the base it was trained on, merge_and_unload() it, and give the model, saved with "
    "save_pretrained, as a base"
)
_CONVERTED = (
    "Save it again in PEFT, where it was trained, with save_pretrained(..., path_initial_model_for_weight_conversion="
    "FOLDER), FOLDER being the adapter as it was before training: that writes a LoRA of the base itself. Or load it in "
    "PEFT, merge_and_unload() it, and give the model, saved with save_pretrained, as a base"
)
_MORE_THAN_TENSORS: tuple[tuple[str, re.Pattern[str] | None, str, str], ...] = (
    (
        "init_lora_weights",
        re.compile(r"pissa(_niter_\d+)?", re.I),
        f"is PEFT's PiSSA, which {_BASE_CHANGED}",
        _CONVERTED,
    ),
    ("init_lora_weights", re.compile(r"olora", re.I), f"is PEFT's OLoRA, which {_BASE_CHANGED}", _CONVERTED),
    ("init_lora_weights", re.compile(r"corda", re.I), f"is PEFT's CorDA, which {_BASE_CHANGED}", _CONVERTED),
    ("init_lora_weights", re.compile(r"lora_ga", re.I), f"is PEFT's LoRA-GA, which {_BASE_CHANGED}", _CONVERTED),
    ("init_lora_weights", re.compile(r"loftq", re.I), f"is PEFT's LoftQ, which {_BASE_CHANGED}", _WAY_OUT),
    ("kasa_config", None, "is PEFT's KaSA, which has singular values between B and A and cuts its base's", _WAY_OUT),
    ("monteclora_config", None, "is PEFT's MonteCLoRA, which draws A at random", _WAY_OUT),
    ("use_bdlora", None, "is PEFT's BD-LoRA, whose factors are block-diagonal", _WAY_OUT),
    ("arrow_config", None, "is PEFT's Arrow, which chooses among adapters for every token", "Give one of these"),
    (
        "alora_invocation_tokens",
        None,
        "is PEFT's activated LoRA, which works on the words behind its own alone",
        "PEFT reads it, for language models",
    ),
    ("layer_replication", None, "was trained on a base whose layers PEFT repeats", _WAY_OUT),
)


class PeftConfig:
    """PEFT's LoraConfig of each component, from a diffusers header or from a PEFT folder; empty without either.

    Raises ValueError for values that no configuration has.
    """

    def __init__(self, header: Mapping[str, str], prefix: str, folder_config: str | None) -> None:
        text = header.get(diffusers.METADATA_KEY)
        # On a bare model diffusers writes them without the prefix.
        self.fields = {"": diffusers.scales(text, prefix) or diffusers.scales(text, "")}
        self.fields |= {encoder: diffusers.scales(text, encoder) for encoder in TEXT_ENCODERS}
        if folder_config is not None:
            self.fields[""] = diffusers.scales(folder_config, "")
        self._values = {component: _pattern_values(fields) for component, fields in self.fields.items()}
        self._patterns = {component: Patterns(values) for component, values in self._values.items()}
        self._rank_patterns: Patterns | None = None
        default = self._default("")
        self.default = default if default is not None else next(filter(None, map(self._default, TEXT_ENCODERS)), None)
        # One flag for the whole adapter; a component with the other one gets alphas that mean the same.
        self.stabilised = any(self._is_stabilised(component) for component in self.fields)

    def _default(self, component: str) -> float | None:
        name = "alpha" if self.fields[component].get("peft_type") in ("LOHA", "LOKR") else "lora_alpha"
        value = self.fields[component].get(name)
        return None if value is None else _alpha(value, "lora_alpha")

    def _is_stabilised(self, component: str) -> bool:
        value = self.fields[component].get("use_rslora", False)
        if value is not None and not isinstance(value, bool):
            raise ValueError(f"use_rslora is {value!r}; it must be true or false")
        return bool(value)

    def more_than_tensors(self) -> tuple[str, str] | None:
        """What the adapter is, and the way out, where its tensors alone do not say what PEFT computes; else None."""
        for field, values, what, way_out in _MORE_THAN_TENSORS:
            for said in (fields.get(field) for fields in self.fields.values()):
                if said if values is None else isinstance(said, str) and values.fullmatch(said):
                    return f"{what} (its configuration says {field} = {str(said)[:60]!r})", way_out
        return None

    def scale_of_whole(self, layer: str) -> float:
        """What PEFT multiplies a LoKr of two whole factors with: alpha / r; LyCORIS takes 1. Raises ValueError."""
        fields = self.fields[""]
        if fields.get("peft_type") != "LOKR":
            return 1.0
        r, patterns = fields.get("r", 8), fields.get("rank_pattern") or {}
        if not isinstance(patterns, dict):
            raise ValueError("rank_pattern is no table")
        self._rank_patterns = self._rank_patterns or Patterns(patterns)
        if (found := self._rank_patterns.first(layer)) is not None:
            r = list(patterns.values())[found]
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"r is {str(r)[:80]!r}; it must be a whole number above 0")
        found_alpha = self._patterns[""].first(layer)
        alpha = self._default("") if found_alpha is None else list(self._values[""].values())[found_alpha]
        return (8.0 if alpha is None else alpha) / r

    def overruled_ranks(self, ranks: Mapping[str, int]) -> list[str]:
        """What to say of a rank in the configuration that no layer of its component has, where each goes by its own."""
        notes = []
        for component, fields in self.fields.items():
            r = fields.get("r")
            own = {rank for layer, rank in ranks.items() if _component(layer) == component}
            if isinstance(r, int) and own and r not in own and not fields.get("rank_pattern"):
                notes.append(
                    f"PEFT's configuration says r = {r}, no layer has that rank: alpha is divided by the tensors' rank"
                )
        return notes

    def alpha_of(self, layer: str, rank: int) -> float | None:
        """As PEFT matches: the end of the name at a dot, and the first pattern that fits; else the default.

        None where the configuration says nothing. Raises ValueError for patterns that take too long.
        """
        component = _component(layer)
        name = layer.removeprefix(f"{component}.") if component else layer
        found = self._patterns[component].first(name)
        alpha = self._default(component) if found is None else list(self._values[component].values())[found]
        if alpha is not None and self.stabilised and not self._is_stabilised(component):
            return alpha / math.sqrt(rank)
        return alpha


def _component(layer: str) -> str:
    first = layer.partition(".")[0]
    return first if first in TEXT_ENCODERS else ""


def _alpha(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_ALPHA:
        raise ValueError(f"{name} is {str(value)[:80]!r}; it must be a number above 0 and at most {MAX_ALPHA:,.0f}")
    return float(value)


def _pattern_values(fields: Mapping[str, object]) -> dict[str, float]:
    patterns = fields.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError("alpha_pattern is no table")
    return {pattern: _alpha(value, f"alpha_pattern of {pattern[:80]!r}") for pattern, value in patterns.items()}


def alpha_in_header(path: Path, header: Mapping[str, str]) -> tuple[float | None, str]:
    """The alpha that the header has for the whole file, and what to say of it; None where it has none.

    Raises AdapterFileError for two that are not the same, and for what is no alpha.
    """
    said = {key: header[key] for key in ALPHA_KEYS if header.get(key, "None").strip() not in ("None", "null", "")}
    values = {key: _parsed(path, key, text) for key, text in said.items()}
    if len(set(values.values())) > 1:
        both = " and ".join(f"{key} = {text}" for key, text in said.items())
        raise AdapterFileError(
            f"{path} says two alphas in its header ({both}) and none beside its tensors. Find out which it was trained "
            "with and say it: load_adapter(..., alpha=8), --alpha 8."
        )
    for key, value in values.items():
        return value, (
            f"alpha {value:g} is taken from the header ({key}), as no tensor has it; programs that look for .alpha "
            "alone, as ComfyUI, diffusers and sd-scripts do, take alpha = rank"
        )
    return None, ""


def overruled(header: Mapping[str, str], alphas: Collection[float]) -> list[str]:
    """What to say of alphas in the header that none of the file's layers has, which go by their own."""
    notes = []
    for key in ALPHA_KEYS:
        try:
            value = float(header[key])
        except (KeyError, ValueError):
            continue
        if alphas and not any(math.isclose(value, alpha, rel_tol=1e-6) for alpha in alphas):
            notes.append(f"the header says {key} = {header[key][:80]}, the layers have another alpha: theirs counts")
    return notes


def _parsed(path: Path, key: str, text: str) -> float:
    try:
        return _alpha(float(text), key)
    except ValueError as error:
        raise AdapterFileError(
            f"{path} has {key} = {text[:80]!r} in its header, which is no alpha: it must be a number above 0 and at "
            f"most {MAX_ALPHA:,.0f}. Find out which it was trained with and say it: load_adapter(..., alpha=8), "
            "--alpha 8."
        ) from error
