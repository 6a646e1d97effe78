"""What the Train tab asks for: presets, the checklist before a start, and the configuration."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dora_diffusion.data.captions import named
from dora_diffusion.errors import ConfigError
from dora_diffusion.outputs import make_folder, scratch_folder
from dora_diffusion.webapp.heavy import ready
from dora_diffusion.webapp.uploads import Upload, put_into, row_troubles
from dora_diffusion.webapp.wording import FIELDS, MORE, form_error

if TYPE_CHECKING:
    from dora_diffusion.comparison.estimate import Estimate
    from dora_diffusion.training.config import TrainConfig
    from dora_diffusion.webapp.studio import Studio

__all__ = [
    "DEFAULT",
    "MOST_STEPS",
    "NORM_AXES",
    "NORM_AXES_OF_FORMS",
    "PARAMETRISATIONS",
    "PRESETS",
    "Costing",
    "Pictures",
    "TrainForm",
    "checks",
]

MOST_STEPS = 4000
MOST_RANK = 128
MOST_BATCH = 16
MOST_FACTOR = 4096
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


LAYERS = ("train_feed_forward", "train_convolutions", "train_text_encoder")
NORM_AXES = {
    "output": "by output: diffusers, PEFT",
    "input": "by input: ComfyUI, Forge, A1111, InvokeAI",
}
NORM_AXES_OF_FORMS = {"output": "by output: LyCORIS", "input": "by input: ComfyUI"}  # of LoKr and LoHa
PARAMETRISATIONS = {  # what of it a visitor has to know, in a line
    "lora": ("LoRA", "two thin matrices; what most programs read."),
    "lokr": ("LoKr", "a Kronecker product of two matrices (with magnitudes DoKR); for ComfyUI and LyCORIS."),
    "loha": ("LoHa", "two LoRAs multiplied element by element (with magnitudes DoHa); for ComfyUI and LyCORIS."),
}
PRESETS = {
    "Quick": Preset(160, 8, 16, "a first look in a minute or two", rate="5e-4"),  # few steps, so long ones
    "Style": Preset(300, 8, 16, "a dozen or more pictures of many things in one style", ("random_flip",)),
    "Subject": Preset(500, 4, 16, "five or more pictures of one thing", ("train_feed_forward",)),
}
DEFAULT = "Style"


@dataclass(frozen=True)
class Pictures:
    """What was found out about the uploaded pictures, once, by the names people know them by.

    `refused` is why none is taken; `bad` are those that cannot be used, with the reason, `same` those of the same bytes
    as one before them, with that one in front, and `notes` what else is to be said.
    """

    refused: str = ""
    labels: tuple[str, ...] = ()
    bad: tuple[tuple[str, str], ...] = ()
    same: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def trouble(self) -> str:
        """All that is wrong, or ""."""
        return "\n".join((*([self.refused] if self.refused else []), *(f"{name}: {why}" for name, why in self.bad)))


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
    parametrisation: str = "lora"
    factor: str = ""  # LoKr's; empty for -1
    full_matrix: bool = False

    @property
    def cuts(self) -> bool:
        """Whether captions that are too long are cut."""
        return "cut_captions" in self.more

    def config(
        self, images: Path, out: Path, base_name: str, captions: Sequence[str] = (), start: Path | None = None
    ) -> TrainConfig:
        """`start` is where the adapter lies that is gone on from. Raises ConfigError."""
        ready()
        from dora_diffusion.training.config import TrainConfig

        limits = {"steps": (self.steps, MOST_STEPS), "rank": (self.rank, MOST_RANK)}
        for name, (value, most) in {**limits, "batch_size": (self.batch_size, MOST_BATCH)}.items():
            if value is None or not 1 <= value <= most:
                raise ConfigError(f"“{FIELDS[name]}” is {value}; it must be between 1 and {most}.")
        if strange := [each for each in self.more if each not in MORE]:
            raise ConfigError(f"{strange[0]!r} is none of the choices: {'; '.join(MORE.values())}.")
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
            **self._parametrised(),
            "batch_size": int(self.batch_size),
            "learning_rate": _rate(self.rate),
            "seed": _seed(self.seed),
            **{key: key in self.more for key in MORE},
            "save_every": max(10, int(self.steps) // 10) if self.keep else None,
            "preview_prompts": [preview] if preview else [],
            "preview_every": max(10, int(self.steps) // 4),
            "validate_every": max(10, int(self.steps) // 10),
            "checkpoint_every": max(5, int(self.steps) // 10),
        }
        if start is not None:  # its rank, layers and form are kept, whatever this form says of them
            values |= {"start_from": str(start), **{key: False for key in LAYERS}}
            for key in ("rank", "alpha", "parametrisation", "factor", "full_matrix"):
                values.pop(key, None)
        try:
            return TrainConfig.from_values(values, "the form")
        except ConfigError as error:
            raise form_error(error) from error

    def _parametrised(self) -> dict[str, object]:
        """LoKr's fields count where it is chosen: others do not show them."""
        values: dict[str, object] = {"parametrisation": self.parametrisation}
        if self.parametrisation == "lokr":
            values |= {"factor": _factor(self.factor), "full_matrix": self.full_matrix}
        return values

    def without_places(self, captions: Sequence[str]) -> TrainConfig:
        """To be judged, before there is a run: its files and its base are names alone. Raises ConfigError."""
        return self.config(Path("images"), Path("run"), "base", captions)


def _rate(text: str) -> float | None:
    """None, for what suits the base, when nothing is written. Raises ConfigError."""
    try:
        rate = float(text) if text.strip() else None
    except ValueError:
        rate = math.nan
    if rate is not None and not 0 < rate < math.inf:
        field = FIELDS["learning_rate"]
        raise ConfigError(f"“{field}” is {text.strip()[:40]!r}; give a number above 0, such as 0.001, or nothing.")
    return rate


def _factor(text: str) -> int:
    """-1, for factors that are close to each other, when nothing is written. Raises ConfigError."""
    text = text.strip()
    if not text:
        return -1
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= MOST_FACTOR):
        raise ConfigError(
            f"“{FIELDS['factor']}” is {text[:40]!r}; give a whole number from 1 to {MOST_FACTOR}, such as 8, or "
            "nothing."
        )
    return int(text)


def _seed(value: float | None) -> int:
    if value is not None and not 0 <= value < 2**63:
        raise ConfigError(f"“{FIELDS['seed']}” is {value:g}; give a whole number of at least 0.")
    return int(value or 0)


# Kind, rank, batch size, norm, parametrisation and what else: all that a step's time hangs on.
Costs = tuple[str, float | None, float | None, str, tuple[str, str, bool], frozenset[str]]


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
            with scratch_folder(work / "cost") as folder, self.studio.painter.turn(lambda _: None) as base:
                images = folder / "images"
                caption = form.prompt.strip() or "anything"
                put_into(images, uploads[: int(form.batch_size or 1)], caption)
                config = form.config(images, folder, self.studio.base_name, [caption])
                self.known[key] = estimate_run(config, base)
        return self.known[key]

    @staticmethod
    def _key(form: TrainForm) -> Costs:
        parametrised = form.parametrisation, form.factor.strip(), form.full_matrix
        return form.kind, form.rank, form.batch_size, form.norm_axis, parametrised, frozenset(form.more)


def checks(
    rows: Sequence[tuple[str, str]],
    form: TrainForm,
    pictures: Pictures,
    estimate: Estimate | None,
    long: Mapping[str, str] | None = None,
    cautions: Sequence[str] = (),
) -> dict[str, bool | None]:
    """What must be so before a run can start, in words, and whether it is; None for what is good to know.

    `rows` are the table's, label and caption; `long` are the prompts that the base would cut, with what would be lost.
    """
    if pictures.refused:
        return {pictures.refused: False}
    if not rows:
        return {"Add at least one picture; 10 to 20 of one style, or 5 of one subject, work well.": False}
    captions = [caption for _, caption in rows]
    lines = {**_pictures(rows, pictures), **_captions(rows, form, long or {})}
    try:
        form.without_places(captions)
    except ConfigError as error:
        lines[str(error)] = False
    else:
        lines[f"{int(form.steps)} steps of {_many(int(form.batch_size), 'picture')} each"] = True
    more = [says for key, says in MORE.items() if key in form.more and not (form.start and key in LAYERS)]
    if more:
        lines["; ".join(more).capitalize()] = True
    if form.start:
        lines["an earlier adapter is trained on: its rank and layers are kept"] = True
    lines |= dict.fromkeys(cautions)
    if estimate is not None:
        lines |= _cost(form, captions, estimate)
    return lines


def _pictures(rows: Sequence[tuple[str, str]], pictures: Pictures) -> dict[str, bool | None]:
    """The checklist's lines on the pictures that stand in the table."""
    labels = {label for label, _ in rows}
    bad = {name: why for name, why in pictures.bad if name in labels}
    lines: dict[str, bool | None] = {f"{name}: {why}; or delete its row": False for name, why in bad.items()}
    if pictures.labels:
        lines |= dict.fromkeys(row_troubles(rows, pictures.labels), False)
    count = len(rows)
    of_all = f"{count} of {len(pictures.labels)} pictures" if count < len(pictures.labels) else _many(count, "picture")
    if not bad:
        lines[f"{of_all}, all readable and large enough"] = True
    if count < ENOUGH:
        lines[f"only {_many(count, 'picture')}: {ENOUGH} or more work better"] = None
    if same := [(first, second) for first, second in pictures.same if first in labels and second in labels]:
        names = "; ".join(f"{second} is {first} again" for first, second in same[:3])
        lines[f"{_many(len(same), 'duplicate')}: {names}"] = None
    return lines | dict.fromkeys(pictures.notes, None)


def _captions(rows: Sequence[tuple[str, str]], form: TrainForm, long: Mapping[str, str]) -> dict[str, bool | None]:
    """The checklist's lines on captions and the preview prompt."""
    lines: dict[str, bool | None] = {}
    prompt = form.prompt.strip()
    bare = sum(not caption.strip() for _, caption in rows)
    if not bare:
        lines["every picture has a caption"] = True
    elif prompt:
        lines[f"{bare} of them with the caption “{prompt}”"] = True
    else:
        lines[f"{bare} without a caption: write it in the table, or one for all below it"] = False
    cut = [label for label, caption in rows if (caption.strip() or prompt) in long]
    if cut and form.cuts:
        lines[f"captions that are cut, as this base does not read them whole: {named(cut)}"] = None
    elif cut:
        whole = {label: caption.strip() or prompt for label, caption in rows}
        lines[
            f"{_many(len(cut), 'caption')} too long for this base ({named(cut)}): shorten them, or choose "
            f"“{MORE['cut_captions']}” under Advanced. {cut[0]}: {long[whole[cut[0]]]}"
        ] = False
    if form.preview.strip() in long:
        lines[f"the preview prompt is too long: {long[form.preview.strip()]}"] = False
    return lines


def _cost(form: TrainForm, captions: Sequence[str], estimate: Estimate) -> dict[str, bool | None]:
    try:
        config = form.without_places(captions)
    except ConfigError:
        return {}  # the checklist says it
    from dora_diffusion.console import clock

    parameters = ", ".join(f"{config.label(kind)} {cost.parameters:,}" for kind, cost in estimate.costs.items())
    return {
        f"trainable parameters: {parameters}": None,
        f"about {clock(estimate.seconds(config, len(captions)))} and {estimate.memory / 1024**3:.1f} GB of memory, "
        "by a measured warm-up": None,
    }


def _many(count: int, thing: str) -> str:
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"
