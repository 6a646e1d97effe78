"""An adapter as its file has it, before it meets a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from dora_diffusion.adapters.injection import AdapterConfig
from dora_diffusion.errors import AdapterFileError
from dora_diffusion.formats.anatomy import Model
from dora_diffusion.formats.description import MADE_FOR_KEY, BaseIdentity, Description

__all__ = ["AdapterFile", "Raw", "by_layer"]


@dataclass(frozen=True)
class Raw:
    """A file's sound modules by their names in it, before anybody knows which layers these mean.

    `keys` are all keys of the file with their modules ("" for none), `peft_config` the text of PEFT's
    adapter_config.json beside it, `alpha` what the user said of it, `placed` the tensors that were made of it: an
    AdapterFile with other tensors has left it behind.
    """

    modules: Mapping[str, Mapping[str, Tensor]]
    keys: Mapping[str, str]
    peft_named: bool
    peft_config: str | None
    alpha: float | None
    notes: tuple[str, ...] = ()
    placed: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as read from its file, whatever its dialect.

    `tensors` by `<layer>.<parameter>`: lora_A and lora_B, with one of magnitude, input_magnitude (the norm runs over
    the other axis) and unscaled_magnitude (ai-toolkit's norm); or difference. A layer is the path in the denoiser, or
    a text encoder's behind "text_encoder.". Other forms have the parameters of their updates (adapters/variants.py).
    `written` has the modules' names in the file, `flat` the layers whose name only a model can take apart, `fellows` of
    a part of a fused layer all its parts, itself among them, where they share a norm (`shared_magnitude`), `notes` what
    is worth saying of the file, `left_out` the keys not read (partial=True), `models` the families of denoisers that
    its names leave open, and `raw` what a model leads to its own layers.
    """

    path: Path
    prefix: str
    config: AdapterConfig
    tensors: dict[str, Tensor]
    description: Description | None
    dialect: str = "diffusers"
    header: Mapping[str, str] = field(default_factory=dict)
    written: Mapping[str, str] = field(default_factory=dict)
    flat: frozenset[str] = frozenset()
    fellows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    models: tuple[Model, ...] = ("other",)
    raw: Raw | None = None

    @property
    def layers(self) -> list[str]:
        return list(by_layer(self.tensors))

    @property
    def base(self) -> BaseIdentity:
        return self.description.base if self.description else BaseIdentity()

    @property
    def norm_axis(self) -> str:
        """ "output" or "input" (the axis a magnitude has its values along), "mixed", or "none" without magnitudes."""
        leaves = {name.rpartition(".")[2] for name in self.tensors}
        output, inputs = leaves & {"magnitude", "unscaled_magnitude"}, leaves & {"input_magnitude", "shared_magnitude"}
        return "mixed" if output and inputs else "output" if output else "input" if inputs else "none"

    def check_universal(self) -> None:
        """Raises AdapterFileError for a file that was bent so that one program, which computes otherwise, is right."""
        if MADE_FOR_KEY in self.header:
            raise AdapterFileError(
                f"{self.path} was made for one program alone ({self.header[MADE_FOR_KEY]}): its numbers are not what "
                "its keys say. Use the file it was made from."
            )

    def scale_of(self, layer: str) -> float:
        """s in W0 + s B A."""
        return self.config.scale_of(layer)


def by_layer(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`<layer>.<parameter>` as a table of layers, in the order of their first tensor."""
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, parameter = name.rpartition(".")
        layers.setdefault(layer, {})[parameter] = tensor
    return layers
