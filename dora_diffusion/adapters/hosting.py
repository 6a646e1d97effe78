"""What diffusers' own calls find in a model while adapters are in it.

diffusers looks for PEFT's layers. Its `scale` (`cross_attention_kwargs={"scale": 0.5}`, `joint_attention_kwargs`, a
text encoder's `lora_scale`) is heeded by one module more in the model, `ScaleDial`. What would do nothing, or write a
folder that nothing reads, is refused in words.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterable
from types import FrameType, MethodType
from typing import NoReturn

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dora_diffusion.adapters.layers import AdaptedLayer, LoRAUpdate
from dora_diffusion.errors import AdapterStateError, ConfigError

__all__ = ["ScaleDial", "host", "release", "settle"]

DIAL = "dora_diffusion_scale"  # the dial's name in the model
FUSING = "fuses what load_lora_weights loaded. Adapters of load_adapter are fused by themselves: adapter.fuse()."


class ScaleDial(nn.Module):
    """Multiplies the strengths of a model's adapters for as long as diffusers scales its LoRAs.

    It answers as one of PEFT's layers does, without being one: it has no weights and is in no forward pass.
    `encode_prompt` scales a text encoder, and leaves it so when it raises: what it scaled counts until it is left.
    """

    merged = False
    merged_adapters = adapter_layer_names = other_param_names = ()

    def __init__(self) -> None:
        super().__init__()
        self.r: dict[str, int] = {}  # of PEFT's adapters, which diffusers counts to name the next
        self.layers: list[AdaptedLayer] = []  # a plain list: they are in the model already
        self._own: list[tuple[LoRAUpdate, float]] = []
        self.hook: RemovableHandle | None = None
        self._during: FrameType | None = None  # the call that the scale is for, where it may fail to take it back

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
        caller = sys._getframe(1).f_back  # of scale_lora_layers, which calls this
        self._during = caller if caller is not None and caller.f_code.co_name == "encode_prompt" else None
        self._own = [(update, update.strength) for update in updates]
        for update, own in self._own:
            update.strength = own * scale

    def unscale_layer(self, scale: float | None = None) -> None:
        for update, own in self._own:
            update.strength = own
        self._own, self._during = [], None

    def settle(self) -> None:
        """Take back a scale whose call is over."""
        frame: FrameType | None = sys._getframe()
        while frame is not None and self._during is not None:
            if frame is self._during:
                return
            frame = frame.f_back
        if self._during is not None:
            self.unscale_layer()

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


CANNOT_SAVE = (
    "cannot save a model while an adapter is in it: its weights would have names that nothing reads. Nothing is "
    "written. Write the adapter into the weights for good with adapter.merge(), or take it out with adapter.eject(), "
    "then save. save_adapter(adapter, path) saves the adapter alone."
)
CANNOT_STAND_ON = (
    "load_lora_weights cannot put its layers around those that load_adapter has put in. Load this file with "
    "load_adapter too: adapters add up, in any order. Or take the others out first with adapter.eject(), or write them "
    "into the weights for good with adapter.merge()."
)
# Methods of a model that its adapters stand in the way of.
REFUSED = {
    "save_pretrained": _refusing(CANNOT_SAVE),
    "fuse_lora": _refusing(f"fuse_lora {FUSING}"),
    "unload_lora": _refusing(
        "unload_lora_weights takes out what load_lora_weights loaded. Take adapters of load_adapter out first: "
        "adapter.eject()."
    ),
}


def _explaining(root: nn.Module, name: str) -> MethodType:
    """A model's way to load a LoRA through PEFT, which knows no layer but its own and says so in its words."""

    @functools.wraps(getattr(type(root), name))
    def explained(self: nn.Module, *values: object, **options: object) -> object:
        try:
            return getattr(type(self), name)(self, *values, **options)
        except ValueError as error:
            if "AdaptedLayer" not in str(error):
                raise
            raise AdapterStateError(CANNOT_STAND_ON) from error

    return MethodType(explained, root)  # a copy of the model has one of its own


LOADING = ("load_lora_adapter", "load_adapter")  # of diffusers' models, and of transformers'


def _check_before_saving() -> None:
    """Have diffusers' pipelines refuse to be saved before they write their other parts.

    A pipeline asks its models one after the other, each when the one before is on disk; and no model knows of the
    pipelines that it is in. So it is the class that has to look.
    """
    from diffusers import DiffusionPipeline

    save = DiffusionPipeline.save_pretrained
    if getattr(save, DIAL, False):
        return

    @functools.wraps(save)
    def checked(self: DiffusionPipeline, *values: object, **options: object) -> None:
        if any(DIAL in part._modules for part in self.components.values() if isinstance(part, nn.Module)):
            raise AdapterStateError(CANNOT_SAVE)
        save(self, *values, **options)

    setattr(checked, DIAL, True)
    DiffusionPipeline.save_pretrained = checked  # type: ignore[method-assign]


def settle(root: nn.Module) -> None:
    """Take back a scale that a call has left behind."""
    if isinstance(dial := root._modules.get(DIAL), ScaleDial):
        dial.settle()


def _settle_before(root: nn.Module, _values: object) -> None:
    if not torch.compiler.is_compiling():
        settle(root)


def host(root: nn.Module) -> None:
    """Make a model of diffusers or transformers heed `scale` for the adapters that are in it now."""
    if not hasattr(root, "save_pretrained"):
        return
    if DIAL not in root._modules:
        from peft.tuners.tuners_utils import BaseTunerLayer  # takes a second; diffusers has it already

        BaseTunerLayer.register(ScaleDial)
        root.add_module(DIAL, ScaleDial())
        root.__dict__.update({name: refuse for name, refuse in REFUSED.items() if hasattr(root, name)})
        root.__dict__.update({name: _explaining(root, name) for name in LOADING if hasattr(type(root), name)})
        _check_before_saving()
        if hasattr(root, "load_adapter"):  # a text encoder; diffusers' own models always take their scale back
            root.get_submodule(DIAL).hook = root.register_forward_pre_hook(_settle_before)  # type: ignore[assignment]
    dial = root.get_submodule(DIAL)
    dial.layers = _adapted(root.modules())  # type: ignore[assignment]


def release(root: nn.Module) -> None:
    """Undo `host` where no adapter is left, else see which layers are."""
    if DIAL not in root._modules:
        return
    if _adapted(root.modules()):
        host(root)
        return
    dial = root._modules.pop(DIAL)
    if isinstance(dial, ScaleDial) and dial.hook is not None:
        dial.hook.remove()
    for name in (*REFUSED, *LOADING):
        root.__dict__.pop(name, None)


def _adapted(modules: Iterable[nn.Module]) -> list[AdaptedLayer]:
    return [module for module in modules if isinstance(module, AdaptedLayer)]
