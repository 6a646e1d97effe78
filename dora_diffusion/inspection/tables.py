"""Parity and inspection on a screen, and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from rich.table import Table
from rich.text import Text

from dora_diffusion.inspection.analysis import Analysis
from dora_diffusion.inspection.parity import RIGHT, Parity
from dora_diffusion.inspection.programs import PROGRAMS
from dora_diffusion.inspection.summary import Summary
from dora_diffusion.screen import Screen, printable, styled

__all__ = ["inspection_json", "parity_json", "print_analysis", "print_parity", "print_summary"]

Json: TypeAlias = "Mapping[str, Json] | Sequence[Json] | str | float | int | bool | None"
MOST_LAYERS = 8


def print_parity(console: Screen, found: Sequence[Parity], model: str) -> None:
    """One row a program; below, the layer that is worst in each that is not right, and the versions.

    `model` is the class of the base's denoiser, for the programs whose names for its layers are not known.
    """
    strength = found[0].strength
    table = Table(header_style="bold")
    table.add_column("program")
    table.add_column("layers", justify="right", no_wrap=True)
    for heading in ("error", "worst", *([f"at {strength:g}"] if strength != 1 else [])):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("what it makes of the file")
    for parity in found:
        errors = [parity.total, parity.worst.error, *([parity.total_at_strength] if strength != 1 else [])]
        shown = [styled("-") if parity.stopped else _error(error) for error in errors]
        table.add_row(
            parity.program.label, f"{parity.read} of {parity.count}" if parity.known else "-", *shown, _verdict(parity)
        )
    console.print(table)
    for parity in found:
        if not parity.stopped and parity.read and not parity.right:
            note = f" ({parity.worst.note})" if parity.worst.note else ""
            console.say(f"{parity.program.label}: worst at {printable(parity.worst.layer)}{note}")
    compared = {parity.program.name for parity in found}
    if unknown := [program.label for program in PROGRAMS if program.name not in compared]:
        console.say(f"How {', '.join(unknown)} would name the layers of a {model} is not known here.")
    versions = "; ".join(f"{parity.program.label} {parity.program.version}" for parity in found)
    explanation = (
        "error: ||what it adds to the weights - what the file means|| / ||what the file means||, over all layers "
        f"and in the worst one.\nRules of {versions}."
    )
    console.say((explanation, "dim"))


def _verdict(parity: Parity) -> Text:
    if parity.stopped:
        return styled((parity.stopped, "red" if parity.known else "yellow"))
    if not parity.right:
        return styled(("; ".join(parity.reasons) or "wrong", "red"))
    if not parity.right_at_strength:
        return styled((f"right at strength 1; its strength {parity.strength:g} is another", "yellow"))
    return styled(("right", "green"))


def parity_json(found: Sequence[Parity]) -> Json:
    return [
        {
            "program": parity.program.name,
            "version": parity.program.version,
            "sources": list(parity.program.sources),
            "read_on": parity.program.read_on,
            "known": parity.known,
            "right": parity.right,
            "right_at_strength": parity.right_at_strength,
            "strength": parity.strength,
            "layers_read": parity.read,
            "dropped_keys": dict(parity.dropped),
            "stopped": parity.stopped,
            "reasons": list(parity.reasons),
            "error": _finite(parity.total),
            "error_at_strength": _finite(parity.total_at_strength),
            "worst": _finite(parity.worst.error),
            "worst_layer": parity.worst.layer,
            "threshold": RIGHT,
            "layers": [
                {
                    "layer": layer.layer,
                    "size": layer.size,
                    "error": _finite(layer.error),
                    "error_at_strength": _finite(layer.error_at_strength),
                    "note": layer.note,
                }
                for layer in parity.layers
            ],
        }
        for parity in found
    ]


def print_summary(console: Screen, summary: Summary) -> None:
    console.say((printable(summary.path), "bold"))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in _facts(summary):
        table.add_row(name, value)
    console.print(table)


def _facts(summary: Summary) -> list[tuple[str, str]]:
    facts = [("kind", summary.kind), ("dialect", summary.dialect)]
    if summary.ranks:
        facts.append(("rank", _counted(summary.ranks)))
        facts.append(("alpha", _counted(summary.alphas) + (", alpha / sqrt(rank)" if summary.use_rslora else "")))
    if summary.norm_axis != "none":
        facts.append(("norm axis", summary.norm_axis))
    if summary.layers:
        facts.append(("layers", f"{summary.layers}: " + ", ".join(f"{t} ({n})" for t, n in summary.targets.items())))
        facts.append(("parameters", f"{summary.parameters:,}"))
    facts += [("size", f"{summary.size:,} bytes"), ("SHA-256", summary.sha256)]
    if summary.base:
        facts.append(("trained on", f"{summary.base} (fingerprint {summary.fingerprint})"))
    facts += [("training", ", ".join(f"{k} {v}" for k, v in summary.training.items()))] if summary.training else []
    facts += [("note", note) for note in summary.notes]
    return facts


def print_analysis(console: Screen, analysis: Analysis) -> None:
    """The layers that changed most, and what holds for all."""
    console.say("The layers that changed most")
    heading = f"{'size':>8} {'magnitude':>10} {'direction':>10} {'eff. rank':>10} {f'top {analysis.rank}':>7}  layer"
    console.say((heading, "bold"))
    for layer in analysis.largest[:MOST_LAYERS]:
        console.say(
            f"{100 * layer.relative_size:6.2f} % {layer.magnitude_change:10.3g} {layer.direction_change:10.3g} "
            f"{layer.effective_rank:10.1f} {100 * layer.energy:5.1f} %  {printable(layer.layer)}"
        )
    correlation = analysis.correlation
    text = "has no meaning here" if correlation is None else f"{correlation:+.3f} over {len(analysis.matrices)} layers"
    console.say(f"correlation of the changes of direction and magnitude: {text}")
    explanation = (
        "size: ||dW|| / ||W0||; magnitude: mean |m' - m0| of the rows' norms; direction: mean 1 - cos; "
        f"top {analysis.rank}: share of ||dW||^2 in the {analysis.rank} largest singular values\n"
    )
    console.say((explanation, "dim"))


def inspection_json(summary: Summary, analysis: Analysis | None) -> Json:
    facts = {field.name: getattr(summary, field.name) for field in dataclasses.fields(summary)}
    facts |= {"path": str(summary.path), "notes": list(summary.notes)}
    facts |= {name: {f"{key:g}": n for key, n in facts[name].items()} for name in ("ranks", "alphas")}
    if analysis is not None:
        facts["analysis"] = {
            "correlation": analysis.correlation,
            "energy_rank": analysis.rank,
            "layers": [
                dataclasses.asdict(layer)
                | {"relative_size": _finite(layer.relative_size)}
                | {"singular_values": [float(f"{v:.6g}") for v in layer.singular_values]}
                for layer in analysis.layers
            ],
        }
    return facts


def _counted(values: Mapping[int, int] | Mapping[float, int]) -> str:
    """ "16", or with several "16 (90 layers), 4 (6)"."""
    if len(values) == 1:
        return f"{next(iter(values)):g}"
    return ", ".join(f"{value:g} ({n} layers)" for value, n in sorted(values.items(), key=lambda item: -item[1]))


def _error(value: float) -> Text:
    if not math.isfinite(value):
        return styled(("not finite", "red"))
    text = f"{100 * value:.1f} %" if value > 0.0005 else f"{value:.0e}"
    return styled((text, "green" if value <= RIGHT else "red"))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
