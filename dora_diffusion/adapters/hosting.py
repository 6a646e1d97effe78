"""What diffusers' own calls find in a model while adapters are in it.

diffusers looks for PEFT's layers. Its `scale` (`cross_attention_kwargs={"scale": 0.5}`, `joint_attention_kwargs`, a
text encoder's `lora_scale`) is heeded by one module more in the model, `ScaleDial`. What would do nothing, or write a
folder that nothing reads, is refused in words.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import NoReturn

from torch import nn

from dora_diffusion.adapters.layers import AdaptedLayer, LoRAUpdate
from dora_diffusion.errors import AdapterStateError, ConfigError

__all__ = ["ScaleDial", "host", "release"]

DIAL = "dora_diffusion_scale"  # the dial's name in the model
FUSING = "fuses what load_lora_weights loaded. Adapters of load_adapter are fused by themselves: adapter.fuse()."


class ScaleDial(nn.Module):
    """Multiplies the strengths of a model's adapters for as long as diffusers scales its LoRAs.

    It answers as one of PEFT's layers does, without being one: it has no weights and is in no forward pass.
    """

    merged = False
    merged_adapters = adapter_layer_names = other_param_names = ()

    def __init__(self) -> None:
        super().__init__()
        self.r: dict[str, int] = {}  # of PEFT's adapters, which diffusers counts to name the next
        self.layers: list[AdaptedLayer] = []  # a plain list: they are in the model already
        self._own: list[tuple[LoRAUpdate, float]] = []

    @property
    def active_adapter(self) -> list[str]:
        return list(dict.fromkeys(name for layer in self.layers for name in layer.updates))

    active_adapters = active_adapter

    def scale_layer(self, scale: float) -> None:
        """Strengths times `scale`, until `unscale_layer`. Raises AdapterStateError and ConfigError."""
        self.unscale_layer()
        if not isinstance(scale, int | float):
            raise ConfigError(f"scale is {scale!r}; it must be a number, which multiplies the adapters' strengths.")
        fused = sorted({name for layer in self.layers for name in layer.fused})
        if fused:
            raise AdapterStateError(
                f"scale={scale:g} cannot act on {', '.join(fused)}, which is fused into the weights. Call "
                "adapter.unfuse() first, or leave scale out and set adapter.strength."
            )
        updates: list[LoRAUpdate] = [u for layer in self.layers for u in layer.updates.values()]  # type: ignore[misc]
        self._own = [(update, update.strength) for update in updates]
        for update, own in self._own:
            update.strength = own * scale

    def unscale_layer(self, scale: float | None = None) -> None:
        for update, own in self._own:
            update.strength = own
        self._own = []

    def set_scale(self, adapter: str, scale: float) -> None:
        """How diffusers ends a scale of 0. The strengths of what is not its own it does not set."""
        self.unscale_layer()

    def get_base_layer(self) -> nn.Module:
        return nn.Identity()  # PEFT looks here for weights, and at their device

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        warnings.warn(f"fuse_lora {FUSING}", stacklevel=2)

    def _nothing(self, *_values: object, **_options: object) -> None:
        """What PEFT asks of all its layers and is none of this one's business."""

    unmerge = set_adapter = enable_adapters = delete_adapter = _move_adapter_to_device_of_base_layer = _nothing


def _refusing(message: str) -> Callable[..., NoReturn]:
    def refuse(*_values: object, **_options: object) -> NoReturn:
        raise AdapterStateError(message)

    return refuse


# Methods of a model that its adapters stand in the way of.
REFUSED = {
    "save_pretrained": _refusing(
        "cannot save a model while an adapter is in it: its weights would have names that nothing reads. The folder is "
        "not whole now. Write the adapter into the weights for good with adapter.merge(), or take it out with "
        "adapter.eject(), then save. save_adapter(adapter, path) saves the adapter alone."
    ),
    "fuse_lora": _refusing(f"fuse_lora {FUSING}"),
    "unload_lora": _refusing(
        "unload_lora_weights takes out what load_lora_weights loaded. Take adapters of load_adapter out first: "
        "adapter.eject()."
    ),
}


def host(root: nn.Module) -> None:
    """Make a model of diffusers or transformers heed `scale` for the adapters that are in it now."""
    if not hasattr(root, "save_pretrained"):
        return
    if DIAL not in root._modules:
        from peft.tuners.tuners_utils import BaseTunerLayer  # takes a second; diffusers has it already

        BaseTunerLayer.register(ScaleDial)
        root.add_module(DIAL, ScaleDial())
        root.__dict__.update({name: refuse for name, refuse in REFUSED.items() if hasattr(root, name)})
    dial = root.get_submodule(DIAL)
    dial.layers = _adapted(root.modules())  # type: ignore[assignment]


def release(root: nn.Module) -> None:
    """Undo `host` where no adapter is left, else see which layers are."""
    if DIAL not in root._modules:
        return
    if _adapted(root.modules()):
        host(root)
        return
    del root._modules[DIAL]
    for name in REFUSED:
        root.__dict__.pop(name, None)


def _adapted(modules: Iterable[nn.Module]) -> list[AdaptedLayer]:
    return [module for module in modules if isinstance(module, AdaptedLayer)]
