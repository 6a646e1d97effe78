"""What adapters are called: the kinds, the parametrisations of their updates, and both as people write them.

Apart from all that computes, since what only shows a run needs the names and no PyTorch.
"""

from __future__ import annotations

from typing import Literal, get_args

__all__ = [
    "KIND_LABEL",
    "PARAMETRISATIONS",
    "TRAINED",
    "AnyKind",
    "Kind",
    "Parametrisation",
    "Trained",
    "adapter_label",
]

Kind = Literal["dora", "lora"]  # what can be trained: with or without magnitudes
AnyKind = Literal["dora", "lora", "full"]  # what files hold
Trained = Literal["lora", "lokr", "loha"]  # B A, a Kronecker product, an elementwise product: what can be trained
# What files hold beside these: the form of W' - W0 without the magnitudes.
Parametrisation = Literal["lora", "lokr", "loha", "glora", "oft", "boft", "ia3", "difference", "mixed"]
TRAINED: tuple[Trained, ...] = get_args(Trained)
PARAMETRISATIONS: tuple[Parametrisation, ...] = get_args(Parametrisation)
KIND_LABEL: dict[str, str] = {"dora": "DoRA", "lora": "LoRA", "full": "full difference"}  # as people write them
_FORM_LABEL = {  # of the other forms, without and with magnitudes
    "lokr": ("LoKr", "DoKR"),
    "loha": ("LoHa", "DoHa"),
    "glora": ("GLoRA", "GLoRA with magnitudes"),
    "oft": ("OFT", "OFT with magnitudes"),
    "boft": ("BOFT", "BOFT with magnitudes"),
    "ia3": ("IA3", "IA3 with magnitudes"),
    "mixed": ("several forms", "several forms with magnitudes"),
}


def adapter_label(kind: str, parametrisation: str = "lora") -> str:
    """The adapter as people call it, such as DoKR for a LoKr with magnitudes."""
    if kind == "full" or parametrisation not in _FORM_LABEL:
        return KIND_LABEL.get(kind, kind)
    return _FORM_LABEL[parametrisation][kind == "dora"]
