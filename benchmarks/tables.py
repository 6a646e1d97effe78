"""The tables: one for each entry, the targets, and what has to be known to read them."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from benchmarks.measure import ratios, spread
from benchmarks.results import Entry, Machine, Row
from benchmarks.targets import outcomes
from benchmarks.variants import VARIANTS

__all__ = ["print_entries", "print_targets"]

BUSY = 0.15  # processors; from here on the ratios spread
TITLE = {
    "training": "training step (forward, loss, backward; no optimizer)",
    "inference": "inference (forward, no gradients; strength 1)",
    "memory": "peak memory of a training process",
    "handling": "injecting, and changing the strength of all layers",
}


def print_entries(console: Console, entries: Sequence[Entry]) -> None:
    for entry in entries:
        console.print()
        console.print({"memory": _memory, "handling": _handling}.get(entry.mode, _timed)(entry))
        console.print(_footer(entry), style="dim", highlight=False)
        for note in entry.notes:
            console.print(f"  - {note}", style="dim", highlight=False)


def print_targets(console: Console, entries: Sequence[Entry]) -> None:
    """Every target that these entries can answer."""
    found = list(outcomes(entries))
    if not found:
        return
    table = Table("target", "where", "limit", "measured", "", title="targets", title_justify="left")
    for outcome in found:
        target = outcome.target
        verdict = "[green]met[/]" if outcome.is_met else f"[red]missed by {outcome.figure - target.limit:.2f}[/]"
        sign = "<" if target.strictly else "<="
        limit = f"{sign} {target.limit:.2f} {target.unit}"
        table.add_row(target.text, outcome.where, limit, f"{outcome.figure:.2f} {target.unit}", verdict)
    console.print()
    console.print(table)


def _table(entry: Entry, *columns: str) -> Table:
    quick = ", quick" if entry.quick else ""
    table = Table(title=f"{entry.case}, rank {entry.rank}: {TITLE[entry.mode]}{quick}", title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def _timed(entry: Entry) -> Table:
    reference = VARIANTS[entry.reference].label
    gradients = ("same gradients",) if entry.mode == "training" else ()
    table = _table(entry, "", "median", f"ratio to {reference}", "quartiles", "same output", *gradients)
    seconds = {name: row.seconds for name, row in entry.rows.items()}
    for name, row in entry.rows.items():
        ratio = spread(ratios(seconds, name, entry.reference))
        table.add_row(
            VARIANTS[name].label,
            _time(spread(row.seconds).median),
            f"{ratio.median:.2f}",
            f"{ratio.low:.2f}-{ratio.high:.2f}",
            *_agreement(name, row, entry.mode),
        )
    return table


def _agreement(name: str, row: Row, mode: str) -> list[str]:
    """Yes or no with the error; a dash for the base, "reference" for the one the others are compared with."""
    found = row.agreement
    if found is None:
        return ["-"] * (2 if mode == "training" else 1)
    cells = ["reference" if found.reference == name else _verdict(found.outputs_agree, found.output_error)]
    if mode == "training":
        same, error = found.gradients_agree, found.gradient_error or 0.0
        by_definition = VARIANTS[name].other_gradients
        cells.append("reference" if found.reference == name else _verdict(same, error, by_definition))
    return cells


def _verdict(same: bool, error: float, expected: bool = False) -> str:
    if same:
        return f"yes, {error:.0e}"
    return f"no, {error:.0e} (note)" if expected else f"[red]NO, {error:.0e}[/]"


def _memory(entry: Entry) -> Table:
    table = _table(entry, "", "peak MB", "MB over the base")
    base = entry.rows["base"].peak_mb
    for name, row in entry.rows.items():
        if row.peak_mb is not None and base is not None:
            table.add_row(VARIANTS[name].label, f"{row.peak_mb:,.0f}", f"{row.peak_mb - base:,.0f}")
    return table


def _handling(entry: Entry) -> Table:
    table = _table(entry, "", "inject", "quartiles", "change strength", "writes to weights")
    for name, row in entry.rows.items():
        times = spread(row.seconds)
        strength = "-" if row.strength_ms is None else f"{row.strength_ms:.2f} ms"
        touches = {None: "-", True: "yes", False: "no"}[row.strength_touches_weights]
        quartiles = f"{_time(times.low)} to {_time(times.high)}"
        table.add_row(VARIANTS[name].label, _time(times.median), quartiles, strength, touches)
    return table


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{1e3 * seconds:.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.0f} us"


def _footer(entry: Entry) -> str:
    rounds = f"{entry.rounds} interleaved rounds" if entry.mode in ("training", "inference") else "one run"
    return f"{entry.about}; {entry.dtype}, {rounds}, {entry.date}, {_machine(entry.machine)}{_noise(entry)}"


def _machine(machine: Machine) -> str:
    where = machine.accelerator or f"{machine.processor}, {machine.threads} threads"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items() if name != "python")
    return f"{where}; {versions}"


def _noise(entry: Entry) -> str:
    if entry.others is None or entry.others < BUSY:
        return ""
    return f"; NOT A QUIET MACHINE: other programs kept {entry.others:.1f} processors busy"
