"""Safetensors on disk: written whole or not at all, the same bytes each time; never unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dora_diffusion.errors import AdapterFileError, OutputError, nearest
from dora_diffusion.outputs import whole_file

__all__ = ["read_safetensors", "write_safetensors"]

PICKLES = (b"\x80", b"PK")  # how a bare pickle and torch.save's zip begin; a sound safetensors file may, too


def write_safetensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> Path:
    """Write whole or not at all: into a temporary file beside it, then renamed. Raises OutputError.

    The same tensors and header give the same bytes.
    """
    contiguous = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
    with whole_file(path) as temporary:
        try:
            save_file(contiguous, temporary, metadata=dict(metadata))
        except SafetensorError as error:  # what safetensors makes of a full disk
            raise OutputError(f"cannot write {path}: {error}. Choose a place with room left.") from error
        _sort_header(temporary)
    return path


def _sort_header(path: Path) -> None:
    """safetensors writes the header's entries in an order that changes from call to call."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "both write JSON without spaces"
        file.seek(8)
        file.write(text.ljust(size))


def read_safetensors(path: Path, what: str = "adapter") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file; nothing is ever unpickled. Raises AdapterFileError."""
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.safetensors"))
        hint = f" Did you mean {path / inside[0]}?" if inside else ""
        raise AdapterFileError(f"{path} is a folder, not an {what} file.{hint}")
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.safetensors")]) if path.parent.is_dir() else []
        hint = f" Near names there: {', '.join(near)}." if near else " Check the path."
        raise AdapterFileError(f"no {what} file at {path}.{hint}")
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dict)
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        if _first_bytes(path).startswith(PICKLES):
            raise AdapterFileError(
                f"{path} is a pickle, which can run any code when it is opened, so it is never loaded here. "
                "Get the .safetensors version of it, or convert it in a sandbox you trust."
            ) from error
        raise AdapterFileError(
            f"{path} is no sound safetensors file ({error}). It is damaged or cut short: download or train it again."
        ) from error


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(4)
    except OSError:
        return b""
