"""The command that both benchmarks share: options to a plan, then measuring, tables and the verdict on the targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeVar

import torch
import typer
from rich.console import Console

from benchmarks.cases import Case
from benchmarks.profiling import print_profile
from benchmarks.reporter import Reporter
from benchmarks.results import Entry, ResultsError, default_path, load
from benchmarks.runner import MODES, Plan, run
from benchmarks.tables import print_entries, print_targets
from benchmarks.variants import VARIANTS, Variant, available
from dora_diffusion.errors import nearest

__all__ = ["Benchmark", "command_of", "new_console", "rank_list"]

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RANKS = (16, 64)
FORMS = ("lokr", "dokr", "loha", "doha")
OPTIONAL_VARIANTS = ("lycoris-bypass", "lycoris-dora-in", "dora-in", *FORMS, *(f"lycoris-{form}" for form in FORMS))
T = TypeVar("T")


@dataclass(frozen=True)
class Benchmark:
    """What one of the two commands has of its own: its cases, and which of them run by default."""

    name: str
    about: str
    cases: Mapping[str, Case]
    defaults: Mapping[str, Sequence[str]]  # by device
    quick: Sequence[str]
    rounds: int
    quick_rounds: int
    modes: Sequence[str]


def command_of(benchmark: Benchmark) -> typer.Typer:
    """The command-line program of one benchmark."""
    app = typer.Typer(add_completion=False)

    @app.command(help=f"{benchmark.about}\n\nCases: {', '.join(benchmark.cases)}.")
    def main(
        cases: Annotated[str, typer.Option(help="What to time, comma-separated; the names are above.")] = "",
        ranks: Annotated[str, typer.Option(help="Ranks, comma-separated.")] = "",
        modes: Annotated[str, typer.Option(help=f"Of {', '.join(MODES)}; comma-separated.")] = "",
        variants: Annotated[str, typer.Option(help=f"Of {', '.join(VARIANTS)}; comma-separated.")] = "",
        rounds: Annotated[int, typer.Option(help="Timed rounds; 0 for the usual number.", min=0)] = 0,
        device: Annotated[str, typer.Option(help="cpu, cuda or cuda:N; by default CUDA where there is one.")] = "",
        dtype: Annotated[str, typer.Option(help=f"Of {', '.join(DTYPES)}; by default bf16 on CUDA.")] = "",
        threads: Annotated[int, typer.Option(help="Processor threads; 0 for PyTorch's own choice.", min=0)] = 0,
        memory: Annotated[bool, typer.Option("--memory", help="Measure peak memory too.")] = False,
        quick: Annotated[bool, typer.Option("--quick", help="Small cases and few rounds, in two minutes.")] = False,
        profile: Annotated[str, typer.Option(help="Profile this variant in the first case, and stop.")] = "",
        show: Annotated[bool, typer.Option("--show", help="Print the saved results, and stop.")] = False,
        json: Annotated[Path | None, typer.Option(help="Where the results go; entries not measured stay.")] = None,
    ) -> None:
        console = new_console()
        if threads:
            torch.set_num_threads(threads)
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        path = json or default_path(benchmark.name, where, quick)
        try:
            saved = load(path)  # before the work, not after it
        except ResultsError as error:
            raise typer.BadParameter(str(error), param_hint="--json") from error
        if show:
            _report(console, saved)
            return
        defaults = benchmark.quick if quick else benchmark.defaults[where.type]
        wanted_modes = [*_chosen("modes", modes, {mode: mode for mode in MODES}, benchmark.modes)]
        if memory and "memory" not in wanted_modes:
            wanted_modes.insert(0, "memory")
        plan = Plan(
            cases=_chosen("cases", cases, benchmark.cases, defaults),
            ranks=rank_list(ranks, RANKS[:1] if quick else RANKS),
            modes=tuple(wanted_modes),
            variants=_variants(variants, console),
            rounds=rounds or (benchmark.quick_rounds if quick else benchmark.rounds),
            device=where,
            dtype=_chosen("dtype", dtype, DTYPES, ["bf16" if where.type == "cuda" else "float32"])[0],
            quick=quick,
            path=path,
        )
        if profile:
            print_profile(plan, _chosen("profile", profile, VARIANTS, [])[0], console)
            return
        entries = run(plan, Reporter(console))
        _report(console, entries)
        console.print(f"\nresults in {path}", highlight=False)
        rows = [(VARIANTS[name], row.agreement) for entry in entries for name, row in entry.rows.items()]
        if not all(found is None or found.is_same(variant.other_gradients) for variant, found in rows):
            raise typer.Exit(1)  # times of different mathematics are no comparison

    return app


def new_console() -> Console:
    """The terminal, or lines wide enough for the tables where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=120)  # a log has no width of its own


def _report(console: Console, entries: Sequence[Entry]) -> None:
    print_entries(console, entries)
    print_targets(console, entries)


def _variants(text: str, console: Console) -> tuple[Variant, ...]:
    chosen = [v.name for v in _chosen("variants", text, VARIANTS, [n for n in VARIANTS if n not in OPTIONAL_VARIANTS])]
    chosen = [*(["base"] if "base" not in chosen else []), *chosen]
    there = available(chosen)
    for name in chosen:
        if name not in there:
            console.print(f"{VARIANTS[name].label} is left out: {VARIANTS[name].needs} is not installed.")
    return tuple(VARIANTS[name] for name in there)


def _chosen(option: str, text: str, known: Mapping[str, T], default: Iterable[str]) -> tuple[T, ...]:
    """The named entries of a table, the default ones without a text."""
    names = [name.strip() for name in text.split(",")] if text else list(default)
    for name in names:
        if name not in known:
            near = nearest(name, known) or list(known)
            raise typer.BadParameter(f"{name!r} is not known; there is {', '.join(near)}.", param_hint=f"--{option}")
    return tuple(known[name] for name in names)


def rank_list(text: str, default: Sequence[int]) -> tuple[int, ...]:
    """The ranks named in a text, the default ones without one. Raises typer.BadParameter."""
    try:
        ranks = tuple(int(part) for part in text.split(",")) if text else tuple(default)
    except ValueError:
        ranks = ()
    if not ranks or min(ranks) < 1:
        raise typer.BadParameter(f"{text!r} is no list of whole numbers of at least 1.", param_hint="--ranks")
    return ranks
