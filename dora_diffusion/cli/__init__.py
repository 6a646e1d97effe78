"""The command line. Each command reads its options, calls the package and says where the results lie.

torch and diffusers are imported inside the commands, so that --help and mistyped options answer at once.
"""

from __future__ import annotations

import sys
import warnings

# In the order in which --help shows the commands:
# isort: off
from dora_diffusion.cli import training, drawing, files, web  # noqa: F401

# isort: on
from dora_diffusion.cli.terminal import app, errors
from dora_diffusion.errors import DoraDiffusionError
from dora_diffusion.quiet import quieten

__all__ = ["app", "main"]


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
