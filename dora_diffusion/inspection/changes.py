"""Where a fine-tuning's differences to its base come from: an adapter file, or a checkpoint that was fine-tuned whole.

Both give the same thing, one `Change` a layer, made one after the other, so that a model of any size can be looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from dora_diffusion.adapters.injection import adaptable_layers
from dora_diffusion.adapters.layers import AdaptedLayer, LoRAUpdate
from dora_diffusion.adapters.whole import BiasUpdate
from dora_diffusion.errors import AdapterFileError, AdapterMismatchError
from dora_diffusion.formats.files import check_adapter, load_adapter, read_what_fits
from dora_diffusion.inspection.parity import refuse_marked
from dora_diffusion.models.loading import Base, load_base
from dora_diffusion.paths import obstacle

__all__ = ["Change", "changes_of", "check_source", "source_kind", "weight_files"]

PARTS = ("unet", "transformer")


@dataclass(frozen=True)
class Change:
    """One layer's W0, and how to make dW = W' - W0; `factors` are (s B, A) where dW = s B A.

    A norm's weight, and any bias, is a vector; a bias goes by the layer's name and ".bias".
    """

    layer: str
    weight: Tensor
    delta: Callable[[], Tensor]
    factors: tuple[Tensor, Tensor] | None = None


def source_kind(path: Path) -> Literal["adapter", "model", "checkpoint"]:
    """An adapter file, a fine-tuned UNet or transformer in diffusers' names (file or folder), or a whole checkpoint."""
    if obstacle(path):
        return "adapter"  # reading it says what
    if path.is_dir():
        return "model"
    if path.suffix != ".safetensors" or not path.is_file():
        return "adapter"  # reading it says what is wrong
    try:
        with safe_open(str(path), framework="pt") as file:
            keys = list(file.keys())
    except (SafetensorError, OSError, ValueError):
        return "adapter"
    if any(key.startswith("model.diffusion_model.") for key in keys):
        return "checkpoint"
    return (
        "model" if any(key.endswith("attn1.to_q.weight") or key in ("conv_in.weight",) for key in keys) else "adapter"
    )


def check_source(path: Path) -> None:
    """Raise AdapterFileError where there is nothing that `changes_of` could read; only headers are read."""
    if source_kind(path) == "adapter":
        check_adapter(path)
    else:
        weight_files(path)


@contextmanager
def changes_of(path: Path, base: Base, partial: bool = False) -> Iterator[Iterator[Change]]:
    """The changes that this file or folder makes to the base; with `partial`, what fits of an adapter.

    Raises AdapterFileError and AdapterMismatchError.
    """
    kind = source_kind(path)
    if kind == "adapter":
        refuse_marked(path, read_what_fits(path, partial=partial).header)
        adapter = load_adapter(base.pipe, path, strength=0.0, partial=partial)
        try:
            updates = adapter.updates()
            yield (change for name, layer in adapter.layers.items() for change in _adapted(name, layer, updates[name]))
        finally:
            adapter.eject()
    elif kind == "checkpoint":
        yield _between(base.denoiser, load_base(str(path), device="cpu").denoiser)
    else:
        with ExitStack() as files:
            yield _stored(base.denoiser, _tensors(path, files), path)


def _adapted(name: str, layer: AdaptedLayer, update: LoRAUpdate) -> Iterator[Change]:
    """What an adapter changes of a layer: its weight, its bias, or both."""
    factors = None
    if type(update) is LoRAUpdate:
        factors = (update.scale * update.lora_B.detach(), update.lora_A.detach())
    if not isinstance(update, BiasUpdate):
        yield Change(name, layer.frozen.dense_weight(), update.delta_weight, factors)
    if (shift := update.bias_difference) is not None:
        bias = getattr(layer.base, "bias", None)
        own = torch.zeros_like(shift) if bias is None else bias.detach().float()
        yield Change(f"{name}.bias", own, lambda: shift.detach())


def _between(base: nn.Module, tuned: nn.Module) -> Iterator[Change]:
    theirs = adaptable_layers(tuned)
    for name, frozen in adaptable_layers(base).items():
        if name in theirs:
            yield _difference(name, frozen.dense_weight(), theirs[name].dense_weight())


def _stored(base: nn.Module, tensors: dict[str, Callable[[], Tensor]], path: Path) -> Iterator[Change]:
    views = adaptable_layers(base)
    missing = [name for name in views if f"{name}.weight" not in tensors]
    if missing:
        raise AdapterMismatchError(
            f"{path} is no fine-tuned {type(base).__name__} of this base: {len(missing)} of {len(views)} layers "
            f"are not in it, among them {missing[0]}. Give the base that it was trained from with --base."
        )
    for name, frozen in views.items():
        yield _difference(name, frozen.dense_weight(), tensors[f"{name}.weight"]().float())


def _difference(name: str, weight: Tensor, tuned: Tensor) -> Change:
    if tuned.shape != weight.shape:
        raise AdapterMismatchError(
            f"{name} is {list(tuned.shape)} in the fine-tuned model and {list(weight.shape)} in the base. "
            "Give the base that it was trained from with --base."
        )
    return Change(name, weight, lambda: tuned.to(weight.device) - weight)


def _tensors(path: Path, files: ExitStack) -> dict[str, Callable[[], Tensor]]:
    """How to read each tensor of a folder's or a file's weights, none of them read yet."""
    found: dict[str, Callable[[], Tensor]] = {}
    for part in weight_files(path):
        try:
            file = files.enter_context(safe_open(str(part), framework="pt", device="cpu"))
        except (SafetensorError, OSError, ValueError) as error:
            raise AdapterFileError(f"{part} is no sound safetensors file ({error}).") from error
        for key in file.keys():  # noqa: SIM118 (it is no dict)
            found[key] = lambda file=file, key=key: file.get_tensor(key)  # type: ignore[misc]
    return found


def weight_files(path: Path) -> list[Path]:
    """The files of a denoiser's weights: a pipeline's folder, the denoiser's own, or a single file."""
    if path.is_file():
        return [path]
    folder = next((path / part for part in PARTS if (path / part).is_dir()), path)
    plain = [
        p for p in sorted(folder.glob("*.safetensors")) if p.name.count(".") == 1
    ]  # fp16 twins: `x.fp16.safetensors`
    found = plain or sorted(folder.glob("*.safetensors"))
    if not found:
        raise AdapterFileError(
            f"{path} has no weights of a UNet or transformer (.safetensors). "
            "Give a pipeline's folder in diffusers layout, the folder of its unet, or an adapter file."
        )
    return found
