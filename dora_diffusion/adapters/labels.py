"""What adapters are called: the kinds, the parametrisations of their updates, and both as people write them.

Apart from all that computes, since what only shows a run needs the names and no PyTorch.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["KIND_LABEL", "PARAMETRISATIONS", "AnyKind", "Kind", "Parametrisation", "adapter_label"]

Kind = Literal["dora", "lora"]  # what can be trained: with or without magnitudes
AnyKind = Literal["dora", "lora", "full"]  # what files hold
Parametrisation = Literal["lora", "lokr", "loha"]  # of the update: B A, a Kronecker product, an elementwise product
PARAMETRISATIONS: tuple[Parametrisation, ...] = ("lora", "lokr", "loha")
KIND_LABEL: dict[str, str] = {"dora": "DoRA", "lora": "LoRA", "full": "full difference"}  # as people write them
_LABELS = {
    **{(kind, "lora"): label for kind, label in KIND_LABEL.items()},
    ("lora", "lokr"): "LoKr",
    ("dora", "lokr"): "DoKR",
    ("lora", "loha"): "LoHa",
    ("dora", "loha"): "DoHa",
}


def adapter_label(kind: str, parametrisation: str = "lora") -> str:
    """ "DoKR" for a LoKr with magnitudes, and so on; of names that nobody knows the kind as it is."""
    return _LABELS.get((kind, parametrisation), KIND_LABEL.get(kind, kind))
