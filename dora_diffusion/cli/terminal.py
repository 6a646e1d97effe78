"""What all commands share: the application, the two streams, and options that several of them take."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Annotated

import typer
from rich.console import Console

from dora_diffusion.errors import ConfigError
from dora_diffusion.models.quantising import Packing
from dora_diffusion.stopping import StopRequest, say_no_more, stop_request

__all__ = [
    "BaseOption",
    "QuantiseOption",
    "SeedsOption",
    "SizeOption",
    "app",
    "console",
    "errors",
    "say_cautions",
    "say_next",
    "stop_when_asked",
    "whole_numbers",
]

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


def say_next(commands: Iterable[str]) -> None:
    """Commands that go on from here."""
    console.print("\n[bold]Try next[/bold]")
    for command in commands:
        console.print(f"  {command}", soft_wrap=True, markup=False, highlight=False)


def say_cautions(packing: Packing | None) -> None:
    """What a packed base costs on this machine, before it is loaded."""
    if packing is None:
        return
    from dora_diffusion.models.cautions import cautions
    from dora_diffusion.models.loading import pick_device

    for caution in cautions(pick_device(), packing):
        errors.print(f"[yellow]note:[/yellow] {caution}", soft_wrap=True)


def whole_numbers(text: str) -> tuple[int, ...]:
    """`1,2,3`. Raises ConfigError."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError as error:
        raise ConfigError(f"seeds is {text!r}; give whole numbers with commas between, such as 1,2,3.") from error


@contextmanager
def stop_when_asked() -> Iterator[StopRequest]:
    """Ctrl-C, SIGTERM or SIGHUP asks the run to stop after its step, with a checkpoint; again ends it at once."""

    def say(_number: int) -> None:
        try:
            errors.print("\n[yellow]stopping after this step; Ctrl-C again ends at once[/yellow]")
        except OSError:
            say_no_more(errors)

    with stop_request(say) as request:
        yield request
