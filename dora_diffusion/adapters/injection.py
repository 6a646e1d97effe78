"""Put adapters into a model and take them out again.

`inject_adapter` replaces the layers that the configuration names by `AdaptedLayer`s and returns the `Adapter`, the
handle for everything after: its parameters to train, its strength, fusing, and `eject`, which exactly undoes it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Literal

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.fellows import introduce
from dora_diffusion.adapters.frozen import FrozenLayer, freeze_view
from dora_diffusion.adapters.labels import KIND_LABEL, AnyKind, Kind, Parametrisation, adapter_label
from dora_diffusion.adapters.layers import AdaptedLayer, LoRAUpdate
from dora_diffusion.adapters.parametrisations import Form, check_parametrisation, check_rank, check_trained, form_of
from dora_diffusion.adapters.roots import Roots
from dora_diffusion.adapters.variants import decomposed, update_of
from dora_diffusion.errors import AdapterStateError, ConfigError, TargetError, nearest

__all__ = [
    "ATTENTION_TARGETS",
    "FEED_FORWARD_TARGETS",
    "KIND_LABEL",
    "MAX_ALPHA",
    "TEXT_ENCODER_TARGETS",
    "Adapter",
    "AdapterConfig",
    "AnyKind",
    "Kind",
    "NormAxis",
    "Parametrisation",
    "adaptable_layers",
    "check_strength",
    "inject_adapter",
    "inject_into",
    "matching_layers",
]

NormAxis = Literal["output", "input"]
ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
FEED_FORWARD_TARGETS = ("ff.net.0.proj", "ff.net.2")
TEXT_ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")  # the same, as CLIP's text model names them
MAX_ALPHA = 1e6  # no training is near it, and what is scaled by it stays a number
MAX_STRENGTH = 1e6
NORM_AXES: dict[str, str] = {"output": "magnitude", "input": "input_magnitude"}  # and DoRA's parameter for it


@dataclass(frozen=True)
class AdapterConfig:
    """What to inject.

    target_modules are suffixes of module names ("to_q" matches "...attn1.to_q") or regular expressions that match the
    whole name. The low-rank product is scaled by alpha / rank, with use_rslora by alpha / sqrt(rank) (Kalajdzievski
    2023). The patterns override rank and alpha for single modules by their full name. norm_axis says whether DoRA's
    magnitudes belong to the outputs, as in the authors' code, PEFT and diffusers, or to the inputs, as ComfyUI, Forge,
    A1111 and InvokeAI compute it.

    parametrisation says what the update is made of: "lora" B A; "lokr" a Kronecker product, where rank is LyCORIS's
    lora_dim and factor its factor (-1: factors as close to each other as can be), and full_matrix keeps the larger
    factor whole, as a rank of half its size or more does; "loha" an elementwise product of two low-rank matrices. Each
    with magnitudes too (kind "dora"). The other forms are read from files and not trained. Raises ConfigError.
    """

    kind: AnyKind = "dora"
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ATTENTION_TARGETS
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    norm_axis: NormAxis = "output"
    parametrisation: Parametrisation = "lora"
    factor: int = -1
    full_matrix: bool = False

    def __post_init__(self) -> None:
        targets = self.target_modules
        object.__setattr__(self, "target_modules", (targets,) if isinstance(targets, str) else tuple(targets))
        if self.kind not in KIND_LABEL:
            raise ConfigError(f"kind is {self.kind!r}; it must be 'dora' or 'lora'.")
        if self.norm_axis not in NORM_AXES:
            raise ConfigError(f"norm_axis is {self.norm_axis!r}; it must be 'output' or 'input'.")
        for rank in (self.rank, *self.rank_pattern.values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"rank is {rank!r}; it must be a whole number of at least 1 (4 to 64 is usual).")
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            if not _is_number(alpha) or not 0 < alpha <= MAX_ALPHA:
                raise ConfigError(
                    f"alpha is {alpha!r}; it must be a number above 0 (often equal to the rank), and at most "
                    f"{MAX_ALPHA:,.0f}."
                )
        if not _is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout!r}; it must be at least 0 and below 1.")
        if not self.target_modules or not all(isinstance(t, str) and t for t in self.target_modules):
            raise TargetError(f"target_modules is {self.target_modules!r}; name at least one layer, such as 'to_q'.")
        check_parametrisation(self.parametrisation, self.factor, self.full_matrix)

    @property
    def form(self) -> Form:
        """What an update of a layer is made of, and how it starts."""
        return form_of("full" if self.kind == "full" else self.parametrisation, self.factor, self.full_matrix)

    @property
    def magnitude(self) -> str | None:
        """The name of the parameter that holds the magnitudes; None without."""
        return NORM_AXES[self.norm_axis] if self.kind == "dora" else None

    @property
    def kind_label(self) -> str:
        """The kind as people write it."""
        return adapter_label(self.kind, self.parametrisation)

    def rank_of(self, name: str) -> int:
        return self.rank_pattern.get(name, self.rank)

    def alpha_of(self, name: str) -> float:
        return self.alpha_pattern.get(name, self.alpha)

    def scale_of(self, name: str) -> float:
        """s in W0 + s B A for the module of this name."""
        rank = self.rank_of(name)
        return self.alpha_of(name) / (math.sqrt(rank) if self.use_rslora else rank)


class Adapter:
    """One adapter in one model, or in a pipeline's denoiser and text encoders; all layers share one name and strength.

    Made by `inject_adapter` and `load_adapter`. `model` is the denoiser; a text encoder's layers stand in `layers`
    behind its name in the pipeline: "text_encoder.".
    """

    def __init__(
        self,
        model: nn.Module,
        config: AdapterConfig,
        name: str,
        layers: dict[str, AdaptedLayer],
        text_encoders: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.model = model
        self.config = config
        self.name = name
        self.layers = layers
        self._roots = Roots(model, text_encoders or {})
        self._strength = 1.0
        self._fused = False

    def __repr__(self) -> str:
        state = "ejected" if not self.layers else f"strength {self.strength:g}" + (", fused" * self._fused)
        return (
            f"Adapter({self.name!r}, {self.config.kind}, rank {self.config.rank}, alpha {self.config.alpha:g}, "
            f"{len(self.layers)} layers, {self.num_parameters():,} parameters, {state})"
        )

    def updates(self) -> dict[str, LoRAUpdate]:
        """This adapter's update of each layer, by the layer's name in the model."""
        return {path: layer.updates[self.name] for path, layer in self.layers.items()}  # type: ignore[misc]

    def parameters(self) -> Iterator[nn.Parameter]:
        """The trainable parameters, for an optimizer."""
        for update in self.updates().values():
            yield from update.parameters()

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """`<layer>.lora_A`, `.lora_B` and, for DoRA, `.magnitude` or `.input_magnitude`."""
        return {f"{path}.{leaf}": p for path, update in self.updates().items() for leaf, p in update.named_parameters()}

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into all parameters; the names and shapes are those of `named_parameters`."""
        parameters = self.named_parameters()
        assert parameters.keys() == tensors.keys(), "callers check the names first"
        for name, parameter in parameters.items():
            assert parameter.shape == tensors[name].shape, "and the shapes: copying would spread the values"
            parameter.copy_(tensors[name])

    @property
    def strength(self) -> float:
        """w in W0 + w (W' - W0): 0 is the base bit for bit, 1 the trained adapter. Changing it touches no weight,
        unless the adapter is fused."""
        return self._strength

    @strength.setter
    def strength(self, value: float) -> None:
        self._require_layers("set the strength of")
        self._strength = check_strength(value)
        for update in self.updates().values():
            update.strength = self._strength
        if self._fused:
            self.fuse()

    @property
    def is_fused(self) -> bool:
        return self._fused

    def fuse(self) -> None:
        """Write the update at its present strength into the base's weights, so that it costs nothing to run.

        The original weights are kept until `unfuse`, which brings back their bits.
        """
        self._require_layers("fuse")
        for layer in self.layers.values():
            layer.frozen.weight  # noqa: B018 (raises for a packed one, before any layer is written to)
        for layer in self.layers.values():
            layer.set_fused(tuple(dict.fromkeys((*layer.fused, self.name))))
        self._fused = True

    def unfuse(self) -> None:
        """Take the update out of the base's weights again."""
        self._require_layers("unfuse")
        for layer in self.layers.values():
            layer.set_fused(tuple(name for name in layer.fused if name != self.name))
        self._fused = False

    def merge(self, *others: Adapter) -> None:
        """Write the updates into the base's weights for good, at their present strengths, and take the adapters out.

        The model is a plain one then, to save or to hand on. Several add up as they do beside each other. Raises
        AdapterStateError for a packed base, and for adapters that would be left in these layers: what they add is
        relative to the weights that they were trained on.
        """
        adapters = (self, *others)
        for adapter in adapters:
            adapter._require_layers("merge")
        layers = {id(layer): layer for adapter in adapters for layer in adapter.layers.values()}
        left = {name for layer in layers.values() for name in layer.updates} - {adapter.name for adapter in adapters}
        if left:
            raise AdapterStateError(
                f"cannot merge while {', '.join(sorted(left))} is in the same layers, trained on their weights as they "
                "are: merge it too, with merge(OTHER), or eject it first."
            )
        for layer in layers.values():
            layer.frozen.weight  # noqa: B018 (raises for a packed one, before any layer is written to)
        for layer in layers.values():
            layer.set_fused(tuple(layer.updates))
            layer.keep_fused()
        for adapter in adapters:
            adapter._fused = False
            adapter.eject()

    def eject(self) -> None:
        """Take the adapter out of the model: the same modules, names, weights and requires_grad as before."""
        self._require_layers("eject")
        if self._fused:
            self.unfuse()
        for path, layer in self.layers.items():
            del layer.updates[self.name]
            if not layer.updates:
                self._roots.replace(path, layer.base)
        self.layers = {}
        self._roots.thaw()

    def _require_layers(self, action: str) -> None:
        if not self.layers:
            raise AdapterStateError(f"cannot {action} adapter {self.name!r}: it was ejected. Inject or load it again.")
        self._roots.settle()


def inject_adapter(
    model: nn.Module,
    config: AdapterConfig,
    *,
    name: str | None = None,
    seed: int | None = None,
    text_encoders: Mapping[str, nn.Module] | None = None,
) -> Adapter:
    """Adapt the layers of a UNet, a DiT or any other module that config.target_modules names.

    The model is frozen; at the start its output is unchanged. `seed` makes the random start of A repeatable. Further
    calls add further adapters, whose differences to the base add up. Of `text_encoders`, by their names in the
    pipeline, the attention projections are adapted too. Raises TargetError when nothing matches.
    """
    if config.kind == "full":
        raise ConfigError(
            "kind is 'full'; a new adapter is 'dora' or 'lora' (full differences are only read from files)."
        )
    check_trained(config.parametrisation)
    views = matching_layers(model, config.target_modules)
    if text_encoders:
        config = replace(config, target_modules=(*config.target_modules, *TEXT_ENCODER_TARGETS))
        for encoder, module in text_encoders.items():
            found = matching_layers(module, TEXT_ENCODER_TARGETS)
            views |= {f"{encoder}.{path}": view for path, view in found.items()}
    check_rank(config.parametrisation, config.rank, views)
    return inject_into(model, config, views, name=name, seed=seed, text_encoders=text_encoders)


def inject_into(
    model: nn.Module,
    config: AdapterConfig,
    views: Mapping[str, FrozenLayer],
    *,
    name: str | None = None,
    seed: int | None = None,
    text_encoders: Mapping[str, nn.Module] | None = None,
    tensors: Mapping[str, Mapping[str, Tensor]] | None = None,
    fellows: Mapping[str, tuple[str, ...]] | None = None,
) -> Adapter:
    """`inject_adapter` at exactly these layers, whatever config.target_modules says.

    `text_encoders` by their names in the pipeline. `tensors` by layer are the values of the updates' parameters, which
    say what form each update has; without them it is the config's, as training starts. `fellows` are the parts of a
    fused layer, by each of them, whose updates have one norm.
    """
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    roots = Roots(model, text_encoders or {})
    name = _check_name(name, roots.adapter_names())
    updates = {}
    for path, frozen in views.items():  # all are made before the first is put in: a layer may refuse
        if tensors is None:
            form = config.form
            values = form.start(frozen, config.rank_of(path), generator)
            make = decomposed(form.update, config.magnitude)  # type: ignore[arg-type]
        else:
            values, make = dict(tensors[path]), update_of(tensors[path])
        updates[path] = make(frozen, config.rank_of(path), config.scale_of(path), config.dropout, None, values)
    introduce(updates, fellows or {})
    roots.freeze(views)
    layers = {}
    for path, frozen in views.items():
        current = roots.get(path)
        layer = current if isinstance(current, AdaptedLayer) else AdaptedLayer(current, frozen)
        layer.updates[name] = updates[path].train(layer.training)
        if layer is not current:
            roots.replace(path, layer)
        layers[path] = layer
    roots.host(views)
    return Adapter(model, config, name, layers, text_encoders)


def _check_name(name: str | None, names: set[str]) -> str:
    name = name or next(n for i in range(len(names) + 1) if (n := f"adapter_{i}") not in names)
    if name in names:
        raise ConfigError(f"an adapter named {name!r} is in the model already; choose another name.")
    if "." in name or hasattr(nn.ModuleDict(), name):
        raise ConfigError(f"an adapter cannot be named {name!r}, because modules cannot; choose another name.")
    return name


def matching_layers(model: nn.Module, target_modules: Iterable[str]) -> dict[str, FrozenLayer]:
    """The layers that the targets name, by their full name, in the model's order. Raises TargetError."""
    candidates = adaptable_layers(model)
    wanted: set[str] = set()
    for target in target_modules:
        matched = [path for path in candidates if _matches(path, target)]
        if not matched:
            raise TargetError(_no_match(model, target, candidates))
        wanted.update(matched)
    return {path: frozen for path, frozen in candidates.items() if path in wanted}


def adaptable_layers(model: nn.Module) -> dict[str, FrozenLayer]:
    """Every layer that could be adapted; one that is adapted already shows its base's name, not its own parts."""
    layers: dict[str, FrozenLayer] = {}
    inside: tuple[str, ...] = ()
    for path, module in _walk(model):
        if inside and path.startswith(inside):
            continue
        if isinstance(module, nn.TransformerEncoderLayer):
            inside = (*inside, path + "." if path else "")  # in eval mode it reads its layers' weights and calls none
        elif isinstance(module, AdaptedLayer):
            layers[path] = module.frozen
            inside = (*inside, path + ".")
        elif path and (frozen := freeze_view(module)) is not None:
            layers[path] = frozen
    return layers


def _walk(module: nn.Module, path: str = "", seen: set[nn.Module] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules`, which can go on while another thread puts an adapter into the model or takes it out."""
    seen = set() if seen is None else seen
    if module in seen:
        return
    seen.add(module)
    yield path, module
    for name, child in list(module._modules.items()):
        if child is not None:
            yield from _walk(child, f"{path}.{name}" if path else name, seen)


def _matches(path: str, target: str) -> bool:
    if path == target or path.endswith("." + target):
        return True
    try:
        return re.fullmatch(target, path) is not None
    except re.error as error:
        raise TargetError(
            f"target_modules: {target!r} is neither the end of a layer's name nor a regular expression ({error})."
        ) from error


def _no_match(model: nn.Module, target: str, candidates: Iterable[str]) -> str:
    leaves = {_leaf(path) for path in candidates}
    near = nearest(target, leaves) or sorted(leaves)[:8]
    return (
        f"target_modules: {target!r} matches no layer of {type(model).__name__}. "
        f"Near or usual names there: {', '.join(near) or 'none: it has no linear or convolutional layer'}."
    )


def _leaf(path: str) -> str:
    """The end of a name that tells layers apart: "to_out.0", not "0"."""
    parts = path.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def check_strength(value: float) -> float:
    """The strength as a float. Raises ConfigError when it is no finite number, or beyond all reason."""
    if not _is_number(value) or abs(value) > MAX_STRENGTH:
        raise ConfigError(f"strength is {value!r}; it must be a finite number, usually between 0 and 1.5.")
    return float(value)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and abs(value) < math.inf  # type: ignore[operator]
