"""The configuration of a training run: a TOML file or command line options, checked key by key."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dora_diffusion.adapters.injection import AdapterConfig, NormAxis
from dora_diffusion.adapters.labels import Kind, Trained, adapter_label
from dora_diffusion.adapters.parametrisations import check_parametrisation
from dora_diffusion.errors import AdapterFileError, ConfigError, nearest
from dora_diffusion.formats.storage import read_header
from dora_diffusion.models.quantising import Packing
from dora_diffusion.paths import given_path, obstacle
from dora_diffusion.training.optimizers import OptimizerName
from dora_diffusion.training.toml import read_toml, value_or_text

if TYPE_CHECKING:
    from dora_diffusion.models.families import Family

__all__ = ["TimestepSampling", "TrainConfig", "parse_assignments", "read_config", "resolve_config"]

TimestepSampling = Literal["uniform", "logit_normal"]
MOST_SHOWN = 80  # characters of a value in a message


def _path(text: str) -> str:
    try:
        return given_path(text)
    except ConfigError as error:
        raise ValueError(str(error)) from error  # pydantic names the key


# As given, with ~ expanded: relative to the folder that the command runs in, wherever the file lies.
PathText = Annotated[str, AfterValidator(_path)]

# Beyond these a float32 soon holds nothing, or a step changes nothing: a slip, and no training.
SLOWEST, FASTEST = 1e-15, 100.0  # of a learning rate
LARGEST = 1e6  # of what a loss, a gradient or an update is multiplied by
MOST = 2**16  # of what is counted and held in memory
WARM_UP = 10  # steps


class TrainConfig(BaseModel):
    """Everything that decides a run. None means "what suits the base"; the run writes down what it took."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # What to train on what
    images: PathText
    out: PathText
    base: PathText = "emoji"
    kind: Literal["dora", "lora", "both"] = "dora"
    instance_prompt: str | None = None
    validation_images: PathText | None = None
    held_out: int | None = Field(None, ge=0)
    start_from: PathText | None = None
    quantise: Packing | None = None
    resolution: int | None = Field(None, ge=8, le=4096)
    aspect_ratio_bucketing: bool = True
    random_flip: bool = False

    # The adapter
    parametrisation: Trained = "lora"
    factor: int = Field(-1, le=MOST)
    full_matrix: bool = False
    rank: int = Field(16, ge=1, le=MOST)
    alpha: float = Field(16.0, gt=0, le=LARGEST)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | None = None
    use_rslora: bool = False
    norm_axis: NormAxis = "output"
    train_feed_forward: bool = False
    train_convolutions: bool = False
    train_text_encoder: bool = False

    # Optimisation
    steps: int = Field(500, ge=1, le=10_000_000)
    batch_size: int = Field(4, ge=1, le=MOST)
    gradient_accumulation_steps: int = Field(1, ge=1, le=MOST)
    optimizer: OptimizerName = "adamw"
    learning_rate: float | None = Field(None, ge=SLOWEST, le=FASTEST)
    text_encoder_learning_rate: float | None = Field(None, ge=SLOWEST, le=FASTEST)
    lr_scheduler: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    warmup_steps: int | None = Field(None, ge=0)
    weight_decay: float = Field(0.0, ge=0, le=10)
    max_grad_norm: float = Field(1.0, gt=0, le=LARGEST)
    timestep_sampling: TimestepSampling | None = None
    snr_gamma: float | None = Field(None, gt=0, le=LARGEST)
    cut_captions: bool = False
    shuffle_tags_after: int | None = Field(None, ge=0)
    caption_dropout: float = Field(0.05, ge=0, le=1)
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    offload: bool = False
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"

    # Prior preservation: what the class looks like without the subject, drawn by the base
    class_prompt: str | None = None
    num_class_images: int = Field(50, ge=1, le=MOST)
    prior_loss_weight: float = Field(1.0, gt=0, le=LARGEST)

    # What is shown and kept on the way
    preview_prompts: list[str] = Field(default_factory=list)
    preview_seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(default_factory=lambda: [1])
    preview_every: int = Field(100, ge=1)
    validate_every: int = Field(50, ge=1)
    checkpoint_every: int = Field(100, ge=1)
    save_every: int | None = Field(None, ge=1)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        if isinstance(value, bool) and not isinstance(cls.model_fields[str(info.field_name)].default, bool):
            raise ValueError("this key is not one for true or false")
        return value

    @model_validator(mode="after")
    def _is_trained(self) -> TrainConfig:
        try:
            check_parametrisation(self.parametrisation, self.factor, self.full_matrix)
        except ConfigError as error:
            raise ValueError(str(error).removesuffix(".")) from error
        return self

    @model_validator(mode="after")
    def _reaches_its_rate(self) -> TrainConfig:
        if self.lr_scheduler != "constant" and self.warm_up >= self.steps:
            raise ValueError(
                f"warmup_steps = {self.warm_up} with steps = {self.steps}: the run would end before its learning rate "
                "is reached. Give a warm-up that is shorter than the run, or leave it out"
            )
        return self

    @property
    def warm_up(self) -> int:
        """Steps in which the learning rate rises: those given, or so many that the run has one step after them."""
        return min(WARM_UP, self.steps - 1) if self.warmup_steps is None else self.warmup_steps

    @property
    def kinds(self) -> tuple[Kind, ...]:
        return ("lora", "dora") if self.kind == "both" else (self.kind,)

    def label(self, kind: str) -> str:
        """What the adapter of this kind is called: "DoKR" for a LoKr with magnitudes."""
        return adapter_label(kind, self.parametrisation)

    def adapter_config(self, kind: Kind, family: Family) -> AdapterConfig:
        targets = tuple(self.target_modules or family.target_modules)
        return AdapterConfig(
            kind=kind,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            target_modules=targets
            + family.feed_forward * self.train_feed_forward
            + family.convolutions * self.train_convolutions,
            use_rslora=self.use_rslora,
            norm_axis=self.norm_axis if kind == "dora" else "output",
            parametrisation=self.parametrisation,
            factor=self.factor,
            full_matrix=self.full_matrix,
        )

    def to_toml(self) -> str:
        """The file that repeats this run; keys that are None are left out, as TOML has no null."""
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    @classmethod
    def from_values(cls, values: dict[str, object], source: str) -> TrainConfig:
        """Check values from a file or a command line; `source` names it in messages. Raises ConfigError."""
        for key, value in values.items():
            if isinstance(value, bool) and key in cls.model_fields and cls.model_fields[key].annotation is not bool:
                # pydantic would take true for 1, which nobody means who writes steps = true.
                raise ConfigError(f"{source}:\n  {key} = {str(value).lower()}: this key is no switch; give its value.")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(_explain(error, source)) from error


def read_config(path: str | os.PathLike[str], overrides: dict[str, object] | None = None) -> TrainConfig:
    """Read a TOML file; `overrides` win over it. Raises ConfigError."""
    path = Path(given_path(path))
    values = read_toml(path)
    return TrainConfig.from_values({**values, **(overrides or {})}, str(path))


def parse_assignments(assignments: Sequence[str]) -> dict[str, object]:
    """KEY=VALUE from a command line; the value as TOML writes it, and failing that as plain text."""
    values: dict[str, object] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set {assignment!r}: write KEY=VALUE, such as --set dropout=0.1.")
        values[key.strip()] = value_or_text(text)
    return values


def resolve_config(path: Path | None, given: dict[str, object], *, resume: bool = False) -> TrainConfig:
    """The configuration of a command: a file, options that win over it, and when resuming the run's own file."""
    written = Path(given_path(str(given["out"]))) / "config.toml" if "out" in given else None
    if path is None and resume and written is not None and not obstacle(written):
        return _own_config(written, given)
    return read_config(path, given) if path else TrainConfig.from_values(given, "command line")


def _own_config(written: Path, given: dict[str, object]) -> TrainConfig:
    """What a run wrote down of itself: its file or, where that is not sound, what stands in its checkpoint."""
    if _is_toml(written):
        return read_config(written, given)
    for checkpoint in sorted((written.parent / "checkpoints").glob("*.safetensors")):
        with contextlib.suppress(AdapterFileError, KeyError, TypeError, ValueError):
            values = json.loads(read_header(checkpoint, "checkpoint").metadata["config"])
            said = f"{written} is missing or damaged; the configuration in {checkpoint} is taken."
            warnings.warn(said, UserWarning, stacklevel=3)
            return TrainConfig.from_values({**values, **given}, str(checkpoint))
    return read_config(written, given) if written.exists() else TrainConfig.from_values(given, "command line")


def _is_toml(path: Path) -> bool:
    try:
        read_toml(path)
    except (ConfigError, OSError):
        return False
    return True


def _explain(error: ValidationError, source: str) -> str:
    """One line for each wrong key, with the nearest known one."""
    lines = []
    for problem in error.errors():
        key = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = nearest(key, TrainConfig.model_fields, 1)
            if isinstance(problem["input"], dict):
                lines.append(f"[{key}] is a table, and there are none here: write its keys without the line [{key}]")
                continue
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(TrainConfig.model_fields)}"
            lines.append(f"unknown key {key!r}: {hint}")
        elif problem["type"] == "missing":
            lines.append(f"{key!r} is missing" + _how_to_give(key))
        elif not key:  # of several keys, which the message names
            lines.append(str(problem["ctx"]["error"]))
        else:
            said = problem["msg"].removeprefix("Value error, ")
            lines.append(f"{key} = {_shortened(repr(problem['input']))}: {said[:1].lower()}{said[1:]}")
    return f"{source}:\n  " + "\n  ".join(lines)


def _shortened(text: str) -> str:
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."


def _how_to_give(key: str) -> str:
    return f": add {key} = ... to the file, or --{key.replace('_', '-')} to the command"
