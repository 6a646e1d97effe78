"""An adapter file's layers beside those of a model: which tensors go where, in which shape, and what does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from dora_diffusion.adapters.frozen import FrozenWeight
from dora_diffusion.adapters.injection import AdapterConfig
from dora_diffusion.errors import nearest
from dora_diffusion.formats.content import AdapterFile, by_layer
from dora_diffusion.formats.forms import BY_CHANNEL, form_of
from dora_diffusion.formats.kinds import FIRST_LAYERS, wider_base
from dora_diffusion.formats.leaves import IN_PEFTS_KEYS

__all__ = ["Fitted", "fit"]


@dataclass
class Fitted:
    """A file's layers at their paths in a model with these layers, and what found no place, one line each."""

    file: AdapterFile
    views: Mapping[str, FrozenWeight]
    places: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def config(self) -> AdapterConfig:
        """The file's, with the model's paths; dropout is for training alone."""
        said, places = self.file.config, self.places
        return replace(
            said,
            dropout=0.0,
            norm_axis="input" if self.file.norm_axis == "input" else "output",
            rank_pattern={places[layer]: r for layer, r in said.rank_pattern.items() if layer in places},
            alpha_pattern={places[layer]: a for layer, a in said.alpha_pattern.items() if layer in places},
        )

    def fellows(self) -> dict[str, tuple[str, ...]]:
        """The parts of fused layers that share a norm, by the model's paths."""
        places = self.places
        return {places[la]: tuple(places[each] for each in f) for la, f in self.file.fellows.items() if la in places}

    def leave(self, unused: Mapping[str, str]) -> None:
        """Take out layers that the model does not compute with, and say why."""
        for path in self.tensors.keys() & unused.keys():
            del self.tensors[path]
            self.places = {layer: place for layer, place in self.places.items() if place != path}
            self.problems.append(f"{path}: {unused[path]}")

    def by_name(self) -> dict[str, Tensor]:
        """The tensors by the names of an adapter's parameters."""
        return {f"{path}.{p}": tensor for path, held in self.tensors.items() for p, tensor in held.items()}


def fit(file: AdapterFile, views: Mapping[str, FrozenWeight]) -> Fitted:
    fitted = Fitted(file, views)
    flat = {path.replace(".", "_"): path for path in views}
    for layer, held in by_layer(file.tensors).items():
        # A file that was made here, not read, has a text encoder's layers behind `text_model`, and may have flat names.
        path = next((p for p in (layer, layer.replace("text_model.", "", 1)) if p in views), None)
        path = path or flat.get(layer.replace(".", "_"))
        if path is None:
            near = nearest(layer, views, 1)
            fitted.problems.append(
                f"{_said(layer, file)}: not in this model" + (f" (nearest: {near[0]})" if near else "")
            )
        elif path in fitted.tensors:
            fitted.problems.append(f"{_said(layer, file)}: {path} has an update of this file already")
        elif problem := _misfit(held, views[path], _adds_bias(file, layer)):
            fitted.problems.append(f"{_said(layer, file)}: {problem}{_for_more_inputs(path, held, views[path])}")
        else:
            fitted.places[layer] = path
            fitted.tensors[path] = {p: _shaped(p, tensor, views[path]) for p, tensor in held.items()}
    for layer in [la for la, fellows in file.fellows.items() if not fitted.places.keys() >= set(fellows)]:
        if layer in fitted.places:
            del fitted.tensors[fitted.places.pop(layer)]
            fitted.problems.append(f"{_said(layer, file)}: not all parts of the layer that its norm runs over are here")
    return fitted


def _said(layer: str, file: AdapterFile) -> str:
    written = file.written.get(layer, layer)
    return layer if written.endswith(layer) else f"{layer} ({written})"


def _misfit(held: Mapping[str, Tensor], view: FrozenWeight, adds_biases: bool) -> str:
    """Why a layer's tensors do not fit; empty when they do."""
    wanted = (view.out_features, *view.in_shape)
    if problem := _misfitting_bias(held, view, adds_biases):
        return problem
    if held.keys() == {"bias_difference"}:
        return ""
    if not view.in_shape and not held.keys() & {"difference", "replacement"}:
        return f"a {form_of(held).label} for a normalisation layer, which has no rows and columns"
    m = held.get("input_magnitude", held.get("shared_magnitude"))
    if m is not None and m.numel() != view.in_shape[0]:
        return f"a magnitude of {m.numel()} inputs, this layer has {view.in_shape[0]}"
    if not held.keys() & {"difference", "replacement", "lora_A"}:
        sizes = form_of(held).sizes(held)
        if "rows" in held:
            sizes = replace(sizes, outputs=int(held["rows"].diff(dim=1).sum()))
        return sizes.cannot_be(view.out_features, view.in_shape)
    for whole in held.keys() & {"difference", "replacement"}:
        shape = tuple(held[whole].shape)
        return "" if _same(shape, wanted) else f"a difference of {list(shape)} for a weight of {list(wanted)}"
    A, B = held["lora_A"], held["lora_B"]
    if not _same((B.shape[0], *A.shape[1:]), wanted):
        return (
            f"adapter for {B.shape[0]} x {list(A.shape[1:])}, "
            f"this layer has {view.out_features} x {list(view.in_shape)}"
        )
    return ""


def _adds_bias(file: AdapterFile, layer: str) -> bool:
    """Whether the bias of a layer is PEFT's own (lora_B.bias), and no difference (diff_b) beside PEFT's names.

    PEFT gives a layer one that has none; others leave a difference of what is not there out: it is for another base.
    """
    module = file.raw.modules.get(file.written.get(layer, "")) if file.raw is not None else None
    return file.dialect in IN_PEFTS_KEYS and (module is None or "bias_difference" not in module)


def _misfitting_bias(held: Mapping[str, Tensor], view: FrozenWeight, adds_biases: bool) -> str:
    b = held.get("bias_difference")
    if b is None:
        return ""
    if b.numel() != view.out_features:
        return f"a difference of {b.numel()} biases, this layer has {view.out_features} outputs"
    if view.has_bias or (adds_biases and "lora_A" in held):
        return ""
    return "a difference of the bias, and this layer has none"


def _for_more_inputs(path: str, held: Mapping[str, Tensor], view: FrozenWeight) -> str:
    """What to say of a first layer that is wider in the file's base than here."""
    if path not in FIRST_LAYERS or "lora_A" not in held:
        return ""
    own, theirs = view.in_shape[0], held["lora_A"].shape[1]
    return wider_base(own, theirs) if theirs > own else ""


def _same(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Alike up to the two ones that tell a 1 x 1 convolution from a linear layer, which are the same map."""
    return shape == wanted or (
        shape[:2] == wanted[:2] and not (set(shape[2:]) | set(wanted[2:])) - {1} and len(shape) != len(wanted)
    )


def _shaped(parameter: str, tensor: Tensor, view: FrozenWeight) -> Tensor:
    if parameter == "lora_A":
        return tensor.reshape(-1, *view.in_shape)
    if parameter == "lora_B":
        return tensor.reshape(view.out_features, -1, *view.up_shape)
    if parameter in BY_CHANNEL:
        return tensor.flatten()
    is_whole = parameter in ("difference", "replacement")
    return tensor.reshape(view.out_features, *view.in_shape) if is_whole else tensor
