"""Parts of a layer that is one in the original checkpoint, and whose update was made for that one.

FLUX and others have q, k and v in one matrix; diffusers has them apart. What runs over all its rows then runs over
several layers, so the updates of these know each other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dora_diffusion.adapters.layers import InputAxisDoRAUpdate, LoRAUpdate

__all__ = ["SharedNormDoRAUpdate", "introduce"]


class SharedNormDoRAUpdate(InputAxisDoRAUpdate):
    """A part of a DoRA by input: W' = V (m / n) column-wise, n^2 = ||V||^2 of the column over all parts.

    shared_magnitude [in], the same in each part. `fellows` are the updates of all parts, this one among them.
    """

    magnitude_name = "shared_magnitude"
    fellows: tuple[SharedNormDoRAUpdate, ...] = ()

    @torch.no_grad()
    def norm(self) -> Tensor:
        """n of every input's column over the rows of all parts, [in], float32."""
        assert self.fellows, "whoever makes these updates introduces them to each other"
        device = self.get_parameter(self.magnitude_name).device
        own = [super(SharedNormDoRAUpdate, part).norm().to(device) for part in self.fellows]
        return torch.stack(own).square().sum(0).sqrt()


def introduce(updates: Mapping[str, LoRAUpdate], fellows: Mapping[str, tuple[str, ...]]) -> None:
    """Tell each part of a fused layer its fellows, by their layers' names."""
    for path, update in updates.items():
        if isinstance(update, SharedNormDoRAUpdate):
            found = tuple(updates[fellow] for fellow in fellows[path])
            assert all(isinstance(each, SharedNormDoRAUpdate) for each in found) and update in found
            update.fellows = found  # type: ignore[assignment]
