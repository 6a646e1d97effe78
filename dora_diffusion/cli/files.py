"""`inspect`, `parity`, `convert` and `merge`: adapter files looked into, and written anew."""

from __future__ import annotations

import json
import shlex
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import typer

from dora_diffusion.cli.terminal import BaseOption, app, console, say_next
from dora_diffusion.errors import ConfigError

# Weights are compared and written in float32, which a base on a GPU would not be in.
EXACT: Literal["cpu"] = "cpu"


@app.command(name="inspect")
def inspect_files(
    files: Annotated[list[Path], typer.Argument(help="Adapter files, or models that were fine-tuned whole.")],
    base: Annotated[
        str | None, typer.Option("--base", help="What they were trained from; turns the analysis on.")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="A PNG with every layer's change; needs --base.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON, for programs.")] = False,
) -> None:
    """Look inside adapter files: what they are and, with a base, what they changed in it."""
    from dora_diffusion.inspection import look, tables
    from dora_diffusion.inspection.plots import draw_analyses
    from dora_diffusion.lettering.fonts import note_on_missing
    from dora_diffusion.models.loading import load_base
    from dora_diffusion.outputs import save_png

    if plot is not None and base is None:
        raise ConfigError("--plot shows what changed in the base: give it with --base.")
    looks = look.look_at(files, load_base(base, device=EXACT) if base is not None else None)
    analyses = [analysis for _, analysis in looks if analysis is not None]
    if plot is not None:
        save_png(draw_analyses(look.comparable(analyses)), plot)
    if as_json:
        print(json.dumps([tables.inspection_json(*one) for one in looks], indent=2))
        return
    for summary, analysis in looks:
        tables.print_summary(console, summary)
        if analysis is not None:
            tables.print_analysis(console, analysis)
    if plot is not None:
        console.print(f"The plot is in {plot}.")
        if note := note_on_missing([analysis.name for analysis in analyses]):
            console.print(note, style="yellow", markup=False)


@app.command()
def parity(
    file: Annotated[Path, typer.Argument(help="An adapter file.")],
    base: BaseOption = "emoji",
    strength: Annotated[float, typer.Option(help="Compare at this strength too.")] = 1.0,
    repair: Annotated[
        str | None, typer.Option("--repair", help="Write the file that is right in this program.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The file to write, with --repair.")] = None,
    form: Annotated[
        str | None, typer.Option("--form", help="How to write it; default: the smallest that is right.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON, for programs.")] = False,
) -> None:
    """Say what other programs make of an adapter file; write one that they get right."""
    from dora_diffusion.inspection import tables
    from dora_diffusion.inspection.parity import compare_programs
    from dora_diffusion.inspection.programs import program_named
    from dora_diffusion.inspection.repair import repair as write_repaired
    from dora_diffusion.models.loading import load_base

    if (repair is None) != (out is None) or (form is not None and repair is None):
        raise ConfigError("--repair PROGRAM and --out FILE belong together, and --form to both.")
    program = program_named(repair) if repair is not None else None
    loaded = load_base(base, device=EXACT)
    if program is not None and out is not None:
        made = write_repaired(file, loaded, program, out, strength=strength, form=form)
        line = (
            f"{made.path}: {made.form.name}, {made.form.meaning}. Relative error in {program.label}: {made.error:.0e}."
        )
        console.print(line, markup=False, soft_wrap=True)
        return
    found = compare_programs(file, loaded, strength)
    if as_json:
        print(json.dumps(tables.parity_json(found), indent=2))
    else:
        tables.print_parity(console, found, type(loaded.denoiser).__name__)


class Layout(str, Enum):
    diffusers = "diffusers"
    kohya = "kohya"
    diff = "diff"
    lora = "lora"


class Precision(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@app.command()
def convert(
    file: Annotated[str, typer.Argument(help="An adapter of any dialect: a file, a PEFT folder or a hub id.")],
    to: Annotated[Layout, typer.Option("--to", help="diff and lora need the base.")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.")],
    base: Annotated[
        str | None, typer.Option("--base", help="emoji, emoji-dit, a folder, a .safetensors file or a hub id.")
    ] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Default: as in the file.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the LoRA that --to lora writes. Default: the adapter's.")] = None,
    alpha: Annotated[float | None, typer.Option(help="For files of programs that do not save it.")] = None,
) -> None:
    """Write an adapter in another dialect: for diffusers, for ComfyUI, Forge, A1111 and LyCORIS, or for everything."""
    from dora_diffusion.formats.convert import convert_adapter
    from dora_diffusion.models.loading import load_base

    made = convert_adapter(
        file,
        out,
        to.value,
        base=load_base(base, device=EXACT) if base else None,
        dtype=dtype.value if dtype else None,
        rank=rank,
        alpha=alpha,
    )
    for line in made.report():
        console.print(line, soft_wrap=True)


@app.command()
def merge(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter files; several add up.")],
    out: Annotated[Path, typer.Option("--out", help="A new folder for the pipeline.")],
    base: BaseOption = "emoji",
    strength: Annotated[list[float] | None, typer.Option(help="One for each adapter; 1 by default.")] = None,
    dtype: Annotated[Precision, typer.Option(help="Of the weights that are written.")] = Precision.float16,
) -> None:
    """Write the base with adapters in its weights, as a diffusers pipeline that needs no adapter any more."""
    from dora_diffusion.comparison.request import one_for_each
    from dora_diffusion.formats.convert import DTYPES
    from dora_diffusion.models.loading import load_base
    from dora_diffusion.models.merging import save_merged

    strengths = one_for_each(adapters, strength)
    loaded = load_base(base, device=EXACT)
    console.print(f"{save_merged(loaded, adapters, strengths, out, DTYPES[dtype.value])}: {type(loaded.pipe).__name__}")
    say_next([shlex.join(["dora-diffusion", "generate", "--base", str(out), "--prompt", "..."])])
