"""The models that one adapter may span: a denoiser, and the text encoders of its pipeline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from dora_diffusion.adapters.hosting import host, release, settle
from dora_diffusion.adapters.layers import AdaptedLayer

__all__ = ["Roots"]

_FROZEN = "_frozen_for_adapters"


@dataclass(frozen=True)
class Roots:
    """A denoiser's layers go by their own names, a text encoder's behind its name in the pipeline."""

    denoiser: nn.Module
    text_encoders: Mapping[str, nn.Module]

    def _find(self, path: str) -> tuple[nn.Module, str]:
        prefix, _, rest = path.partition(".")
        return (self.text_encoders[prefix], rest) if prefix in self.text_encoders else (self.denoiser, path)

    def get(self, path: str) -> nn.Module:
        root, inside = self._find(path)
        return root.get_submodule(inside)

    def replace(self, path: str, module: nn.Module) -> None:
        root, inside = self._find(path)
        parent, _, leaf = inside.rpartition(".")
        setattr(root.get_submodule(parent), leaf, module)

    def adapter_names(self) -> set[str]:
        roots = (self.denoiser, *self.text_encoders.values())
        layers = [m for root in roots for m in root.modules() if isinstance(m, AdaptedLayer)]
        return {name for layer in layers for name in layer.updates}

    def freeze(self, paths: Iterable[str]) -> None:
        """Freeze the touched models' own parameters once, and remember on each which were trainable."""
        for root in {id(root): root for root in (self._find(path)[0] for path in paths)}.values():
            if _FROZEN in root.__dict__:
                continue
            trainable = [p for p in root.parameters() if p.requires_grad]
            root.__dict__[_FROZEN] = trainable
            for parameter in trainable:
                parameter.requires_grad_(False)

    def host(self, paths: Iterable[str]) -> None:
        """Make the models' own calls know of the adapters that have come into these layers."""
        for root in {id(root): root for root in (self._find(path)[0] for path in paths)}.values():
            host(root)

    def settle(self) -> None:
        """Take back what a call of diffusers that failed has left of its scale."""
        for root in (self.denoiser, *self.text_encoders.values()):
            settle(root)

    def thaw(self) -> None:
        """Undo `freeze` and `host` in the models that no adapter is left in."""
        for root in (self.denoiser, *self.text_encoders.values()):
            release(root)
            if not any(isinstance(module, AdaptedLayer) for module in root.modules()):
                for parameter in root.__dict__.pop(_FROZEN, ()):
                    parameter.requires_grad_(True)
