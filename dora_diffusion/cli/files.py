"""`inspect`, `parity`, `convert` and `merge`: adapter files looked into, and written anew."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal

import typer

from dora_diffusion.cli.terminal import BaseOption, command, console, path_argument, path_option, say_next
from dora_diffusion.errors import ConfigError
from dora_diffusion.paths import given_path
from dora_diffusion.screen import printable, shell_line

# Weights are compared and written in float32, which a base on a GPU would not be in.
EXACT: Literal["cpu"] = "cpu"
PartialOption = Annotated[bool, typer.Option("--partial", help="Take what fits of a file, and say what is left out.")]


@command("inspect")
def inspect_files(
    files: Annotated[
        list[Path], path_argument(help="Adapter files, or models that were fine-tuned whole.", metavar="FILES...")
    ],
    base: Annotated[
        str | None, typer.Option("--base", help="What they were trained from; turns the analysis on.")
    ] = None,
    plot: Annotated[Path | None, path_option("--plot", help="A PNG with every layer's change; needs --base.")] = None,
    partial: PartialOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON, for programs.")] = False,
) -> None:
    """Look inside adapter files: what they are and, with a base, what they changed in it."""
    from dora_diffusion.inspection import look, tables
    from dora_diffusion.inspection.changes import check_source
    from dora_diffusion.inspection.plots import draw_analyses
    from dora_diffusion.lettering.fonts import note_on_missing
    from dora_diffusion.models.loading import load_base
    from dora_diffusion.outputs import check_output, save_png

    if plot is not None and base is None:
        raise ConfigError("--plot shows what changed in the base: give it with --base.")
    for path in files:
        check_source(path)
    if plot is not None:
        check_output(plot, files)
    looks = look.look_at(files, load_base(base, device=EXACT) if base is not None else None, partial)
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
        console.say(f"The plot is in {printable(plot)}.")
        if note := note_on_missing([analysis.name for analysis in analyses]):
            console.say((note, "yellow"))


@command()
def parity(
    file: Annotated[Path, path_argument(help="An adapter file.", metavar="FILE")],
    base: BaseOption = "emoji",
    strength: Annotated[float, typer.Option(help="Compare at this strength too.")] = 1.0,
    repair: Annotated[
        str | None, typer.Option("--repair", help="Write the file that is right in this program.")
    ] = None,
    out: Annotated[Path | None, path_option("--out", help="The file to write, with --repair.")] = None,
    form: Annotated[
        str | None, typer.Option("--form", help="How to write it; default: the smallest that is right.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Everything as JSON, for programs.")] = False,
) -> None:
    """Say what other programs make of an adapter file; write one that they get right."""
    from dora_diffusion.formats.files import check_adapter
    from dora_diffusion.inspection import tables
    from dora_diffusion.inspection.parity import compare_programs
    from dora_diffusion.inspection.programs import program_named
    from dora_diffusion.inspection.repair import form_named
    from dora_diffusion.inspection.repair import repair as write_repaired
    from dora_diffusion.models.loading import load_base
    from dora_diffusion.outputs import check_output

    if (repair is None) != (out is None) or (form is not None and repair is None):
        raise ConfigError("--repair PROGRAM and --out FILE belong together, and --form to both.")
    program = program_named(repair) if repair is not None else None
    if form is not None:
        form_named(form)
    check_adapter(file)
    if out is not None:
        check_output(out, [file])
    loaded = load_base(base, device=EXACT)
    if program is not None and out is not None:
        made = write_repaired(file, loaded, program, out, strength=strength, form=form)
        line = (
            f"{made.path}: {made.form.name}, {made.form.meaning}. Relative error in {program.label}: {made.error:.0e}."
        )
        console.say(line)
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


@command()
def convert(
    file: Annotated[str, typer.Argument(help="An adapter of any dialect: a file, a PEFT folder or a hub id.")],
    to: Annotated[Layout, typer.Option("--to", help="diff and lora need the base.")],
    out: Annotated[Path, path_option("--out", help="The file to write.")],
    base: Annotated[
        str | None, typer.Option("--base", help="emoji, emoji-dit, a folder, a .safetensors file or a hub id.")
    ] = None,
    dtype: Annotated[Precision | None, typer.Option(help="Default: as in the file.")] = None,
    rank: Annotated[int | None, typer.Option(help="Of the LoRA that --to lora writes. Default: the adapter's.")] = None,
    alpha: Annotated[float | None, typer.Option(help="For files of programs that do not save it.")] = None,
    partial: PartialOption = False,
) -> None:
    """Write an adapter in another dialect: for diffusers, for ComfyUI, Forge, A1111 and LyCORIS, or for everything."""
    from dora_diffusion.formats.convert import check_options, convert_adapter
    from dora_diffusion.formats.files import check_adapter
    from dora_diffusion.models.loading import load_base
    from dora_diffusion.outputs import check_output

    file = given_path(file)
    check_options(to.value, dtype.value if dtype else None, rank, alpha, base is not None)
    check_adapter(file)
    check_output(out, [Path(file)])
    made = convert_adapter(
        file,
        out,
        to.value,
        base=load_base(base, device=EXACT) if base is not None else None,
        dtype=dtype.value if dtype else None,
        rank=rank,
        alpha=alpha,
        partial=partial,
    )
    for line in made.report():
        console.say(line)


@command()
def merge(
    adapters: Annotated[list[Path], path_argument(help="Adapter files; several add up.", metavar="ADAPTERS...")],
    out: Annotated[Path, path_option("--out", help="A new folder for the pipeline.")],
    base: BaseOption = "emoji",
    strength: Annotated[list[float] | None, typer.Option(help="One for each adapter; 1 by default.")] = None,
    dtype: Annotated[Precision, typer.Option(help="Of the weights that are written.")] = Precision.float16,
) -> None:
    """Write the base with adapters in its weights, as a diffusers pipeline that needs no adapter any more."""
    from dora_diffusion.comparison.request import one_for_each
    from dora_diffusion.formats.convert import DTYPES
    from dora_diffusion.formats.files import check_adapter
    from dora_diffusion.models.loading import load_base
    from dora_diffusion.models.merging import check_new_folder, save_merged

    strengths = one_for_each(adapters, strength)
    for path in adapters:
        check_adapter(path)
    check_new_folder(out)
    loaded = load_base(base, device=EXACT)
    made = save_merged(loaded, adapters, strengths, out, DTYPES[dtype.value])
    console.say(f"{printable(made)}: {type(loaded.pipe).__name__}")
    say_next([shell_line(["dora-diffusion", "generate", "--base", str(out), "--prompt", "..."])])
