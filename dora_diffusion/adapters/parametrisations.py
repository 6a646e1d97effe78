"""What can be trained: of each parametrisation the update that it is, and the values that it starts from.

Ranks and factors are LyCORIS's: `rank` is its lora_dim, `factor` its factor, and a LoKr whose larger factor would be no
smaller as B A has it whole ("full dimension" there).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from dora_diffusion.adapters.frozen import FrozenLayer
from dora_diffusion.adapters.labels import PARAMETRISATIONS, TRAINED
from dora_diffusion.adapters.layers import LoRAUpdate
from dora_diffusion.adapters.loha import LoHaUpdate
from dora_diffusion.adapters.lokr import LoKrUpdate
from dora_diffusion.adapters.whole import DifferenceUpdate
from dora_diffusion.errors import ConfigError, nearest

__all__ = ["Form", "check_parametrisation", "check_rank", "check_trained", "form_of"]

Start = Callable[[FrozenLayer, int, torch.Generator | None], dict[str, Tensor]]


@dataclass(frozen=True)
class Form:
    """An update without its magnitudes, and the values that training starts from, for a layer and a rank."""

    update: type[LoRAUpdate]
    start: Start


_UPDATES: dict[str, type[LoRAUpdate]] = {
    "lora": LoRAUpdate,
    "lokr": LoKrUpdate,
    "loha": LoHaUpdate,
    "full": DifferenceUpdate,
}


def form_of(parametrisation: str, factor: int, full_matrix: bool) -> Form:
    """The form by its name; `factor` and `full_matrix` are LoKr's."""
    update = _UPDATES[parametrisation]
    if update is LoKrUpdate:
        return Form(update, partial(LoKrUpdate.start, factor=factor, full_matrix=full_matrix))
    return Form(update, update.start)


def check_parametrisation(parametrisation: str, factor: int, full_matrix: bool) -> None:
    """Raises ConfigError for a name that is none, a factor that is none, and LoKr's settings without a LoKr."""
    if parametrisation not in PARAMETRISATIONS:
        near = nearest(str(parametrisation), TRAINED, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"parametrisation is {parametrisation!r}; it must be 'lora', 'lokr' or 'loha'.{hint}")
    if isinstance(factor, bool) or not isinstance(factor, int) or not (factor == -1 or factor >= 1):
        raise ConfigError(
            f"factor is {factor!r}; it must be a whole number of at least 1 (4 to 16 is usual), or -1 for factors that "
            "are as close to each other as can be."
        )
    if parametrisation == "lokr":
        return
    for name, given in (("factor", factor != -1), ("full_matrix", full_matrix)):
        if given:
            raise ConfigError(
                f"{name} is LoKr's, and parametrisation is {parametrisation!r}: set parametrisation to 'lokr', or "
                f"leave {name} out."
            )


def check_trained(parametrisation: str) -> None:
    """Raises ConfigError for a form that is read from files and not trained."""
    if parametrisation not in TRAINED:
        raise ConfigError(
            f"parametrisation is {parametrisation!r}; a new adapter is 'lora', 'lokr' or 'loha' (the others are only "
            "read from files)."
        )


def check_rank(parametrisation: str, rank: int, views: Mapping[str, FrozenLayer]) -> None:
    """Raises ConfigError for a rank beyond every layer's: no more can be learned by it. A LoKr's may be any."""
    if parametrisation == "lokr" or not views:
        return
    most = max(min(view.out_features, torch.Size(view.in_shape).numel()) for view in views.values())
    if rank > most:
        raise ConfigError(
            f"rank is {rank}, and no layer that is adapted has one above {most}. Give {most} or less (4 to 64 is usual)"
            + ("." if parametrisation == "loha" else ", or parametrisation = 'lokr', whose rank may be any.")
        )
