"""Where an adapter file is: a path, a folder as PEFT or diffusers saves it, or a repository on the hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

from dora_diffusion.errors import AdapterFileError
from dora_diffusion.paths import obstacle

__all__ = ["find_file"]

PEFT_WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
USUAL_NAMES = ("pytorch_lora_weights.safetensors", PEFT_WEIGHTS)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(?<!\.safetensors)(/(?!.*\.\.)[^\\]+\.safetensors)?")


def find_file(path: str | os.PathLike[str]) -> tuple[Path, str | None]:
    """The adapter's file, and the text of PEFT's adapter_config.json if it is beside it. Raises AdapterFileError."""
    found = Path(path)
    if reason := obstacle(found):
        raise AdapterFileError(f"no adapter file at {found}: it {reason}.")
    if not found.exists() and isinstance(path, str) and _HUB_ID.fullmatch(path) and not found.parent.exists():
        found = _from_hub(path)
    if found.is_dir() and (found / PEFT_WEIGHTS).is_file():
        found = found / PEFT_WEIGHTS
    config = found.with_name(PEFT_CONFIG)
    if found.name != PEFT_WEIGHTS or not config.is_file():
        return found, None
    try:
        return found, config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterFileError(f"{config} cannot be read ({error}). Download or save the folder again.") from error


def _from_hub(name: str) -> Path:
    """The one adapter file of a repository, or the one that is named: "owner/name", "owner/name/file.safetensors"."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner, repository, *inside = name.split("/", 2)
    wanted = inside or ["*.safetensors", PEFT_CONFIG]
    try:
        folder = Path(snapshot_download(f"{owner}/{repository}", allow_patterns=wanted))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AdapterFileError(
            f"no adapter file at {name}, and none got from the hub by that name: {reason} "
            "Check the path or the name, and the connection."
        ) from error
    if inside:
        return folder / inside[0]
    files = sorted(folder.glob("*.safetensors"))
    usual = [file for file in files if file.name in USUAL_NAMES] or files
    if len(usual) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise AdapterFileError(
            f"{name} on the hub has {len(files)} adapter files ({names}). Name one of them: {name}/NAME.safetensors"
        )
    return usual[0]
