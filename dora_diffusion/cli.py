"""The command line. Each command reads its options, calls the package and says where the results lie."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from dora_diffusion.errors import ConfigError, DoraDiffusionError
from dora_diffusion.quiet import quieten

if TYPE_CHECKING:
    from dora_diffusion.training.config import TrainConfig

# torch and diffusers are imported inside the commands, so that --help and mistyped options answer at once.

__all__ = ["app", "main"]

app = typer.Typer(
    name="dora-diffusion",
    help="Fine-tune diffusion models with DoRA and LoRA, and compare them on the same prompts and seeds.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
# Under `accelerate launch` only the first process speaks.
console = Console(highlight=False, quiet=os.environ.get("RANK", "0") != "0")
errors = Console(stderr=True, highlight=False)


class KindOption(str, Enum):
    dora = "dora"
    lora = "lora"
    both = "both"


class NormAxisOption(str, Enum):
    output = "output"
    input = "input"


BaseOption = Annotated[
    str, typer.Option("--base", help="emoji or emoji-dit (embedded), a folder, a .safetensors file or a hub id.")
]


class PackingOption(str, Enum):
    nf4 = "nf4"
    int8 = "int8"


QuantiseOption = Annotated[
    PackingOption | None,
    typer.Option("--quantise", help="Pack the base's blocks, for less memory; pictures differ a little."),
]
SeedsOption = Annotated[str, typer.Option("--seeds", help="Whole numbers with commas between: 1,2,3.")]
SizeOption = Annotated[
    str, typer.Option("--size", help="Width x height in pixels, such as 832x1216. Default: the base's.")
]


@app.command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes instead of ten; a rougher style.")] = False,
    out: Annotated[Path, typer.Option("--out", help="Where everything is written.")] = Path("outputs/demo"),
    base: BaseOption = "emoji",
) -> None:
    """Train a LoRA and a DoRA on a sample style and lay them beside the base. Needs no GPU and no network."""
    from dora_diffusion.demo import DEMO, QUICK, next_commands, run_demo

    with _stop_on_ctrl_c() as should_stop:
        made = run_demo(out, QUICK if quick else DEMO, console, should_stop, base_name=base)
    if not made:
        raise typer.Exit(130)
    console.print("\n[bold]Look at[/bold]")
    for path in reversed(made):
        console.print(f"  {path}")
    _say_next(next_commands(out, base))


def _say_next(commands: Iterable[str]) -> None:
    console.print("\n[bold]Try next[/bold]")
    for command in commands:
        console.print(f"  {command}", soft_wrap=True, markup=False, highlight=False)


@app.command()
def train(
    config: Annotated[Path | None, typer.Argument(help="A TOML file; options given beside it win.")] = None,
    images: Annotated[str | None, typer.Option(help="A folder of pictures.")] = None,
    instance_prompt: Annotated[
        str | None,
        typer.Option(help="The caption of pictures that have none, such as 'a photo of sks dog'."),
    ] = None,
    kind: Annotated[KindOption | None, typer.Option(help="both trains twins, alike in all but the kind.")] = None,
    out: Annotated[str | None, typer.Option(help="The folder for the adapters and everything else.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="emoji or emoji-dit (embedded), a folder, a .safetensors file or a hub id."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures in a step.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the low-rank update.")] = None,
    alpha: Annotated[float | None, typer.Option(help="The update is scaled by alpha / rank.")] = None,
    norm_axis: Annotated[
        NormAxisOption | None,
        typer.Option(help="DoRA's norm: output for diffusers and PEFT, input for ComfyUI, Forge, A1111 and InvokeAI."),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: what suits the base.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Side in pixels. Default: the base's.")] = None,
    train_text_encoder: Annotated[bool | None, typer.Option(help="Adapt the text encoder's attention too.")] = None,
    class_prompt: Annotated[
        str | None,
        typer.Option(help="Turns on prior preservation, such as 'a photo of a dog'."),
    ] = None,
    validation_images: Annotated[
        str | None, typer.Option(help="A folder to measure the loss on. Default: some of the images, if there are 8.")
    ] = None,
    preview_prompt: Annotated[list[str] | None, typer.Option(help="Drawn on the way; may be repeated.")] = None,
    seed: Annotated[int | None, typer.Option(help="Same seed, same machine: same bits.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any other key of the configuration; may be repeated."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was stopped.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier run in the folder.")] = False,
) -> None:
    """Train an adapter on a folder of pictures."""
    from dora_diffusion.console import show_training
    from dora_diffusion.training.config import parse_assignments, resolve_config
    from dora_diffusion.training.run import Finished, Stopped
    from dora_diffusion.training.run import train as run_training

    options: dict[str, object] = {
        "images": images,
        "instance_prompt": instance_prompt,
        "kind": kind.value if kind else None,
        "out": out,
        "base": base,
        "steps": steps,
        "batch_size": batch_size,
        "rank": rank,
        "alpha": alpha,
        "norm_axis": norm_axis.value if norm_axis else None,
        "learning_rate": learning_rate,
        "resolution": resolution,
        "train_text_encoder": train_text_encoder,
        "class_prompt": class_prompt,
        "validation_images": validation_images,
        "preview_prompts": preview_prompt or None,
        "seed": seed,
    }
    given = {key: value for key, value in options.items() if value is not None} | parse_assignments(set_ or [])
    resolved = resolve_config(config, given, resume=resume)
    with _stop_on_ctrl_c() as should_stop:
        events = show_training(
            run_training(resolved, resume=resume, overwrite=overwrite, should_stop=should_stop), console
        )
    if any(isinstance(event, Stopped) for event in events):
        raise typer.Exit(130)
    console.print(f"The whole configuration is in {Path(resolved.out) / 'config.toml'}.")
    made = [str(event.path) for event in events if isinstance(event, Finished)]
    if made:
        _say_next(_after_training(resolved, made))


def _after_training(config: TrainConfig, made: list[str]) -> Iterator[str]:
    """The adapters side by side with the base, and what ComfyUI and the others make of the last one."""
    from dora_diffusion.data.folder import first_caption

    prompt = next(iter(config.preview_prompts), None) or first_caption(config.images, config.instance_prompt)
    base = ["--base", config.base]
    out = ["--out", str(Path(config.out) / "compare")]
    yield shlex.join(
        ["dora-diffusion", "compare", "--prompt", prompt, "--seeds", "1,2,3", *base, "--adapters", *made, *out]
    )
    yield shlex.join(["dora-diffusion", "parity", made[-1], *base])


@app.command()
def generate(
    prompt: Annotated[str, typer.Option("--prompt", help="What to draw.")],
    out: Annotated[Path, typer.Option("--out", help="A folder for the pictures.")] = Path("outputs/pictures"),
    adapter: Annotated[list[Path] | None, typer.Option(help="An adapter file; repeat it to add several.")] = None,
    strength: Annotated[list[float] | None, typer.Option(help="One for each adapter; 1 by default.")] = None,
    seeds: SeedsOption = "1",
    base: BaseOption = "emoji",
    negative_prompt: Annotated[str, typer.Option(help="What to keep out.")] = "",
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the base's.")] = None,
    size: SizeOption = "",
    quantise: QuantiseOption = None,
) -> None:
    """Draw pictures, with adapters or without."""
    from dora_diffusion.comparison.request import parse_size
    from dora_diffusion.formats.files import load_adapter
    from dora_diffusion.generation import GenerationRequest
    from dora_diffusion.generation import generate as draw
    from dora_diffusion.models.loading import load_base
    from dora_diffusion.outputs import make_folder, save_png

    strengths = strength or [1.0] * len(adapter or [])
    if len(strengths) != len(adapter or []):
        raise ConfigError(f"{len(adapter or [])} adapters and {len(strengths)} strengths: give one for each.")
    width, height = parse_size(size)
    requests = [
        GenerationRequest(prompt, seed, negative_prompt, steps, guidance, width, height)
        for seed in _whole_numbers(seeds)
    ]
    make_folder(out)
    loaded = load_base(base, packing=quantise.value if quantise else None)
    for path, value in zip(adapter or [], strengths, strict=True):
        console.print(str(load_adapter(loaded.pipe, path, strength=value)))
    for request in requests:
        image = draw(loaded, request)
        metadata = {"prompt": prompt, "seed": str(request.seed), "base": loaded.label}
        console.print(f"{save_png(image, out / f'seed-{request.seed}.png', metadata)}")


# Several files after one --adapters, as the README writes it, is not in typer's grammar: extra arguments are allowed,
# and those that follow the options are further adapter files.
@app.command(context_settings={"allow_interspersed_args": True})
def compare(
    prompt: Annotated[list[str], typer.Option("--prompt", help="What to draw; may be repeated.")],
    adapters: Annotated[list[Path], typer.Option("--adapters", help="Adapter files: --adapters a b, or repeated.")],
    more: Annotated[list[Path] | None, typer.Argument(hidden=True)] = None,
    out: Annotated[Path, typer.Option("--out", help="A folder for the grid and the report.")] = Path("outputs/compare"),
    seeds: SeedsOption = "1",
    strength: Annotated[list[float] | None, typer.Option(help="One for each adapter; 1 by default.")] = None,
    base: BaseOption = "emoji",
    negative_prompt: Annotated[str, typer.Option(help="What to keep out.")] = "",
    steps: Annotated[int, typer.Option(help="Denoising steps.")] = 25,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale. Default: the base's.")] = None,
    size: SizeOption = "",
    quantise: QuantiseOption = None,
) -> None:
    """Draw the base and each adapter side by side, on the same prompts and seeds."""
    from dora_diffusion.comparison.compare import CompareRequest, columns_of
    from dora_diffusion.comparison.compare import compare as draw
    from dora_diffusion.comparison.grid import draw_grid
    from dora_diffusion.comparison.report import write_report
    from dora_diffusion.comparison.request import parse_size
    from dora_diffusion.console import show_cells
    from dora_diffusion.models.loading import load_base
    from dora_diffusion.outputs import make_folder, save_png, write_text

    width, height = parse_size(size)
    request = CompareRequest(
        prompts=tuple(prompt),
        seeds=_whole_numbers(seeds),
        adapters=columns_of([*adapters, *(more or [])], strength),
        negative_prompt=negative_prompt,
        num_inference_steps=steps,
        guidance_scale=guidance,
        width=width,
        height=height,
    )
    make_folder(out)
    loaded = load_base(base, packing=quantise.value if quantise else None)
    cells = []
    for cell in show_cells(draw(loaded, request), request, console):
        column = request.columns[cell.column]
        name = f"{cell.row + 1:02d}-{column.path.stem if column.path else 'base'}-seed{cell.seed}.png"
        metadata = {"prompt": cell.prompt, "seed": str(cell.seed), "caption": cell.caption, "base": loaded.label}
        save_png(cell.image, out / "pictures" / f"{cell.column}-{name}", metadata)
        cells.append(cell)
    console.print(str(save_png(draw_grid(request, cells), out / "comparison.png")))
    html = write_report("Side by side", request, cells, base_name=loaded.label)
    console.print(str(write_text(out / "report.html", html)))


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
    from dora_diffusion.models.loading import load_base
    from dora_diffusion.outputs import save_png

    if plot is not None and base is None:
        raise ConfigError("--plot shows what changed in the base: give it with --base.")
    looks = look.look_at(files, load_base(base) if base is not None else None)
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
    loaded = load_base(base)
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
        base=load_base(base) if base else None,
        dtype=dtype.value if dtype else None,
        rank=rank,
        alpha=alpha,
    )
    for line in made.report():
        console.print(line, soft_wrap=True)


@app.command(name="app")
def web_app(
    base: BaseOption = "emoji",
    quantise: QuantiseOption = None,
    outputs: Annotated[Path, typer.Option(help="Where runs and pictures are kept.")] = Path("outputs"),
    port: Annotated[int, typer.Option(help="The port to listen at.")] = 7860,
    host: Annotated[str | None, typer.Option(help="Another address to listen at; needs --auth.")] = None,
    auth: Annotated[str | None, typer.Option(help="USER:PASSWORD for everybody who opens it.")] = None,
    mcp: Annotated[bool, typer.Option("--mcp", help="Offer compare and train as tools to MCP clients too.")] = False,
) -> None:
    """Open the web app, on this machine only unless --host and --auth say otherwise."""
    from dora_diffusion.webapp.folders import keep_inside

    keep_inside(outputs)
    from dora_diffusion.webapp.app import launch

    launch(
        base=base,
        packing=quantise.value if quantise else None,
        outputs=outputs,
        host=host,
        port=port,
        auth=auth,
        mcp=mcp,
    )


def _whole_numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"seeds is {text!r}; give whole numbers with commas between, such as 1,2,3.") from error


@contextmanager
def _stop_on_ctrl_c() -> Iterator[Callable[[], bool]]:
    """Ctrl-C once asks the run to stop after its step, with a checkpoint; twice ends it at once."""
    asked = False

    def ask(_signal: int, _frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        errors.print("\n[yellow]stopping after this step; Ctrl-C again ends at once[/yellow]")

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)


def _show_warning(message: Warning | str, category: type[Warning], *_rest: object, **_more: object) -> None:
    if category is UserWarning:
        errors.print(f"[yellow]note:[/yellow] {message}", soft_wrap=True)


def main() -> None:
    """The entry point: a user's mistake is a message and status 1, never a traceback."""
    quieten()
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        app()  # typer shows its own errors, about options, and exits
    except DoraDiffusionError as error:
        errors.print("[red]error:[/red] ", end="")
        errors.print(str(error), markup=False, soft_wrap=True)
        sys.exit(1)
