"""`demo` and `train`."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dora_diffusion.cli.terminal import (
    BaseOption,
    command,
    console,
    path_argument,
    path_option,
    say_next,
    stop_when_asked,
)
from dora_diffusion.paths import operand
from dora_diffusion.screen import printable, shell_line

if TYPE_CHECKING:
    from dora_diffusion.training.config import TrainConfig


class KindOption(str, Enum):
    dora = "dora"
    lora = "lora"
    both = "both"


class ParametrisationOption(str, Enum):
    lora = "lora"
    lokr = "lokr"
    loha = "loha"


class NormAxisOption(str, Enum):
    output = "output"
    input = "input"


@command()
def demo(
    quick: Annotated[bool, typer.Option("--quick", help="Two minutes instead of ten; a rougher style.")] = False,
    out: Annotated[Path, path_option("--out", help="Where everything is written.")] = Path("outputs/demo"),
    base: BaseOption = "emoji",
) -> None:
    """Train a LoRA and a DoRA on a sample style and lay them beside the base. Needs no GPU and no network."""
    from dora_diffusion.demo import DEMO, QUICK, next_commands, run_demo

    with stop_when_asked() as should_stop:
        made = run_demo(out, QUICK if quick else DEMO, console, should_stop, base_name=base)
    if not made:
        console.say("Go on with the same command.")
        raise typer.Exit(should_stop.exit_code)
    console.say("\n", ("Look at", "bold"))
    for path in reversed(made):
        console.say(f"  {printable(path)}")
    say_next(next_commands(out, base))


@command()
def train(
    config: Annotated[Path | None, path_argument(help="A TOML file; options given beside it win.")] = None,
    images: Annotated[str | None, typer.Option(help="A folder of pictures.")] = None,
    instance_prompt: Annotated[
        str | None,
        typer.Option(help="The caption of pictures that have none, such as 'a photo of sks dog'."),
    ] = None,
    kind: Annotated[KindOption | None, typer.Option(help="both trains twins, alike in all but the kind.")] = None,
    parametrisation: Annotated[
        ParametrisationOption | None,
        typer.Option(help="What the update is made of: lora, lokr (with --kind dora a DoKR) or loha."),
    ] = None,
    out: Annotated[str | None, typer.Option(help="The folder for the adapters and everything else.")] = None,
    base: Annotated[
        str | None,
        typer.Option(help="emoji or emoji-dit (embedded), a folder, a .safetensors file or a hub id."),
    ] = None,
    start_from: Annotated[
        str | None, typer.Option(help="An adapter to train on, or the folder of a run; a LoRA may go on as a DoRA.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Pictures in a step.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the low-rank update.")] = None,
    factor: Annotated[int | None, typer.Option(help="LoKr's, as LyCORIS has it; -1: as square as can be.")] = None,
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
    from dora_diffusion.data.folder import first_caption
    from dora_diffusion.training.config import parse_assignments, resolve_config
    from dora_diffusion.training.events import Finished, Settled, Stopped
    from dora_diffusion.training.run import train as run_training

    options: dict[str, object] = {
        "images": images,
        "instance_prompt": instance_prompt,
        "kind": kind.value if kind else None,
        "parametrisation": parametrisation.value if parametrisation else None,
        "out": out,
        "base": base,
        "start_from": start_from,
        "steps": steps,
        "batch_size": batch_size,
        "rank": rank,
        "factor": factor,
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
    # Now, for afterwards the folder may have gone.
    prompt = next(iter(resolved.preview_prompts), None) or first_caption(resolved.images, resolved.instance_prompt)
    with stop_when_asked() as should_stop:
        events = show_training(
            run_training(resolved, resume=resume, overwrite=overwrite, should_stop=should_stop), console
        )
    if any(isinstance(event, Stopped) for event in events):
        console.say("Go on with the same command and --resume.")
        raise typer.Exit(should_stop.exit_code)
    console.say(f"The whole configuration is in {Path(resolved.out) / 'config.toml'}.")
    made = [operand(event.path) for event in events if isinstance(event, Finished)]
    if made:
        settled = next((event.config for event in events if isinstance(event, Settled)), resolved)  # as start_from is
        say_next(_after_training(settled, prompt, made))


def _after_training(config: TrainConfig, prompt: str, made: list[str]) -> Iterator[str]:
    """The adapters side by side with the base, and what ComfyUI and the others make of the last one."""
    base = ["--base", config.base]
    out = ["--out", str(Path(config.out) / "compare")]
    yield shell_line(
        ["dora-diffusion", "compare", "--prompt", prompt, "--seeds", "1,2,3", *base, "--adapters", *made, *out]
    )
    yield shell_line(["dora-diffusion", "parity", made[-1], *base])
