"""The first thing a new user runs: train a LoRA and a DoRA on a sample style, and lay them side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.comparison.compare import Column, CompareRequest, compare
from dora_diffusion.comparison.curves import read_curves
from dora_diffusion.comparison.grid import draw_grid
from dora_diffusion.comparison.report import write_report
from dora_diffusion.console import show_cells, show_training
from dora_diffusion.errors import ConfigError, DataError
from dora_diffusion.models.loading import Base, load_base
from dora_diffusion.models.naming import ASSETS
from dora_diffusion.outputs import check_places, make_folder, save_png, write_text
from dora_diffusion.paths import operand
from dora_diffusion.screen import Screen, shell_line
from dora_diffusion.training.checkpoint import checkpoint_path
from dora_diffusion.training.config import TrainConfig, read_config
from dora_diffusion.training.events import Stopped
from dora_diffusion.training.folder import adapter_path
from dora_diffusion.training.run import train

__all__ = ["DEMO", "QUICK", "DemoSize", "demo_config", "run_demo", "sample_folder"]

STYLE = "openmoji"
REPORT = "report.html"  # the last thing that is made
# None of these is in the style folder, neither to train on nor to measure on.
PROMPTS = ("panda", "strawberry", "frog", "tulip", "hamburger", "crown")


@dataclass(frozen=True)
class DemoSize:
    steps: int
    batch_size: int
    prompts: int
    seeds: tuple[int, ...]
    num_inference_steps: int
    learning_rate: float | None = None  # the base's own


DEMO = DemoSize(steps=400, batch_size=8, prompts=6, seeds=(1, 2), num_inference_steps=25)
QUICK = DemoSize(steps=80, batch_size=8, prompts=3, seeds=(1,), num_inference_steps=20, learning_rate=1e-3)


def sample_folder(name: str = STYLE) -> Path:
    """A sample folder: inside the installed package, or in the source tree it is run from."""
    for folder in (ASSETS / "samples" / name, ASSETS.parent.parent / "samples" / name):
        if folder.is_dir():
            return folder
    raise DataError(f"the sample pictures {name!r} are missing from this installation; install the package again.")


def demo_config(out: Path, size: DemoSize, base: str) -> TrainConfig:
    images = sample_folder()
    values: dict[str, object] = {
        "images": str(images),
        "validation_images": str(images / "held-out"),
        "out": str(out),
        "base": base,
        "kind": "both",
        "steps": size.steps,
        "batch_size": size.batch_size,
        "random_flip": True,  # sixteen pictures are few
        "learning_rate": size.learning_rate,
    }
    return TrainConfig.from_values(values, "demo")


def run_demo(
    out: Path, size: DemoSize, console: Screen, should_stop: Callable[[], bool], *, base_name: str = "emoji"
) -> list[Path]:
    """Train, compare and report; returns the files made, or none when it was stopped."""
    config = demo_config(out, size, base_name)
    check_places(make_folder(out), ["comparison.png", "report.html"], [])
    base = load_base(config.base, device=config.device)
    resume, overwrite = _earlier_demo(config)
    events = show_training(
        train(config, base=base, resume=resume, overwrite=overwrite, should_stop=should_stop), console
    )
    if any(isinstance(event, Stopped) for event in events):
        return []
    compared = _compare(base, out, size, console, should_stop)
    return [out / "lora.safetensors", out / "dora.safetensors", *compared] if compared else []


def _earlier_demo(config: TrainConfig) -> tuple[bool, bool]:
    """Whether to go on with an earlier demo that was stopped, or to replace one that was finished."""
    out = Path(config.out)
    places = [place(out, kind) for kind in config.kinds for place in (adapter_path, checkpoint_path)]
    there = [path for path in places if path.exists()]
    if not there:
        return False, False
    foreign = ConfigError(f"{out} holds {there[0].relative_to(out)}, which is of no earlier demo. Give another --out.")
    if not (out / "config.toml").exists():
        raise foreign
    try:
        earlier = read_config(out / "config.toml")
    except ConfigError as error:
        raise ConfigError(f"{error} So an earlier demo in {out} cannot go on: give another --out.") from error
    if earlier.images != config.images:  # somebody's own run
        raise foreign
    same = (earlier.steps, earlier.base) == (config.steps, config.base)
    trained = [path for path in (adapter_path(out, kind) for kind in config.kinds) if path.exists()]
    begun = len(there) > len(trained) or not (out / REPORT).exists()
    return same and begun, not (same and begun)


def _compare(base: Base, out: Path, size: DemoSize, console: Screen, should_stop: Callable[[], bool]) -> list[Path]:
    """The files made; none when it was stopped."""
    request = CompareRequest(
        prompts=tuple(f"{name}, {STYLE} style" for name in PROMPTS[: size.prompts]),
        seeds=size.seeds,
        adapters=(Column("LoRA", out / "lora.safetensors"), Column("DoRA", out / "dora.safetensors")),
        num_inference_steps=size.num_inference_steps,
    )
    cells = []
    for cell in show_cells(compare(base, request), request, console):
        if should_stop():
            return []
        cells.append(cell)
    report = write_report(
        f"DoRA and LoRA on the {STYLE} style",
        request,
        cells,
        base_name=base.name,
        curves=read_curves(out / "log.jsonl"),
        commands=next_commands(out, base.name),
    )
    return [save_png(draw_grid(request, cells), out / "comparison.png"), write_text(out / REPORT, report)]


def next_commands(out: Path, base_name: str) -> tuple[str, ...]:
    base = ["--base", base_name] if base_name != "emoji" else []
    adapters = [operand(out / "lora.safetensors"), operand(out / "dora.safetensors")]
    owl = ["--prompt", f"owl, {STYLE} style", "--seeds", "1,2,3", *base]
    return (
        shell_line(["dora-diffusion", "compare", *owl, "--adapters", *adapters, "--out", "outputs/owl"]),
        'dora-diffusion train --images YOUR_FOLDER --instance-prompt "your style" --kind both --out outputs/mine',
        "dora-diffusion app",
    )
