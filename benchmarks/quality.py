"""`python -m benchmarks.quality`: what DoRA learns and forgets that LoRA does not, over styles, ranks and seeds.

Twins (same seed, pictures, noise and timesteps) are trained on the sample styles with an embedded base. Learned is the
loss on pictures of the style that were held out, forgotten is the loss on pictures that the base itself drew in its own
styles; both at fixed noise, as changes in percent of the base's. A difference is taken within each pair of twins.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.command import new_console, rank_list
from benchmarks.reporter import Reporter
from benchmarks.results import ResultsError, default_path, describe_machine, today
from dora_diffusion.adapters.injection import KIND_LABEL, NormAxis
from dora_diffusion.comparison.curves import COLOURS
from dora_diffusion.demo import PROMPTS, sample_folder
from dora_diffusion.errors import DoraDiffusionError
from dora_diffusion.formats.files import load_adapter
from dora_diffusion.generation import GenerationRequest, generate
from dora_diffusion.models.loading import load_base
from dora_diffusion.outputs import save_png, whole_file, write_text
from dora_diffusion.training.config import TrainConfig
from dora_diffusion.training.events import Finished
from dora_diffusion.training.loop import Training, held_out_loss, make_accelerator, prepare
from dora_diffusion.training.run import train

if TYPE_CHECKING:
    from matplotlib.axes import Axes

KINDS = ("lora", "dora")
RANKS = (1, 4, 16)
BASE_STYLES = ("noto", "classic", "fluent", "twemoji")
MEASURES = {"learned": "loss on the style's held-out pictures", "forgotten": "loss on the base's own pictures"}
PNG_DPI = 110


@dataclass(frozen=True)
class Pair:
    """One pair of twins; losses as changes in percent of the base's, by kind; empty before they are measured."""

    base: str
    style: str
    rank: int
    seed: int
    steps: int
    learning_rate: float
    norm_axis: NormAxis = "output"
    learned: Mapping[str, float] = field(default_factory=dict)
    forgotten: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return (
            f"{self.base}, {self.style}, {self.steps} steps at {self.learning_rate:g}, rank {self.rank}, "
            f"seed {self.seed}{self._axis}"
        )

    @property
    def column(self) -> str:
        """What the pairs of one column of the plot have in common."""
        return f"{self.style} on {self.base}{self._axis}"

    @property
    def setting(self) -> str:
        """What the pairs of one table have in common: all but rank and seed."""
        return f"{self.column}, {self.steps} steps at {self.learning_rate:g}"

    @property
    def _axis(self) -> str:
        return " (norm by input)" if self.norm_axis == "input" else ""


class Bench:
    """A loaded base and, once something is measured, the pictures that it drew in its own styles."""

    def __init__(self, name: str, work: Path) -> None:
        self.base = load_base(name, device="cpu")
        self._work = work / name

    @cached_property
    def _own(self) -> tuple[Training, float]:
        """The base's own pictures, and its loss on them; asked for before an adapter is in it."""
        folder = self._work / "own pictures"
        for i, (thing, style) in enumerate((thing, style) for thing in PROMPTS for style in BASE_STYLES):
            prompt = f"{thing}, {style} style"
            save_png(generate(self.base, GenerationRequest(prompt, seed=1)), folder / f"{i:02}.png")
            write_text(folder / f"{i:02}.txt", prompt)
        config = TrainConfig(images=str(folder), validation_images=str(folder), out=str(self._work))
        own = prepare(config, self.base, make_accelerator(config))
        return own, _loss(own)

    def measured(self, pair: Pair) -> Pair:
        """Trains the pair, a LoRA and a DoRA, and measures both."""
        own, own_loss = self._own
        images = sample_folder(pair.style)
        config = TrainConfig(
            images=str(images),
            validation_images=str(images / "held-out"),
            out=str(self._work / "twins"),
            base=self.base.name,
            kind="both",
            rank=pair.rank,
            alpha=pair.rank,
            norm_axis=pair.norm_axis,
            steps=pair.steps,
            batch_size=8,
            learning_rate=pair.learning_rate,
            seed=pair.seed,
            validate_every=pair.steps,
        )
        learned: dict[str, float] = {}
        forgotten: dict[str, float] = {}
        for event in train(config, base=self.base, overwrite=True):
            if isinstance(event, Finished):
                assert event.base_loss and event.held_out_loss
                learned[event.kind] = _percent(event.held_out_loss, event.base_loss)
        for kind in KINDS:
            adapter = load_adapter(self.base.pipe, self._work / "twins" / f"{kind}.safetensors")
            forgotten[kind] = _percent(_loss(own), own_loss)
            adapter.eject()
        return dataclasses.replace(pair, learned=learned, forgotten=forgotten)


def _loss(training: Training) -> float:
    loss = held_out_loss(training)
    assert loss is not None
    return loss


def _percent(after: float, before: float) -> float:
    return round(100 * (after / before - 1), 4)


def load(path: Path) -> dict[str, Pair]:
    """The pairs measured so far. Raises ResultsError."""
    if not path.exists():
        return {}
    try:
        return {key: Pair(**pair) for key, pair in json.loads(path.read_text())["pairs"].items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ResultsError(f"{path} holds no results of this version ({error}); name another file.") from error


def save(path: Path, pairs: Mapping[str, Pair]) -> None:
    machine = dataclasses.asdict(describe_machine(torch.device("cpu")))
    content = {"date": today(), "machine": machine, "pairs": {k: dataclasses.asdict(p) for k, p in pairs.items()}}
    write_text(path, json.dumps(content, indent=1) + "\n")


@dataclass(frozen=True)
class Difference:
    """DoRA's figure less LoRA's within each pair: mean, standard error, and in how many pairs it is below 0."""

    mean: float
    error: float
    below: int
    pairs: int


def difference(pairs: Sequence[Pair], measure: str) -> Difference:
    each = [getattr(pair, measure)["dora"] - getattr(pair, measure)["lora"] for pair in pairs]
    error = statistics.stdev(each) / math.sqrt(len(each)) if len(each) > 1 else math.nan
    return Difference(statistics.fmean(each), error, sum(value < 0 for value in each), len(each))


def by_setting(pairs: Mapping[str, Pair]) -> dict[str, dict[int, list[Pair]]]:
    """The pairs of each setting by their rank; those of one rank differ in the seed alone."""
    found: dict[str, dict[int, list[Pair]]] = {}
    for pair in sorted(pairs.values(), key=lambda pair: (pair.setting, pair.rank, pair.seed)):
        found.setdefault(pair.setting, {}).setdefault(pair.rank, []).append(pair)
    return found


def print_table(console: Console, pairs: Mapping[str, Pair]) -> None:
    console.print("Changes in percent of the base's loss.")
    for setting, ranks in by_setting(pairs).items():
        console.print(_table(setting, ranks))
    console.print("± is the standard error of the mean of the pairs' differences.", style="dim")


def _table(setting: str, ranks: Mapping[int, Sequence[Pair]]) -> Table:
    table = Table("rank", title=setting, title_justify="left")
    for measure in MEASURES:
        for text in (f"{measure}: LoRA", "DoRA", "DoRA - LoRA", "DoRA below"):
            table.add_column(text, justify="right", no_wrap=True)
    for rank, some in ranks.items():
        row = [str(rank)]
        for measure in MEASURES:
            row += [f"{statistics.fmean(getattr(pair, measure)[kind] for pair in some):+.2f}" for kind in KINDS]
            found = difference(some, measure)
            row += [f"{found.mean:+.2f} ± {found.error:.2f}", f"{found.below} of {found.pairs}"]
        table.add_row(*row)
    return table


def draw_plot(pairs: Mapping[str, Pair], path: Path) -> None:
    """A column for each base and style: both measures against the rank, and against each other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns: dict[str, list[Pair]] = {}
    for pair in pairs.values():
        columns.setdefault(pair.column, []).append(pair)
    size = (4.4 * len(columns), 3.2 * (len(MEASURES) + 1))
    figure, axes = pyplot.subplots(len(MEASURES) + 1, len(columns), figsize=size, squeeze=False)
    for (title, some), column in zip(columns.items(), axes.T, strict=True):
        setting, ranks = max(by_setting({pair.key: pair for pair in some}).items(), key=lambda found: len(found[1]))
        for ax, measure in zip(column[:-1], MEASURES, strict=True):
            _against_rank(ax, ranks, measure)
        _against_each_other(column[-1], some)
        column[0].set_title(f"{title},\n{setting.partition(', ')[2]}", fontsize=10)
        if len(some) > sum(map(len, ranks.values())):
            column[-1].set_title("these, and trained shorter and longer", fontsize=10)
        column[0].legend(frameon=False)
    for ax, label in zip(axes[:, 0], (*MEASURES.values(), MEASURES["learned"]), strict=True):
        ax.set_ylabel(f"{label},\n% of the base's", fontsize=9)
    figure.tight_layout()
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=PNG_DPI)
    pyplot.close(figure)


def _against_rank(ax: Axes, ranks: Mapping[int, Sequence[Pair]], measure: str) -> None:
    """A dot is an adapter, a line joins the means."""
    for kind, aside in zip(KINDS, (0.94, 1.06), strict=True):
        values = {rank: [getattr(pair, measure)[kind] for pair in some] for rank, some in ranks.items()}
        dots = [(rank * aside, value) for rank, some in values.items() for value in some]
        x, y = zip(*dots, strict=True)
        ax.scatter(x, y, s=16, alpha=0.5, color=COLOURS[kind], lw=0)
        means = [statistics.fmean(some) for some in values.values()]
        ax.plot(list(ranks), means, color=COLOURS[kind], label=KIND_LABEL[kind])
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(ranks), [str(rank) for rank in ranks])
    ax.set_xlabel("rank")
    ax.grid(alpha=0.25)


def _against_each_other(ax: Axes, pairs: Sequence[Pair]) -> None:
    """Learned against forgotten: lower and further left is better. A line joins the means from left to right."""
    alike: dict[tuple[int, int], list[Pair]] = {}
    for pair in pairs:
        alike.setdefault((pair.rank, pair.steps), []).append(pair)
    axes = ("forgotten", "learned")
    for kind in KINDS:
        forgotten, learned = ([getattr(pair, measure)[kind] for pair in pairs] for measure in axes)
        ax.scatter(forgotten, learned, s=16, alpha=0.5, color=COLOURS[kind], lw=0)
        means = [
            tuple(statistics.fmean(getattr(pair, measure)[kind] for pair in some) for measure in axes)
            for some in alike.values()
        ]
        ax.plot(*zip(*sorted(means), strict=True), color=COLOURS[kind])
    ax.set_xlabel(f"{MEASURES['forgotten']}, % of the base's")
    ax.grid(alpha=0.25)


def measure_all(
    wanted: Sequence[Pair],
    bench: Bench,
    pairs: dict[str, Pair],
    path: Path,
    reporter: Reporter,
) -> None:
    """Adds to `pairs` what they lack, one after another, and saves them after each."""
    missing = [pair for pair in wanted if pair.key not in pairs]
    with reporter.steps(f"{len(missing)} pairs of twins", len(missing)) as advance:
        for pair in missing:
            pairs[pair.key] = bench.measured(pair)
            save(path, pairs)
            advance()


def main(
    base: Annotated[str, typer.Option(help="An embedded base.")] = "emoji",
    styles: Annotated[str, typer.Option(help="Sample folders, comma-separated.")] = "openmoji,fluent",
    ranks: Annotated[str, typer.Option(help="Ranks, comma-separated; alpha is the rank.")] = "",
    seeds: Annotated[int, typer.Option(help="Pairs of twins for each style and rank.", min=1)] = 5,
    steps: Annotated[int, typer.Option(help="Training steps, of 8 pictures each.", min=1)] = 200,
    learning_rate: Annotated[float, typer.Option(help="0: the base's own.", min=0.0)] = 0.0,
    by_input: Annotated[bool, typer.Option("--by-input", help="DoRA's norm by input.")] = False,
    threads: Annotated[int, typer.Option(help="Processor threads; 0 for PyTorch's own choice.", min=0)] = 0,
    show: Annotated[bool, typer.Option("--show", help="Print and plot the saved results, and stop.")] = False,
    json: Annotated[Path | None, typer.Option(help="Results; pairs that are in it are not trained again.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the pairs into this PNG.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for adapters and pictures.")] = Path("outputs/quality"),
) -> None:
    """Train LoRA and DoRA twins on the sample styles over ranks and seeds, and lay what they learn and forget side by side."""  # noqa: E501
    console = new_console()
    path = json or default_path("quality", torch.device("cpu"), quick=False)
    if threads:
        torch.set_num_threads(threads)
    try:
        pairs = load(path)
        if not show:
            bench = Bench(base, work)
            rate = learning_rate or bench.base.learning_rate
            wanted = [
                Pair(base, style, rank, seed, steps, rate, "input" if by_input else "output")
                for seed in range(seeds)
                for style in styles.split(",")
                for rank in rank_list(ranks, RANKS)
            ]
            measure_all(wanted, bench, pairs, path, Reporter(console))
    except DoraDiffusionError as error:
        console.print(f"[red]{error}[/]")
        raise typer.Exit(1) from error
    print_table(console, pairs)
    if plot is not None and pairs:
        draw_plot(pairs, plot)


if __name__ == "__main__":
    typer.run(main)
