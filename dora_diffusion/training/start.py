"""Going on from an adapter that is there already: the files that `start_from` names, and what follows from them.

The new run's layers, ranks, scales and norm are the file's, and what its updates are made of. Without magnitudes it
may go on with them too (a LoRA as a DoRA, a LoKr as a DoKR): with those of W0 + dW it starts as the very same model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dora_diffusion.adapters.labels import TRAINED, Kind, adapter_label
from dora_diffusion.errors import ConfigError
from dora_diffusion.formats.files import AdapterFile, check_fits, fit_of, read_adapter_file
from dora_diffusion.models.loading import Base
from dora_diffusion.paths import operand
from dora_diffusion.screen import shell_line
from dora_diffusion.training.config import TrainConfig

__all__ = ["Starts", "config_from", "describe_start", "read_starts", "start_path"]

Starts = Mapping[Kind, AdapterFile]


def start_path(config: TrainConfig, kind: Kind) -> str:
    """The file that this kind starts from: in the folder of an earlier run, the one of its kind."""
    assert config.start_from is not None
    in_run = Path(config.start_from) / f"{kind}.safetensors"
    return str(in_run) if in_run.is_file() else config.start_from


def read_starts(config: TrainConfig) -> dict[Kind, AdapterFile]:
    """The adapters to go on from, by the kind that is trained; none without `start_from`.

    Raises ConfigError for an adapter that cannot be trained as this kind, AdapterFileError for a file that is unsound.
    """
    if config.start_from is None:
        return {}
    starts: dict[Kind, AdapterFile] = {}
    for kind in config.kinds:
        file = starts[kind] = read_adapter_file(start_path(config, kind))
        if problem := _cannot_be_trained(file, kind, config.base) or _other_parametrisation(config, file):
            raise ConfigError(f"start_from: {file.path} {problem}")
    first, *others = starts.values()
    if any(_shape(other) != _shape(first) for other in others):
        raise ConfigError(
            f"start_from: {' and '.join(str(file.path) for file in starts.values())} differ in layers or rank, so they "
            "are no twins. Train each by itself."
        )
    return starts


def _shape(file: AdapterFile) -> tuple[object, ...]:
    """What twins have in common."""
    return file.layers, file.config.rank, file.config.parametrisation


def _cannot_be_trained(file: AdapterFile, kind: Kind, base: str) -> str:
    """Why this file is not one to train on, and the way out; empty where it is one."""
    said, strange = "", ("unscaled_magnitude", "shared_magnitude")
    if file.config.kind == "full":
        said = "holds whole differences, which are not trained here."
    elif file.vectors:
        said = f"changes {file.vectors}, which are not trained here."
    elif file.norm_axis == "mixed" or any(name.endswith(strange) for name in file.tensors):
        said = "has magnitudes of a kind that is not trained here."
    elif file.config.parametrisation not in TRAINED:
        said = f"is a {file.config.kind_label}, which is not trained here."
    elif file.config.kind == "dora" and kind == "lora":
        wanted = adapter_label("lora", file.config.parametrisation)
        said = f"is a {file.config.kind_label}, and a {wanted} is to be trained: set kind to dora."
    convert = ["dora-diffusion", "convert", operand(file.path), "--to", "lora", "--base", base]
    return said and f"{said} Or make a LoRA of it: {shell_line([*convert, '--out', 'lora.safetensors'])}"


def _other_parametrisation(config: TrainConfig, file: AdapterFile) -> str:
    """Why a file of this parametrisation is none to train on as another; a LoRA is what nobody has to ask for."""
    theirs, wanted = file.config.parametrisation, config.parametrisation
    if wanted in (theirs, "lora"):
        return ""
    merge = ["dora-diffusion", "merge", operand(file.path), "--base", config.base, "--out", "merged"]
    return (
        f"is a {file.config.kind_label}, and parametrisation = {wanted} was given: the one cannot go on as the other. "
        "Leave parametrisation out to train it on as it is, or start_from for a new "
        f"{adapter_label('lora', wanted)}; to train one on top of this, put this into the base's weights first: "
        f"{shell_line(merge)}"
    )


def config_from(config: TrainConfig, starts: Starts, base: Base) -> TrainConfig:
    """The configuration with the file's layers, rank, scale and norm.

    Raises ConfigError for keys that say otherwise (one at its default says nothing), AdapterMismatchError for a file
    that is not for this base.
    """
    for each in starts.values():
        check_fits(base, each)
    file = next(iter(starts.values()))
    encoders = {layer.partition(".")[0] for layer in file.layers if layer.startswith("text_encoder")}
    if strange := encoders - base.text_encoders.keys():
        raise ConfigError(f"start_from: {file.path} adapts {', '.join(sorted(strange))}, which is not trained here.")
    axes = {each.norm_axis for each in starts.values()}
    shape: dict[str, object] = {
        "rank": file.config.rank,
        "alpha": file.config.alpha,
        "use_rslora": file.config.use_rslora,
        "norm_axis": next(iter(axes - {"none"}), config.norm_axis),
        "parametrisation": file.config.parametrisation,
        "factor": file.config.factor,
        "full_matrix": file.config.full_matrix,
    }
    layers: dict[str, object] = {  # whichever the file has are trained
        "train_text_encoder": bool(encoders),
        "train_feed_forward": False,
        "train_convolutions": False,
        "target_modules": None,
    }
    for key, value in (shape | layers).items():
        given = getattr(config, key)
        if given not in (value, TrainConfig.model_fields[key].default):
            said = f"has {key} = {value}" if key in shape else "has its own layers"
            raise ConfigError(f"start_from: {file.path} {said}, and {key} = {given} was given. Leave {key} out.")
    return config.model_copy(update=shape | layers)


def describe_start(file: AdapterFile, base: Base, kind: Kind) -> str:
    """A line for people: what is gone on from, and what is odd about it."""
    said = file.config
    label = adapter_label(kind, said.parametrisation)
    line = (
        f"{label}: goes on from {file.path.name}, a {said.kind_label} of rank {said.rank}, "
        f"alpha {said.alpha:g}, {len(file.layers)} layers"
    )
    if not fit_of(base, file).same_weights:
        line += f"; it was trained on {file.base.name}, whose weights are others than this base's"
    return "; ".join((line, *file.notes))
