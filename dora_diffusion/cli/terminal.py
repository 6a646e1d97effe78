"""What all commands share: the application, the two streams, and options that several of them take."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from dora_diffusion.errors import ConfigError
from dora_diffusion.models.quantising import Packing
from dora_diffusion.paths import given_path
from dora_diffusion.screen import Screen
from dora_diffusion.stopping import StopRequest, say_no_more, stop_request

__all__ = [
    "BaseOption",
    "QuantiseOption",
    "SeedsOption",
    "SizeOption",
    "app",
    "command",
    "console",
    "errors",
    "path_argument",
    "path_option",
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
console = Screen(quiet=os.environ.get("RANK", "0") != "0")
errors = Screen(stderr=True)

BaseOption = Annotated[
    str, typer.Option("--base", help="emoji or emoji-dit (embedded), a folder, a .safetensors file or a hub id.")
]


Function = TypeVar("Function", bound=Callable[..., None])


def command(name: str | None = None) -> Callable[[Function], Function]:
    """Register a command of `app`; its values are checked for what no command could use, whatever it is."""

    def register(function: Function) -> Function:
        @functools.wraps(function)
        def checked(**values: object) -> None:
            for key, value in values.items():
                for one in value if isinstance(value, list) else [value]:
                    _check(f"--{key.strip('_').replace('_', '-')}", one)
            function(**values)

        app.command(name=name)(checked)
        return function

    return register


def _check(option: str, value: object) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{option} is {value}; give a finite number.")
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{option} is {str(value)[:30]}..., which is too large a number.")
    if isinstance(value, str) and any("\ud800" <= c <= "\udfff" for c in value):
        raise ConfigError(f"{option} {value[:60]!r} is no UTF-8 text. Type it in a terminal that writes UTF-8.")


def _parsed(text: str | Path) -> Path:
    try:
        return Path(given_path(text))
    except ConfigError as error:
        raise typer.BadParameter(str(error)) from error


def path_option(*names: str, help: str) -> Any:
    """An option that takes a file or folder: ~ is expanded, and a name that nothing can have is refused."""
    return typer.Option(*names, help=help, parser=_parsed, metavar="PATH")


def path_argument(*, help: str, metavar: str = "PATH", hidden: bool = False) -> Any:
    """The same without a name of its own."""
    return typer.Argument(help=help, parser=_parsed, metavar=metavar, hidden=hidden)


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
    console.say("\n", ("Try next", "bold"))
    for line in commands:
        console.say(f"  {line}")


def say_cautions(packing: Packing | None) -> None:
    """What a packed base costs on this machine, before it is loaded."""
    if packing is None:
        return
    from dora_diffusion.models.cautions import cautions
    from dora_diffusion.models.loading import pick_device

    for caution in cautions(pick_device(), packing):
        errors.say(("note: ", "yellow"), caution)


def whole_numbers(text: str) -> tuple[int, ...]:
    """`1,2,3`. Raises ConfigError."""
    try:
        numbers = tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        numbers = ()
    if not numbers:
        raise ConfigError(f"seeds is {text[:60]!r}; give whole numbers with commas between, such as 1,2,3.")
    return numbers


@contextmanager
def stop_when_asked() -> Iterator[StopRequest]:
    """Ctrl-C, SIGTERM or SIGHUP asks the run to stop after its step, with a checkpoint; again ends it at once."""

    def say(_number: int) -> None:
        try:
            errors.say(("\nstopping after this step; Ctrl-C again ends at once", "yellow"))
        except OSError:
            say_no_more(errors)

    with stop_request(say) as request:
        yield request
