"""How a base reads prompts, found out without its weights: a pipeline of tokenizers alone."""

from __future__ import annotations

from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging

from dora_diffusion.errors import BaseModelError
from dora_diffusion.models.naming import ASSETS, EMBEDDED
from dora_diffusion.quiet import quieten

__all__ = ["load_tokenizers"]

READ = ("tokenizer", "scheduler")  # beginnings of the parts' names; some pipelines ask their scheduler when made


def load_tokenizers(name: str) -> DiffusionPipeline:
    """The base's pipeline without any model in it: enough for `check_prompt`.

    Raises BaseModelError, also for a single-file checkpoint, which holds no tokenizers.
    """
    path = Path(ASSETS / EMBEDDED[name].folder if name in EMBEDDED else name)
    if path.is_file():
        raise BaseModelError(f"{path} holds no tokenizers: what it reads is known when it is loaded.")
    source = path if path.is_dir() else name
    quieten()
    diffusers_logging.disable_progress_bar()
    try:
        parts = DiffusionPipeline.load_config(source)
        absent = {
            part: None
            for part, kind in parts.items()
            if kind == [None, None] or (isinstance(kind, list) and len(kind) == 2 and not part.startswith(READ))
        }
        return DiffusionPipeline.from_pretrained(source, **absent)
    except Exception as error:  # the libraries' are of many kinds, and loading the base itself will say it better
        raise BaseModelError(f"cannot read the tokenizers of the base {name!r}: {error}") from error
