"""What is known of the denoiser that a file's names are for: its family, and its layers once a model is there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from torch import nn

from dora_diffusion.formats import unet_names
from dora_diffusion.formats.aliases import fused_name
from dora_diffusion.formats.original import SWAPPED, TRANSFORMERS, WHOLE, Part

__all__ = ["MODELS", "MODEL_LABEL", "Anatomy", "Model", "anatomy_of", "model_of"]

Model = Literal["unet", "sd3", "flux", "chroma", "flux2", "qwen", "z-image", "other"]
MODELS: tuple[Model, ...] = get_args(Model)
MODEL_LABEL: dict[Model, str] = {
    "unet": "Stable Diffusion 1, 2 or XL",
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX.1",
    "chroma": "Chroma",
    "flux2": "FLUX.2",
    "qwen": "Qwen-Image",
    "z-image": "Z-Image",
    "other": "another model",
}
_CLASSES: dict[str, Model] = {
    "UNet2DConditionModel": "unet",
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
    "ChromaTransformer2DModel": "chroma",
    "Flux2Transformer2DModel": "flux2",
    "QwenImageTransformer2DModel": "qwen",
    "ZImageTransformer2DModel": "z-image",
}


def model_of(class_name: str) -> Model:
    """The family of a denoiser of this class."""
    return _CLASSES.get(class_name, "unet" if class_name.startswith("UNet") else "other")


@dataclass(frozen=True)
class Anatomy:
    """The denoiser's family, and where a model is there, the paths of its layers (a text encoder's behind its name).

    `layers_per_block` is a UNet's, which its original names depend on as long as there is no model to look at.
    """

    model: Model
    layers_per_block: int | None = None
    paths: frozenset[str] = frozenset()
    flat: Mapping[str, str] = field(default_factory=dict)  # the paths by their names with underscores
    originals: Mapping[str, str] = field(default_factory=dict)  # a UNet's original names, with its paths
    flat_originals: Mapping[str, str] = field(default_factory=dict)

    def has(self, path: str) -> bool:
        """Whether this is one of the model's own layers: of the model itself, or of its family without one."""
        if self.paths:
            return path in self.paths
        if self.model == "unet":
            return unet_names.is_own(path)
        return self.model in TRANSFORMERS and TRANSFORMERS[self.model].has(path)

    def parts(self, path: str) -> tuple[Part, ...]:
        """The layers that a module of the original checkpoint, or a fused one, is; none for a name of no layer here."""
        if parts := self._original(path):
            return parts
        if (fused := fused_name(path)) is None:
            return ()
        found = [(Part(layer, WHOLE),) if self.has(layer) else self._original(layer) for layer in fused.layers]
        if not all(len(parts) == 1 and parts[0].rows == WHOLE for parts in found):
            return ()
        return tuple(Part(parts[0].layer, rows) for parts, rows in zip(found, fused.rows))

    def _settled(self, part: Part) -> Part:
        """With the rows as they are in the last block or before it, where a model tells."""
        if not (part.rows.swapped_if_two and self.paths):
            return part
        blocks, _, rest = part.layer.partition(".")
        number = int(rest.partition(".")[0])
        goes_on = any(path.startswith(f"{blocks}.{number + 1}.") for path in self.paths)
        return replace(part, rows=WHOLE if goes_on else SWAPPED)

    def _original(self, path: str) -> tuple[Part, ...]:
        if self.model in TRANSFORMERS:
            parts = TRANSFORMERS[self.model].parts(path)
            if not all(map(self.has, (part.layer for part in parts))):
                return ()
            return tuple(map(self._settled, parts))
        if self.model != "unet":
            return ()
        layer = self.originals.get(path) if self.paths else unet_names.unet_path(path, self.layers_per_block or 2)
        return (Part(layer, WHOLE),) if layer else ()


def anatomy_of(denoiser: nn.Module, paths: Iterable[str]) -> Anatomy:
    """The anatomy of a model whose layers have these paths."""
    paths = frozenset(paths)
    model = model_of(type(denoiser).__name__)
    originals = unet_names.originals_of(paths) if model == "unet" else {}
    return Anatomy(
        model,
        paths=paths,
        flat=_flattened({path: path for path in paths}),
        originals=originals,
        flat_originals=_flattened(originals),
    )


def _flattened(names: Mapping[str, str]) -> dict[str, str]:
    """By the names with underscores for dots; one that two names come down to is left out, for it tells nothing."""
    flat: dict[str, str] = {}
    twice: set[str] = set()
    for name, path in names.items():
        short = name.replace(".", "_")
        twice |= {short} if short in flat else set()
        flat[short] = path
    return {short: path for short, path in flat.items() if short not in twice}
