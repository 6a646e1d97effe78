"""What an adapter file says of itself, in the safetensors header, so that loading needs nothing else."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from dora_diffusion.adapters.frozen import FrozenLayer
from dora_diffusion.adapters.injection import Parametrisation, adaptable_layers

__all__ = ["HEADER_KEY", "MADE_FOR_KEY", "BaseIdentity", "Description", "identify_base"]

HEADER_KEY = "dora_diffusion"
MADE_FOR_KEY = "dora_diffusion_made_for"  # marks a repaired file that is right in one program and nowhere else
SKETCHED_LAYERS = 8


class BaseIdentity(BaseModel):
    """Which base an adapter was made for.

    `sketch` is the root mean square weight of a few adapted layers: it tells two bases of one architecture apart, and
    is nearly the same in float32, in half precision and quantised.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    name: str = "unknown"
    model_class: str = "unknown"
    layers_per_block: int | None = None  # a UNet's, which its original names depend on
    plain_up_blocks: tuple[int, ...] = ()  # those without attention
    is_xl: bool = False
    sketch: dict[str, float] = Field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Twelve letters to show a person."""
        text = self.model_class + "".join(f"{layer}:{value:.1e}" for layer, value in sorted(self.sketch.items()))
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def same_weights(self, other: BaseIdentity) -> bool:
        """Whether both sketches agree to 3 % in every layer they share (true when they share none)."""
        shared = self.sketch.keys() & other.sketch.keys()
        return all(abs(self.sketch[k] - other.sketch[k]) <= 0.03 * abs(self.sketch[k]) for k in shared)


class Description(BaseModel):
    """The header's entry."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format_version: int = 1
    kind: Literal["dora", "lora", "full"]
    rank: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    target_modules: tuple[str, ...]
    norm_axis: Literal["output", "input", "mixed", "none"] = "output"
    parametrisation: Parametrisation = "lora"
    base: BaseIdentity = BaseIdentity()
    training: dict[str, str | int | float | None] = Field(default_factory=dict)
    conversion: dict[str, str | int | float | None] = Field(default_factory=dict)


@torch.no_grad()
def identify_base(model: nn.Module, layers: list[str] | None = None) -> BaseIdentity:
    """The identity of a UNet or DiT, adapted or not; sketched at these layers, by default at some attention layers."""
    views = adaptable_layers(model)
    if layers is None:
        attention = [path for path in views if path.endswith("to_q")] or list(views)
        layers = attention[:: max(1, len(attention) // SKETCHED_LAYERS)][:SKETCHED_LAYERS]
    sketch = {path: _rms(views[path]) for path in layers if path in views}
    config = getattr(model, "config", None)
    n = getattr(config, "layers_per_block", None)
    ups = getattr(config, "up_block_types", None) or ()
    return BaseIdentity(
        name=getattr(config, "_name_or_path", "") or "unknown",
        model_class=type(model).__name__,
        layers_per_block=n if isinstance(n, int) else None,
        plain_up_blocks=tuple(i for i, kind in enumerate(ups) if "Attn" not in str(kind)),
        is_xl=getattr(config, "addition_embed_type", None) == "text_time",
        sketch=sketch,
    )


def _rms(frozen: FrozenLayer) -> float:
    size = frozen.out_features
    for n in frozen.in_shape:
        size *= n
    return float(f"{(frozen.squared_norms().sum() / size).sqrt().item():.4e}")
