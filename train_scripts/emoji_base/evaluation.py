"""The figures of the embedded base, and whether they are good enough."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from torch import nn

from dora_diffusion.errors import DataError
from dora_diffusion.formats.reading import read_adapter_file
from dora_diffusion.models.loading import load_base

from .files import write_atomically
from .icons import BASE_SETS, HELD_OUT_SETS, load_sets, select_icons
from .metrics import LatentIndex, Reconstruction, held_out_icons, reconstruction_of
from .prompts import GUIDANCE, STEPS, Prompt, evaluation_prompts, other_prompts
from .rendering import render_all
from .sheets import save_sheet
from .taught import Taught, measure_taught


@dataclass(frozen=True)
class Goals:
    """The least that the base must reach."""

    psnr: float = 26.0
    hue_error: float = 5.0
    right_name: float = 0.5
    right_style: float = 0.8
    megabytes: float = 24.0
    seconds: float = 4.0
    taught: float = 0.6
    held_out_fall: float = 0.15


@dataclass(frozen=True)
class HeldOut:
    """The loss on the style's held-out pictures, of the base and of the adapter, as its training wrote them down."""

    base: float
    adapter: float

    @property
    def fall(self) -> float:
        """As a share of the base's."""
        return 1.0 - self.adapter / self.base


@dataclass(frozen=True)
class Evaluation:
    """All measured figures; shares are of 1, the hue error in degrees."""

    autoencoder: dict[str, Reconstruction]
    right_name: float
    right_style: float
    right_both: float
    others_right_name: float
    others_right_style: float
    megabytes: float
    finite: bool
    seconds_per_picture: float
    threads: int
    steps: int
    guidance_scale: float
    taught: dict[str, Taught]
    held_out: dict[str, HeldOut]

    def missed(self, goals: Goals) -> list[str]:
        """The goals that are not met, in words."""
        base = self.autoencoder["base sets"]
        checks = {
            f"autoencoder PSNR {base.psnr} dB < {goals.psnr}": base.psnr >= goals.psnr,
            f"hue error {base.hue_error} > {goals.hue_error}": base.hue_error < goals.hue_error,
            f"right name {self.right_name:.0%} < {goals.right_name:.0%}":
                self.right_name >= goals.right_name,
            f"right style {self.right_style:.0%} < {goals.right_style:.0%}":
                self.right_style >= goals.right_style,
            f"{self.megabytes} MB > {goals.megabytes}": self.megabytes <= goals.megabytes,
            f"{self.seconds_per_picture} s > {goals.seconds}":
                self.seconds_per_picture < goals.seconds,
            "weights are not finite": self.finite,
        }  # fmt: skip
        for label, loss in self.held_out.items():
            share = self.taught[label].by_style
            checks[f"taught {label} {share:.0%} < {goals.taught:.0%}"] = share >= goals.taught
            text = f"held-out loss of {label} falls by {loss.fall:.1%} < {goals.held_out_fall:.0%}"
            checks[text] = loss.fall >= goals.held_out_fall
        return [text for text, good in checks.items() if not good]


def draw(pipeline: DiffusionPipeline, prompts: Sequence[Prompt], batch: int = 20) -> list[Image.Image]:
    """A picture for each prompt, each from its own seed whatever the batch."""
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        pictures += pipeline(
            [p.text for p in part],
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(p.seed) for p in part],
        ).images
    return pictures


def _measure_autoencoder(vae: AutoencoderKL, icons_root: Path) -> dict[str, Reconstruction]:
    base = select_icons(load_sets(icons_root, BASE_SETS))
    held_out = held_out_icons(icons_root)
    svgs = {"base sets": [i.svg for i in base]}
    for info in (*BASE_SETS, *HELD_OUT_SETS):
        svgs[info.style] = [i.svg for i in (*base, *held_out) if i.style == info.style]
    return {name: reconstruction_of(vae, torch.from_numpy(render_all(some))) for name, some in svgs.items()}


def _seconds_per_picture(pipeline: DiffusionPipeline) -> float:
    times = []
    for _ in range(3):
        began = time.perf_counter()
        pipeline("red apple, noto style", num_inference_steps=STEPS, guidance_scale=GUIDANCE)
        times.append(time.perf_counter() - began)
    return round(statistics.median(times), 2)


def evaluate(base: Path, icons_root: Path, samples: Path, adapters: dict[str, Path]) -> Evaluation:
    """Draws and measures everything; writes `contact_sheet.png` into the base's folder.

    `adapters` are the demo's, by the names they go by in the figures; they were trained on `samples`.
    """
    pipeline = load_base(str(base), device="cpu").pipe
    icons = select_icons(load_sets(icons_root, BASE_SETS))
    prompts = evaluation_prompts(icons)
    pictures = draw(pipeline, prompts)
    labels = [p.text.removesuffix(" style").replace(", ", " · ") for p in prompts]
    save_sheet(pictures, labels, base / "contact_sheet.png")
    index = LatentIndex.from_icons(pipeline.vae, icons_root)
    name, style = _right(index, prompts, pictures)
    others = other_prompts(icons)
    others_name, others_style = _right(index, others, draw(pipeline, others))
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    size = sum(f.stat().st_size for f in base.rglob("*") if f.is_file())
    return Evaluation(
        autoencoder=_measure_autoencoder(pipeline.vae, icons_root),
        right_name=statistics.mean(name),
        right_style=statistics.mean(style),
        right_both=statistics.mean(n and s for n, s in zip(name, style, strict=True)),
        others_right_name=statistics.mean(others_name),
        others_right_style=statistics.mean(others_style),
        megabytes=round(size / 1e6, 2),
        finite=all(bool(torch.isfinite(p).all()) for m in parts for p in m.parameters()),
        seconds_per_picture=_seconds_per_picture(pipeline),
        threads=torch.get_num_threads(),
        steps=STEPS,
        guidance_scale=GUIDANCE,
        taught=measure_taught(pipeline, icons_root, samples, adapters) if adapters else {},
        held_out={label: _held_out(path) for label, path in adapters.items()},
    )


def _right(
    index: LatentIndex, prompts: Sequence[Prompt], pictures: Sequence[Image.Image]
) -> tuple[list[bool], list[bool]]:
    """Whether the nearest training picture of each bears the prompt's name, and its style."""
    matches = index.nearest(pictures)
    pairs = list(zip(matches, prompts, strict=True))
    return [m.name == p.name for m, p in pairs], [m.style == p.style for m, p in pairs]


def _held_out(adapter: Path) -> HeldOut:
    description = read_adapter_file(adapter).description
    training = description.training if description else {}
    base, after = training.get("held_out_loss_base"), training.get("held_out_loss")
    if not isinstance(base, float) or not isinstance(after, float):
        raise DataError(f"{adapter} does not say its held-out loss: --demo takes the output of dora-diffusion demo.")
    return HeldOut(base, after)


def save_json(result: Evaluation, path: Path) -> None:
    """Writes the figures."""
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
