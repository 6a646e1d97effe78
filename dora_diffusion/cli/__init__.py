"""The command line. Each command reads its options, calls the package and says where the results lie.

torch and diffusers are imported inside the commands, so that --help and mistyped options answer at once.
"""

from __future__ import annotations

import os
import sys
import warnings

# In the order in which --help shows the commands:
# isort: off
from dora_diffusion.cli import training, drawing, files, web, encodings  # noqa: F401

# isort: on
from dora_diffusion.cli.terminal import app, errors
from dora_diffusion.errors import DoraDiffusionError
from dora_diffusion.quiet import quieten
from dora_diffusion.screen import encode_anything

__all__ = ["app", "main"]


def _show_warning(message: Warning | str, category: type[Warning], *_rest: object, **_more: object) -> None:
    if category is UserWarning:
        errors.say(("note: ", "yellow"), str(message))


def main() -> None:
    """The entry point: a user's mistake is a message and status 1, never a traceback."""
    quieten()
    encode_anything()
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        app()  # typer shows its own errors, about options, and exits
    except DoraDiffusionError as error:
        errors.say(("error: ", "red"), str(error))
        sys.exit(1)
    except BrokenPipeError:  # whoever read our lines has gone: `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:  # what the machine refuses and nothing above has foreseen
        where = f"{error.filename}: " if error.filename else ""
        errors.say(("error: ", "red"), f"{where}{error.strerror or error}. Check the path and its permissions.")
        sys.exit(1)
