"""What a base is called: an embedded one, a folder, a file or a hub id; known without the libraries that load it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub.utils import HFValidationError, validate_repo_id

from dora_diffusion.errors import BaseModelError
from dora_diffusion.paths import given_path, obstacle

__all__ = ["ASSETS", "EMBEDDED", "Embedded", "find_base", "is_hub_id"]

ASSETS = Path(__file__).resolve().parent.parent / "assets"


@dataclass(frozen=True)
class Embedded:
    """A base that comes with the package, and what works well on it."""

    folder: str
    guidance_scale: float
    learning_rate: float


EMBEDDED = {
    "emoji": Embedded("emoji", guidance_scale=5.0, learning_rate=2e-4),
    "emoji-dit": Embedded("emoji-dit", guidance_scale=5.0, learning_rate=3e-4),
}


def find_base(name: str) -> str:
    """The name with ~ expanded, of an embedded base, a file, a folder, or what may be a hub id; nothing is loaded.

    Raises BaseModelError, and ConfigError for a path that cannot be one.
    """
    if not name.strip():
        raise BaseModelError(f"no base model is named. Embedded bases: {', '.join(EMBEDDED)}.")
    if name in EMBEDDED:
        return name
    name = given_path(name)
    path = Path(name)
    if reason := obstacle(path):
        raise BaseModelError(f"no base model at {name!r}: it {reason}.")
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise BaseModelError(
            f"{path} is no base model: it has no model_index.json. Give the folder that a diffusers pipeline "
            "was saved in, a .safetensors checkpoint, a hub id such as "
            "'stable-diffusion-v1-5/stable-diffusion-v1-5', or 'emoji'."
        )
    if not path.exists() and not is_hub_id(name):
        raise BaseModelError(
            f"no base model at {name!r}: no such file or folder, and no hub id (those look like 'owner/name'). "
            f"Embedded bases: {', '.join(EMBEDDED)}."
        )
    return name


def is_hub_id(name: str) -> bool:
    """Whether the name could be one of the hub's: owner/name, of the characters that it allows."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1
