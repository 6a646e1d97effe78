"""What the Train tab asks for: presets, the checklist before a start, and the configuration."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.errors import ConfigError
from dora_diffusion.outputs import make_folder
from dora_diffusion.webapp.heavy import ready
from dora_diffusion.webapp.uploads import Upload, put_into

if TYPE_CHECKING:
    from dora_diffusion.comparison.estimate import Estimate
    from dora_diffusion.training.config import TrainConfig
    from dora_diffusion.webapp.studio import Studio

__all__ = ["DEFAULT", "MORE", "MOST_STEPS", "NORM_AXES", "PRESETS", "Costing", "Pictures", "TrainForm", "checks"]

MOST_STEPS = 4000
MOST_RANK = 128
MOST_BATCH = 16
ENOUGH = 5


@dataclass(frozen=True)
class Preset:
    """Settings that suit a purpose, and what it is."""

    steps: int
    batch_size: int
    rank: int
    says: str
    more: tuple[str, ...] = ()
    rate: str = ""  # the base's own


# Keys of TrainConfig that are true when chosen, as the form and its checklist have them.
MORE = {
    "random_flip": "Mirror pictures at random",
    "train_feed_forward": "Feed-forward layers too",
    "train_convolutions": "Convolutions of a UNet too",
    "train_text_encoder": "Text encoder too",
    "cut_captions": "Cut captions that are too long",
}
LAYERS = ("train_feed_forward", "train_convolutions", "train_text_encoder")
NORM_AXES = {
    "output": "by output: diffusers, PEFT",
    "input": "by input: ComfyUI, Forge, A1111, InvokeAI",
}
PRESETS = {
    "Quick": Preset(160, 8, 16, "a first look in a minute or two", rate="5e-4"),  # few steps, so long ones
    "Style": Preset(300, 8, 16, "a dozen or more pictures of many things in one style", ("random_flip",)),
    "Subject": Preset(500, 4, 16, "five or more pictures of one thing", ("train_feed_forward",)),
}
DEFAULT = "Style"


@dataclass(frozen=True)
class Pictures:
    """What was found out about the uploaded pictures, once: what is wrong with them, and which are the same."""

    trouble: str = ""
    same: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class TrainForm:
    """The settings beside the pictures, as the page has them."""

    prompt: str = ""
    kind: str = "both"
    steps: float = PRESETS[DEFAULT].steps
    rank: float = PRESETS[DEFAULT].rank
    batch_size: float = PRESETS[DEFAULT].batch_size
    rate: str = ""
    preview: str = ""
    seed: float = 0
    more: Sequence[str] = PRESETS[DEFAULT].more
    norm_axis: str = "output"
    start: str = ""  # an adapter's key, to go on from
    keep: bool = False

    def config(
        self, images: Path, out: Path, base_name: str, captions: Sequence[str] = (), start: Path | None = None
    ) -> TrainConfig:
        """`start` is where the adapter lies that is gone on from. Raises ConfigError."""
        ready()
        from dora_diffusion.training.config import TrainConfig

        limits = {"steps": (self.steps, MOST_STEPS), "rank": (self.rank, MOST_RANK)}
        for name, (value, most) in {**limits, "batch_size": (self.batch_size, MOST_BATCH)}.items():
            if not value or value > most:
                raise ConfigError(f"{name} is {value}; it must be between 1 and {most}.")
        preview = self.preview.strip() or next(iter(captions), "") or self.prompt.strip()
        values: dict[str, object] = {
            "images": str(images),
            "out": str(out),
            "base": base_name,
            "kind": self.kind,
            "instance_prompt": self.prompt.strip() or None,
            "steps": int(self.steps),
            "rank": int(self.rank),
            "alpha": float(self.rank),
            "norm_axis": self.norm_axis,
            "batch_size": int(self.batch_size),
            "learning_rate": _rate(self.rate),
            "seed": int(self.seed or 0),
            **{key: key in self.more for key in MORE},
            "save_every": max(10, int(self.steps) // 10) if self.keep else None,
            "preview_prompts": [preview] if preview else [],
            "preview_every": max(10, int(self.steps) // 4),
            "validate_every": max(10, int(self.steps) // 10),
            "checkpoint_every": max(5, int(self.steps) // 10),
        }
        if start is not None:  # its rank and layers are kept, whatever the form says of them
            values |= {"start_from": str(start), **{key: False for key in LAYERS}}
            del values["rank"], values["alpha"]
        return TrainConfig.from_values(values, "the form")


def _rate(text: str) -> float | None:
    """None, for what suits the base, when nothing is written. Raises ConfigError."""
    try:
        return float(text) if text.strip() else None
    except ValueError as error:
        raise ConfigError(f"learning rate is {text[:40]!r}; give a number such as 0.001, or nothing.") from error


# Kind, rank, batch size, norm and what else: all that a step's time hangs on.
Costs = tuple[str, int, int, str, frozenset[str]]


@dataclass
class Costing:
    """What runs will cost, measured on this server; kept for as long as it runs."""

    studio: Studio
    known: dict[Costs, Estimate] = field(default_factory=dict)

    def of(self, form: TrainForm) -> Estimate | None:
        return None if form.start else self.known.get(self._key(form))  # an earlier adapter has its own shape

    def measure(self, form: TrainForm, uploads: Sequence[Upload]) -> Estimate | None:
        """Train a few steps on a batch of the pictures; None when the machine is training something already."""
        ready()
        from dora_diffusion.comparison.estimate import estimate_run

        key = self._key(form)
        if form.start or key in self.known or not uploads:
            return self.of(form)
        with self.studio.jobs.turns.turn_if_free() as free:
            if not free:
                return None
            work = make_folder(self.studio.outputs / "web")
            with tempfile.TemporaryDirectory(dir=work) as folder, self.studio.painter.turn(lambda _: None) as base:
                images = Path(folder) / "images"
                caption = form.prompt.strip() or "anything"
                put_into(images, uploads[: int(form.batch_size or 1)], caption)
                config = form.config(images, Path(folder), self.studio.base_name, [caption])
                self.known[key] = estimate_run(config, base)
        return self.known[key]

    @staticmethod
    def _key(form: TrainForm) -> Costs:
        return form.kind, int(form.rank or 0), int(form.batch_size or 0), form.norm_axis, frozenset(form.more)


def checks(
    captions: Sequence[str], form: TrainForm, pictures: Pictures, estimate: Estimate | None
) -> dict[str, bool | None]:
    """What must be so before a run can start, in words, and whether it is; None for what is good to know."""
    if pictures.trouble:
        return {pictures.trouble: False}
    if not captions:
        return {"Add at least one picture; 10 to 20 of one style, or 5 of one subject, work well.": False}
    count = len(captions)
    lines: dict[str, bool | None] = {f"{_many(count, 'picture')}, all readable and large enough": True}
    if count < ENOUGH:
        lines[f"only {_many(count, 'picture')}: {ENOUGH} or more work better"] = None
    if pictures.same:
        names = "; ".join(f"{second} is {first} again" for first, second in pictures.same[:3])
        lines[f"{_many(len(pictures.same), 'duplicate')}: {names}"] = None
    bare = sum(not caption.strip() for caption in captions)
    if not bare:
        lines["every picture has a caption"] = True
    elif form.prompt.strip():
        lines[f"{bare} of them with the caption “{form.prompt.strip()}”"] = True
    else:
        lines[f"{bare} without a caption: write it in the table, or one for all below it"] = False
    lines[f"{int(form.steps or 0)} steps of {_many(int(form.batch_size or 0), 'picture')} each"] = True
    more = [says for key, says in MORE.items() if key in form.more and not (form.start and key in LAYERS)]
    if more:
        lines["; ".join(more).capitalize()] = True
    if form.start:
        lines["an earlier adapter is trained on: its rank and layers are kept"] = True
    if estimate is not None:
        lines |= _cost(form, captions, estimate)
    return lines


def _cost(form: TrainForm, captions: Sequence[str], estimate: Estimate) -> dict[str, bool | None]:
    try:
        config = form.config(Path(), Path(), "", captions)
    except ConfigError:
        return {}  # said when the run is started
    from dora_diffusion.console import clock
    from dora_diffusion.injection import KIND_LABEL

    parameters = ", ".join(f"{KIND_LABEL[kind]} {cost.parameters:,}" for kind, cost in estimate.costs.items())
    return {
        f"trainable parameters: {parameters}": None,
        f"about {clock(estimate.seconds(config, len(captions)))} and {estimate.memory / 1024**3:.1f} GB of memory, "
        "by a measured warm-up": None,
    }


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
