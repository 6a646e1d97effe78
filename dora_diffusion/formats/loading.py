"""An adapter file into a pipeline or a model: every layer at its place, or one error that names all that is not."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dora_diffusion.adapters.frozen import FrozenLayer, FrozenWeight
from dora_diffusion.adapters.injection import (
    Adapter,
    AdapterConfig,
    Kind,
    NormAxis,
    accompany,
    adaptable_layers,
    changeable_layers,
    check_strength,
    inject_into,
)
from dora_diffusion.adapters.labels import TRAINED
from dora_diffusion.adapters.layers import DoRAUpdate
from dora_diffusion.errors import AdapterFileError, AdapterMismatchError
from dora_diffusion.formats.anatomy import MODEL_LABEL, Anatomy, anatomy_of, model_of
from dora_diffusion.formats.content import AdapterFile
from dora_diffusion.formats.description import BaseIdentity, identify_base
from dora_diffusion.formats.findings import Findings, counted, some
from dora_diffusion.formats.fitting import Fitted, fit
from dora_diffusion.formats.forms import with_axes
from dora_diffusion.formats.kinds import model_of_names
from dora_diffusion.formats.names import TEXT_ENCODERS
from dora_diffusion.formats.placing import bare_names, families_of, place_again
from dora_diffusion.formats.reading import read_with_findings
from dora_diffusion.formats.words import vocabulary_of

__all__ = [
    "Fit",
    "attach",
    "attach_trainable",
    "by_the_models_names",
    "check_fits",
    "denoiser_of",
    "fit_of",
    "given_a_bias",
    "load_adapter",
    "text_encoders_of",
]


# What diffusers' fuse_qkv_projections puts in the place of what.
FUSED_PROJECTIONS = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
}


def denoiser_of(pipe_or_model: object) -> nn.Module:
    """The UNet or transformer of a pipeline, or the module itself. Raises AdapterMismatchError."""
    pipe_or_model = getattr(pipe_or_model, "pipe", pipe_or_model)  # a Base, as load_base gives it
    for name in ("unet", "transformer"):
        module = getattr(pipe_or_model, name, None)
        # A text encoder has a `transformer` too; a pipeline is no module.
        if isinstance(module, nn.Module) and not isinstance(pipe_or_model, nn.Module):
            return module
    if isinstance(pipe_or_model, nn.Module):
        return pipe_or_model
    raise AdapterMismatchError(
        f"cannot load an adapter into a {type(pipe_or_model).__name__}: "
        "give a diffusers pipeline with a unet or a transformer, or one of these models itself."
    )


def text_encoders_of(pipe_or_model: object) -> dict[str, nn.Module]:
    """A pipeline's text encoders by their names in it; a bare model has none."""
    pipe = getattr(pipe_or_model, "pipe", pipe_or_model)
    if isinstance(pipe, nn.Module):
        return {}
    return {name: m for name in TEXT_ENCODERS if isinstance(m := getattr(pipe, name, None), nn.Module)}


def load_adapter(
    pipe_or_model: object,
    path: str | os.PathLike[str],
    *,
    strength: float = 1.0,
    name: str | None = None,
    partial: bool = False,
    alpha: float | None = None,
) -> Adapter:
    """Load an adapter of any dialect into a diffusers pipeline, or into a bare UNet or transformer.

    `path` is a file, a PEFT folder or a hub id ("owner/name", "owner/name/file.safetensors"). `alpha` is for the files
    of programs that do not save theirs. Raises AdapterFileError for a file that is no sound adapter and
    AdapterMismatchError when any of its layers is not in the model or has another shape: nothing is loaded in part,
    unless `partial` asks for it. Warns when the base has other weights.
    """
    views, anatomy = _look_at(pipe_or_model)
    file, findings = read_with_findings(path, alpha=alpha, anatomy=anatomy)
    return _attach(pipe_or_model, _fit_or_report(pipe_or_model, views, file, findings, partial), strength, name)


def attach(
    pipe_or_model: object,
    file: AdapterFile,
    *,
    strength: float = 1.0,
    name: str | None = None,
    partial: bool = False,
) -> Adapter:
    """`load_adapter` for a file that was read already."""
    return _attach(pipe_or_model, _fitted(pipe_or_model, file, partial), strength, name)


def check_fits(pipe_or_model: object, file: AdapterFile) -> None:
    """Raises AdapterMismatchError unless every layer of the file is in the model with its shape, and AdapterFileError
    for a file that was bent for one program."""
    _fitted(pipe_or_model, file)


def by_the_models_names(pipe_or_model: object, file: AdapterFile, partial: bool = False) -> AdapterFile:
    """The file with its layers by their paths in this model. Raises AdapterMismatchError where not all of it fits, or
    with `partial` none of it."""
    fitted = _fitted(pipe_or_model, file, partial)
    tensors = {
        f"{path}.{p}": tensor
        for path, held in fitted.tensors.items()
        for p, tensor in with_axes(held, fitted.views[path].in_shape).items()
    }
    made = replace(fitted.file, tensors=tensors, config=fitted.config(), flat=frozenset(), raw=None)
    return replace(made, fellows=fitted.fellows())


def given_a_bias(pipe_or_model: object, file: AdapterFile) -> list[str]:
    """The layers of this model that have no bias and are given one (PEFT's lora_bias). Raises AdapterMismatchError."""
    fitted = _fitted(pipe_or_model, file)
    return [
        path for path, held in fitted.tensors.items() if "bias_difference" in held and not fitted.views[path].has_bias
    ]


def _fitted(pipe_or_model: object, file: AdapterFile, partial: bool = False) -> Fitted:
    """A file that was read without the model, led to the model's layers; all that does not fit is raised or warned."""
    views, anatomy = _look_at(pipe_or_model)
    return _fit_or_report(pipe_or_model, views, *place_again(file, anatomy), partial)


def _fit_or_report(
    pipe_or_model: object, views: Mapping[str, FrozenWeight], file: AdapterFile, findings: Findings, partial: bool
) -> Fitted:
    file.check_universal()
    fitted = fit(file, views)
    fitted.leave(_not_computed_with(denoiser_of(pipe_or_model)))
    if fitted.problems or findings:
        _report(fitted, findings, identify_base(denoiser_of(pipe_or_model)), partial)
    return fitted


@torch.no_grad()
def attach_trainable(
    pipe_or_model: object,
    file: AdapterFile,
    kind: Kind,
    *,
    norm_axis: NormAxis = "output",
    dropout: float = 0.0,
    name: str | None = None,
) -> Adapter:
    """The file's adapter as one to train on, at exactly its layers and in its forms; a DoRA keeps its norm's axis.

    One without magnitudes goes on with them (`kind`, `norm_axis`): with those of W0 + dW, so that the model is the
    same. Raises AdapterMismatchError when it does not fit whole.
    """
    if file.config.kind == "full" or file.config.parametrisation not in TRAINED or file.fellows:
        raise AdapterMismatchError(
            f"cannot go on from {file.path}: it is {file.config.kind_label}, which is not trained here. "
            "Write it as a LoRA of some rank first: dora-diffusion convert FILE --to lora --rank 32 --base BASE."
        )
    if file.vectors:
        raise AdapterMismatchError(
            f"cannot go on from {file.path}: it changes {file.vectors} too, which are not trained here. Merge it into "
            "the base and train on that: dora-diffusion merge FILE --base BASE --out FOLDER."
        )
    fitted = _fitted(pipe_or_model, file)
    if file.words:
        words = ", ".join(map(str, file.words))
        warnings.warn(f"{file.path.name}: {words} is not trained on, and not in what is saved.", stacklevel=2)
    config = replace(fitted.config(), kind=kind, dropout=dropout)
    if file.config.kind != kind:
        config = replace(config, norm_axis=norm_axis)
    adapter = inject_into(
        denoiser_of(pipe_or_model),
        config,
        {path: fitted.views[path] for path in fitted.tensors},
        name=name,
        text_encoders=text_encoders_of(pipe_or_model),
        tensors={path: _to_train(held, config, fitted.views[path]) for path, held in fitted.tensors.items()},  # type: ignore[arg-type]
    )
    for path, update in adapter.updates().items():
        if isinstance(update, DoRAUpdate) and update.magnitude_name not in fitted.tensors[path]:
            update.get_parameter(update.magnitude_name).copy_(update.norm())
    return adapter


def _to_train(held: Mapping[str, Tensor], config: AdapterConfig, view: FrozenLayer) -> dict[str, Tensor]:
    """A layer's parameters in the order that new ones have, with room for the magnitudes that it lacks."""
    tensors = {name: held[name] for name in sorted(held, key=lambda name: ("magnitude" in name, name))}
    if config.magnitude is not None and config.magnitude not in held:
        size = view.out_features if config.norm_axis == "output" else view.in_shape[0]
        tensors[config.magnitude] = torch.ones(size)  # [out] or [in]
    return tensors


@dataclass(frozen=True)
class Fit:
    """How an adapter fits a base: how many of its layers the base has, a line for each that it lacks, the number of
    keys that are not read, and the base's fingerprint."""

    matched: int
    total: int
    unmatched: tuple[str, ...]
    fingerprint: str
    same_weights: bool
    left_out: int = 0


def fit_of(pipe_or_model: object, file: AdapterFile) -> Fit:
    """What `attach` would find, with nothing loaded. Raises AdapterMismatchError where there is no model to look at."""
    views, anatomy = _look_at(pipe_or_model)
    placed, findings = place_again(file, anatomy)
    fitted, here = fit(placed, views), _identity(pipe_or_model, file)
    problems = (*fitted.problems, *findings.all())
    return Fit(
        len(fitted.tensors),
        len(fitted.tensors) + len(problems),
        problems,
        here.fingerprint,
        file.base.same_weights(here),
        len(placed.left_out),
    )


def _look_at(pipe_or_model: object) -> tuple[Mapping[str, FrozenWeight], Anatomy]:
    """The layers that an adapter may change, a text encoder's behind its name, and what names they answer to."""
    model = denoiser_of(pipe_or_model)
    views: dict[str, FrozenWeight] = dict(changeable_layers(model))
    for encoder, module in text_encoders_of(pipe_or_model).items():
        views |= {f"{encoder}.{path}": view for path, view in changeable_layers(module).items()}
    return views, anatomy_of(model, views)


def _is_fused(module: nn.Module) -> bool:
    """diffusers' older attention says so by its processor alone: the mark stays when it is unfused."""
    if not getattr(module, "fused_projections", False):
        return False
    return hasattr(module, "unfuse_projections") or "Fused" in type(getattr(module, "processor", None)).__name__


def _not_computed_with(model: nn.Module) -> dict[str, str]:
    """The projections that a model has fused since it was loaded: they are there, and nothing goes through them."""
    unused: dict[str, str] = {}
    for name, module in model.named_modules():
        if not _is_fused(module):
            continue
        for fused, parts in FUSED_PROJECTIONS.items():
            if hasattr(module, fused):
                said = f"this model computes with {fused} in its place: call unfuse_qkv_projections() on it first"
                unused |= {f"{name}.{part}": said for part in parts}
    return unused


def _identity(pipe_or_model: object, file: AdapterFile) -> BaseIdentity:
    """The denoiser's, sketched where the file's base is."""
    model = denoiser_of(pipe_or_model)
    layers = adaptable_layers(model)
    return identify_base(model, [layer for layer in file.base.sketch if layer in layers] or None)


def _attach(pipe_or_model: object, fitted: Fitted, strength: float, name: str | None) -> Adapter:
    check_strength(strength)
    file, here = fitted.file, _identity(pipe_or_model, fitted.file)
    if not file.base.same_weights(here):
        warnings.warn(
            f"{file.path.name} was trained on {file.base.name!r} (fingerprint {file.base.fingerprint}), this base is "
            f"{here.name!r} ({here.fingerprint}): same layers, other weights. It is loaded; its effect may differ.",
            stacklevel=3,
        )
    adapter = inject_into(
        denoiser_of(pipe_or_model),
        fitted.config(),
        {path: fitted.views[path] for path in fitted.tensors},
        name=name,
        text_encoders=text_encoders_of(pipe_or_model),
        tensors=fitted.tensors,
        fellows=fitted.fellows(),
    )
    adapter.strength = strength
    _teach(pipe_or_model, adapter, file)
    return adapter


def _teach(pipe_or_model: object, adapter: Adapter, file: AdapterFile) -> None:
    """Put the words of a file beside its adapter; those that cannot be there are named in a warning."""
    pipe = getattr(pipe_or_model, "pipe", pipe_or_model)
    vocabulary, problems = vocabulary_of(pipe, file.words, model_of(type(adapter.model).__name__))
    if vocabulary is not None:
        accompany(adapter, vocabulary)
    if file.beside or problems:
        warnings.warn(f"{file.path.name}: {'; '.join((*file.beside, *problems))}.", stacklevel=4)


def _report(fitted: Fitted, findings: Findings, here: BaseIdentity, partial: bool) -> None:
    """Raise, or with `partial` warn, saying all that does not fit. Raises AdapterFileError, AdapterMismatchError."""
    file = fitted.file
    # Modules that could not be read came to no layer; each counts as one.
    unread = max(0, findings.total - len(set(file.written.values())))
    fitting, total = len(fitted.tensors), max(len(file.layers), len(fitted.tensors)) + unread
    lines = (("\n  " + some(fitted.problems, "\n  ")) if fitted.problems else "") + findings.lines()
    if partial and fitting:
        dropped = f" and {counted(len(file.left_out))} left out" if file.left_out else ""
        warnings.warn(f"{file.path.name} is loaded in part: {fitting} of {total} layers{dropped}.{lines}", stacklevel=5)
        return
    if not fitted.problems:
        raise AdapterFileError(f"{file.path} cannot be read whole.{lines}\n{findings.way_out()}")
    if not fitting and (foreign := model_of_names(bare_names(file))):
        raise AdapterMismatchError(
            f"{file.path} is an adapter for {foreign.what}: none of its {total} layers is in this base, "
            f"{here.name!r} ({here.model_class}). Load it with {foreign.way_out}.{lines}"
        )
    trained = (
        f"Trained on {file.base.name!r} ({file.base.model_class}, fingerprint {file.base.fingerprint}); this base is "
        if file.base.sketch
        else f"{_told_by_names(file)}; this base is "
    )
    raise AdapterMismatchError(
        f"{file.path} does not fit this base: {fitting} of {total} layers match.{lines}\n{trained}"
        f"{here.name!r} ({here.model_class}, {here.fingerprint}). Load it with the base it was trained on"
        + (", or what fits of it with partial=True (--partial)." if fitting else ".")
    )


def _told_by_names(file: AdapterFile) -> str:
    """What a file is for that does not say it itself."""
    silent = "The file does not say what it was trained on"
    families = [MODEL_LABEL[model] for model in families_of(file) if model != "other"]
    return f"{silent}, its names are those of {' or '.join(families)}" if len(families) in (1, 2) else silent
