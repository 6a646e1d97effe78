"""Going on from an adapter that is there already: the files that `start_from` names, and what follows from them.

The new run's layers, ranks, scales and norm are the file's. A LoRA may go on as a DoRA too: with the magnitudes of
W0 + s B A it starts as the very same model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dora_diffusion.adapters.injection import KIND_LABEL, Kind
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
        if problem := _cannot_be_trained(file, kind):
            raise ConfigError(
                f"start_from: {file.path} {problem} Or make a LoRA of it: "
                + shell_line(
                    [
                        *("dora-diffusion", "convert", operand(file.path), "--to", "lora"),
                        *("--base", config.base, "--out", "lora.safetensors"),
                    ]
                )
            )
    first, *others = starts.values()
    if any(other.layers != first.layers or other.config.rank != first.config.rank for other in others):
        raise ConfigError(
            f"start_from: {' and '.join(str(file.path) for file in starts.values())} differ in layers or rank, so they "
            "are no twins. Train each by itself."
        )
    return starts


def _cannot_be_trained(file: AdapterFile, kind: Kind) -> str:
    if file.config.kind == "full":
        return "holds whole differences, which are not trained here."
    if file.config.parametrisation != "lora":
        return f"is {file.config.kind_label}, which is not gone on from here: convert it with --to lora first."
    if file.vectors:
        return f"changes {file.vectors}, which are not trained here."
    strange = ("unscaled_magnitude", "shared_magnitude")
    if file.norm_axis == "mixed" or any(name.endswith(strange) for name in file.tensors):
        return "has magnitudes of a kind that is not trained here."
    if file.config.kind == "dora" and kind == "lora":
        return "is a DoRA, and a LoRA is to be trained: set kind to dora."
    return ""


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
    line = (
        f"{KIND_LABEL[kind]}: goes on from {file.path.name}, a {said.kind_label} of rank {said.rank}, "
        f"alpha {said.alpha:g}, {len(file.layers)} layers"
    )
    if not fit_of(base, file).same_weights:
        line += f"; it was trained on {file.base.name}, whose weights are others than this base's"
    return "; ".join((line, *file.notes))
