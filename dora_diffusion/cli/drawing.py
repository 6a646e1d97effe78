"""`generate` and `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dora_diffusion.cli.terminal import (
    BaseOption,
    QuantiseOption,
    SeedsOption,
    SizeOption,
    command,
    console,
    path_argument,
    path_option,
    say_cautions,
    whole_numbers,
)
from dora_diffusion.screen import printable

# What both commands take.
StrengthOption = Annotated[list[float] | None, typer.Option(help="One for each adapter; 1 by default.")]
NegativePromptOption = Annotated[str, typer.Option(help="What to keep out.")]
StepsOption = Annotated[int, typer.Option(help="Denoising steps.")]
PartialOption = Annotated[bool, typer.Option("--partial", help="Load what fits of a file, and say what is left out.")]
GuidanceOption = Annotated[float | None, typer.Option(help="Guidance scale. Default: the base's.")]


@command()
def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="What to draw.")],
    out: Annotated[Path, path_option("--out", help="A folder for the pictures.")] = Path("outputs/pictures"),
    adapter: Annotated[
        list[Path] | None, path_option("--adapter", help="An adapter file; repeat it to add several.")
    ] = None,
    strength: StrengthOption = None,
    seeds: SeedsOption = "1",
    base: BaseOption = "emoji",
    negative_prompt: NegativePromptOption = "",
    steps: StepsOption = 25,
    guidance: GuidanceOption = None,
    size: SizeOption = "",
    partial: PartialOption = False,
    quantise: QuantiseOption = None,
) -> None:
    """Draw pictures, with adapters or without."""
    from dora_diffusion.comparison.request import one_for_each, parse_size
    from dora_diffusion.formats.files import check_adapter, load_adapter
    from dora_diffusion.generation import GenerationRequest
    from dora_diffusion.generation import generate as draw
    from dora_diffusion.models.loading import load_base
    from dora_diffusion.outputs import check_places, make_folder, save_png

    strengths = one_for_each(adapter or [], strength)
    width, height = parse_size(size)
    requests = [
        GenerationRequest(prompt, seed, negative_prompt, steps, guidance, width, height)
        for seed in whole_numbers(seeds)
    ]
    for path in adapter or []:
        check_adapter(path)
    check_places(make_folder(out), [f"seed-{request.seed}.png" for request in requests], [])
    say_cautions(quantise.value if quantise else None)
    loaded = load_base(base, packing=quantise.value if quantise else None)
    for path, value in zip(adapter or [], strengths, strict=True):
        console.say(str(load_adapter(loaded.pipe, path, strength=value, partial=partial)))
    for request in requests:
        image = draw(loaded, request)
        metadata = {"prompt": prompt, "seed": str(request.seed), "base": loaded.label}
        console.say(printable(save_png(image, out / f"seed-{request.seed}.png", metadata)))


# Several files after one --adapters, as the README writes it, is not in typer's grammar: those that follow the options
# are arguments, and further adapter files.
@command()
def compare(
    prompt: Annotated[list[str], typer.Option("--prompt", help="What to draw; may be repeated.")],
    adapters: Annotated[list[Path], path_option("--adapters", help="Adapter files: --adapters a b, or repeated.")],
    more: Annotated[list[Path] | None, path_argument(help="Further adapter files.", hidden=True)] = None,
    out: Annotated[Path, path_option("--out", help="A folder for the grid and the report.")] = Path("outputs/compare"),
    seeds: SeedsOption = "1",
    strength: StrengthOption = None,
    base: BaseOption = "emoji",
    negative_prompt: NegativePromptOption = "",
    steps: StepsOption = 25,
    guidance: GuidanceOption = None,
    size: SizeOption = "",
    partial: PartialOption = False,
    quantise: QuantiseOption = None,
) -> None:
    """Draw the base and each adapter side by side, on the same prompts and seeds."""
    from dora_diffusion.comparison.compare import CompareRequest, columns_of
    from dora_diffusion.comparison.compare import compare as draw
    from dora_diffusion.comparison.grid import draw_grid, grid_note
    from dora_diffusion.comparison.report import write_report
    from dora_diffusion.comparison.request import parse_size
    from dora_diffusion.console import show_cells
    from dora_diffusion.formats.files import check_adapter
    from dora_diffusion.models.loading import load_base
    from dora_diffusion.outputs import check_places, make_folder, save_png, write_text
    from dora_diffusion.paths import fitting

    width, height = parse_size(size)
    request = CompareRequest(
        prompts=tuple(prompt),
        seeds=whole_numbers(seeds),
        adapters=columns_of([*adapters, *(more or [])], strength, partial),
        negative_prompt=negative_prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        width=width,
        height=height,
        partial=partial,
    )
    for text, seed in request.rows:
        request.picture(text, seed)  # says what cannot be drawn before anything is loaded
    for path in [*adapters, *(more or [])]:
        check_adapter(path)
    check_places(make_folder(out), ["comparison.png", "report.html"], ["pictures"])
    say_cautions(quantise.value if quantise else None)
    loaded = load_base(base, packing=quantise.value if quantise else None)
    cells = []
    for cell in show_cells(draw(loaded, request), request, console):
        column = request.columns[cell.column]
        begin = f"{cell.column}-{cell.row + 1:02d}-{column.path.stem if column.path else 'base'}"
        name = fitting(begin, f"-seed{cell.seed}.png")
        metadata = {"prompt": cell.prompt, "seed": str(cell.seed), "caption": cell.caption, "base": loaded.label}
        save_png(cell.image, out / "pictures" / name, metadata)
        cells.append(cell)
    console.say(printable(save_png(draw_grid(request, cells), out / "comparison.png")))
    if note := grid_note(request):
        console.say((note, "yellow"))
    html = write_report("Side by side", request, cells, base_name=loaded.label)
    console.say(printable(write_text(out / "report.html", html)))
