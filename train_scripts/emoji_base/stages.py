"""The two stages of the pretraining, each resumable: the autoencoder, then the denoiser."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from dora_diffusion.errors import DataError

from . import autoencoder, denoiser
from .bases import KINDS
from .export import export
from .files import append_json_line, replace_folder, write_atomically
from .icons import BASE_SETS, HELD_OUT_SETS, Icon, load_sets, select_icons, vocabulary
from .rendering import autoencoder_pixels, render_renditions
from .renditions import OUTLINE, in_all_renditions
from .sheets import save_pairs, save_sheet
from .state import Training
from .tokenizer import build_tokenizer

_SHOWN_THINGS = ("red apple", "cat face", "panda", "banana", "house", "airplane", "rose", "pizza")
SHOWN = [
    *(f"{name}, {info.style} style" for name in _SHOWN_THINGS for info in BASE_SETS),
    *("zebra, classic style", "rocket", "blue dog, noto style", "fish, twemoji style"),
]


@dataclass(frozen=True)
class Paths:
    """Where a run reads and writes."""

    icons: Path
    work: Path
    out: Path
    base: str = "emoji"

    @property
    def kind(self) -> type[denoiser.Denoiser]:
        return KINDS[self.base]

    @property
    def denoiser(self) -> Path:
        """The denoiser's checkpoints; the autoencoder, tokenizer and pictures serve all bases."""
        return self.work / self.base


class Pace:
    """Counts steps against the clock: when to log, save and draw, and the time left."""

    def __init__(self, first: int, steps: int, save_every: float, draw_every: float) -> None:
        self._first, self._steps, self._began = first, steps, time.monotonic()
        self._every = {"save": save_every, "draw": draw_every}
        self._last = dict.fromkeys(self._every, self._began)

    def due(self, what: str) -> bool:
        """Whether `what` ("save" or "draw") has not been done for its number of seconds."""
        now = time.monotonic()
        if now - self._last[what] < self._every[what]:
            return False
        self._last[what] = now
        return True

    def minutes_left(self, step: int) -> float:
        """At this sitting's speed."""
        done = step - self._first
        spent = time.monotonic() - self._began
        return (self._steps - step) * spent / max(done, 1) / 60


class StopSignal:
    """Turns SIGTERM and Ctrl-C into a flag, so that a run saves its step before it ends."""

    def __init__(self) -> None:
        self.received = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self.received = True


def logged(run: Training, losses: Iterator[float], log: Path, pace: Pace, every: int = 50) -> Iterator[float]:
    """Passes the losses on and writes their means to the JSONL log and the terminal."""
    total, count = 0.0, 0
    for loss in losses:
        total, count = total + loss, count + 1
        if run.step % every == 0:
            left = pace.minutes_left(run.step)
            mean = total / count
            append_json_line(log, {"step": run.step, "loss": round(mean, 5),
                                   "rate": run.optimizer.param_groups[0]["lr"],
                                   "seconds": round(run.elapsed(), 1)})  # fmt: skip
            print(f"step {run.step}  loss {mean:.4f}  {left:.1f} min left", flush=True)
            total, count = 0.0, 0
        yield loss


def finished_autoencoder(paths: Paths) -> AutoencoderKL | None:
    """The first stage's result, if it is there."""
    folder = paths.work / "vae"
    return AutoencoderKL.from_pretrained(folder) if folder.is_dir() else None


def _needed_autoencoder(paths: Paths) -> AutoencoderKL:
    vae = finished_autoencoder(paths)
    if vae is None:
        raise DataError(f"{paths.work} holds no vae folder: run --stage autoencoder first, or give --start-from.")
    return vae


def run_autoencoder(paths: Paths, plan: autoencoder.AutoencoderPlan, device: torch.device, seed: int) -> AutoencoderKL:
    """Trains the autoencoder, or goes on where its checkpoint stands."""
    plain, outlined = autoencoder_pixels(paths.icons, paths.work)
    pictures = torch.cat([torch.from_numpy(plain), torch.from_numpy(outlined)])
    run = autoencoder.new_training(plan, device, seed)
    checkpoint = paths.work / "autoencoder.pt"
    if checkpoint.exists():
        run.load(checkpoint)
    pace, stop = Pace(run.step, plan.steps, save_every=180, draw_every=180), StopSignal()
    losses = autoencoder.train(run, plan, pictures, device)
    for _ in logged(run, losses, paths.work / "autoencoder.jsonl", pace):
        if pace.due("save") or stop.received:
            run.save(checkpoint)
        if stop.received:
            raise SystemExit(f"stopped at step {run.step}; the same command goes on from there")
    run.save(checkpoint)
    run.average.swap()
    vae = run.module
    assert isinstance(vae, AutoencoderKL)
    vae.eval()
    autoencoder.fold_standardisation(vae, torch.from_numpy(plain))
    with replace_folder(paths.work / "vae") as folder:
        vae.save_pretrained(folder)
    shown = pictures[:: len(pictures) // 48][:48]
    save_pairs(shown, autoencoder.decode(vae, autoencoder.encode(vae, shown)), paths.work / "vae.png")
    return vae


def run_polish(paths: Paths, steps: int, device: torch.device, seed: int) -> None:
    """Sharpens the finished decoder; the latents, and so the denoiser, are not touched."""
    vae = _needed_autoencoder(paths)
    plain, outlined = autoencoder_pixels(paths.icons, paths.work)
    pictures = torch.cat([torch.from_numpy(plain), torch.from_numpy(outlined)])
    for step, loss in enumerate(autoencoder.polish(vae, pictures, steps, device, seed), 1):
        if step % 50 == 0:
            print(f"polish {step}/{steps}  loss {loss:.4f}", flush=True)
    with replace_folder(paths.work / "vae") as folder:
        vae.cpu().save_pretrained(folder)


def training_latents(paths: Paths, vae: AutoencoderKL) -> tuple[list[Icon], Tensor]:
    """The denoiser's icons in all renditions and their latents [N, 4, 16, 16], encoded once."""
    sets = load_sets(paths.icons, BASE_SETS)
    icons = select_icons(sets)
    store = paths.work / "latents.safetensors"
    if not store.exists():
        pixels = torch.from_numpy(render_renditions(icons, select_icons(sets, stroke=OUTLINE)))
        with write_atomically(store) as temporary:
            save_file({"latents": autoencoder.encode(vae, pixels).contiguous()}, temporary)
    pictures, latents = in_all_renditions(icons), load_file(store)["latents"]
    if len(latents) != len(pictures):
        raise DataError(f"{store} holds {len(latents)} pictures, not {len(pictures)}: delete it, and it is made again.")
    return pictures, latents


def start_from(paths: Paths, pipeline: Path) -> None:
    """Takes over the autoencoder and the tokenizer of an earlier base, where the work folder has none yet."""
    for part in ("vae", "tokenizer"):
        if not (pipeline / part).is_dir():
            raise DataError(f"--start-from: {pipeline} holds no {part} folder; it must be an embedded base.")
        if not (paths.work / part).is_dir():
            with replace_folder(paths.work / part) as folder:
                shutil.copytree(pipeline / part, folder, dirs_exist_ok=True)


def base_tokenizer(paths: Paths) -> CLIPTokenizer:
    """One token for each word of any set's names, the held-out styles' things included.

    Made once and kept with the checkpoints: byte pairs that occur equally often come in another order each time.
    """
    folder = paths.work / "tokenizer"
    if not folder.is_dir():
        made = build_tokenizer(vocabulary(load_sets(paths.icons, (*BASE_SETS, *HELD_OUT_SETS))))
        with replace_folder(folder) as temporary:
            made.save_pretrained(temporary)
    return CLIPTokenizer.from_pretrained(folder)


def _draw_samples(run: Training, vae: AutoencoderKL, tokenizer: CLIPTokenizer, path: Path) -> None:
    model = run.module
    assert isinstance(model, denoiser.Denoiser)
    run.average.swap()
    pictures = denoiser.sample(model, vae, tokenizer, SHOWN, seed=1)
    run.average.swap()
    labels = [text.replace(" style", "") for text in SHOWN]
    save_sheet(pictures, labels, path, columns=12)


def run_denoiser(
    paths: Paths, plan: denoiser.DenoiserPlan, device: torch.device, seed: int, earlier: Path | None = None
) -> None:
    """Trains text encoder and denoiser, or goes on where the checkpoint stands, and exports.

    Without a checkpoint the weights start from those of the base in the folder `earlier`, where one is given.
    """
    vae = _needed_autoencoder(paths)
    vae.to(device)
    icons, latents = training_latents(paths, vae)
    tokenizer = base_tokenizer(paths)
    print(f"{len(icons)} pictures of {len({i.name for i in icons})} things", flush=True)
    paths.denoiser.mkdir(parents=True, exist_ok=True)
    run = denoiser.new_training(paths.kind, plan, tokenizer, device, seed)
    checkpoint = paths.denoiser / "denoiser.pt"
    if checkpoint.exists():
        run.load(checkpoint)
    elif earlier is not None:
        run.take_weights(earlier)
    pace, stop = Pace(run.step, plan.steps, save_every=180, draw_every=600), StopSignal()
    losses = denoiser.train(run, plan, latents, denoiser.Captions(tokenizer, icons), device)
    for _ in logged(run, losses, paths.denoiser / "denoiser.jsonl", pace, every=100):
        if run.step == plan.steps - plan.decay_steps:
            # A longer run starts from here: once the learning rate has fallen, going on gains little.
            run.save(paths.denoiser / "denoiser_stable.pt")
        if pace.due("save") or stop.received:
            run.save(checkpoint)
        if stop.received:
            raise SystemExit(f"stopped at step {run.step}; the same command goes on from there")
        if pace.due("draw"):
            _draw_samples(run, vae, tokenizer, paths.denoiser / f"samples_{run.step:06d}.png")
    run.save(checkpoint)
    _draw_samples(run, vae, tokenizer, paths.denoiser / f"samples_{run.step:06d}.png")
    run_export(paths, device)


def run_export(paths: Paths, device: torch.device) -> None:
    """Writes the averaged weights of the newest checkpoint as the stock pipeline."""
    vae = _needed_autoencoder(paths)
    tokenizer = base_tokenizer(paths)
    run = denoiser.new_training(paths.kind, denoiser.DenoiserPlan(), tokenizer, device, 0)
    run.load(paths.denoiser / "denoiser.pt")
    run.average.swap()
    model = run.module.cpu()
    assert isinstance(model, denoiser.Denoiser)
    export(vae, model, tokenizer, paths.out)
    print(f"step {run.step}, {run.elapsed() / 3600:.2f} hours: written to {paths.out}")
