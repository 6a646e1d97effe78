"""Safetensors on disk: written whole or not at all, the same bytes each time; never unpickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from dora_diffusion.errors import AdapterFileError, OutputError, nearest
from dora_diffusion.formats.sniffing import what_it_is
from dora_diffusion.outputs import whole_file
from dora_diffusion.paths import obstacle

__all__ = ["Header", "read_header", "read_safetensors", "write_safetensors"]

# The largest adapter's header has some hundred thousand characters; a tag list of a training folder may add megabytes.
MAX_HEADER = 32 * 2**20


@dataclass(frozen=True)
class Header:
    """What a safetensors file says before its numbers: its metadata, and the dtype and shape of each tensor."""

    metadata: dict[str, str]
    tensors: dict[str, tuple[str, tuple[int, ...]]]


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
    """Tensors and metadata of a safetensors file; nothing is ever unpickled. Raises AdapterFileError."""
    header = read_header(path, what)
    try:
        # Not safe_open: in safetensors 0.8 each get_tensor keeps some memory for good, 60 KB for a small adapter.
        tensors = load(path.read_bytes())
        return {key: tensors[key] for key in header.tensors}, header.metadata
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise _unsound(path, error) from error


def read_header(path: Path, what: str = "adapter") -> Header:
    """The header alone, checked before anything else of the file is touched. Raises AdapterFileError."""
    _look(path, what)
    try:
        with path.open("rb") as file:
            start = file.read(8)
            size = int.from_bytes(start, "little")
            there = path.stat().st_size - 8
            if len(start) < 8 or size > there:
                raise ValueError(f"its header should have {size:,} bytes, and {max(there, 0):,} are there")
            if size > MAX_HEADER:
                raise ValueError(f"its header has {size:,} bytes; no adapter needs more than {MAX_HEADER:,}")
            entries = json.loads(file.read(size), object_pairs_hook=_without_duplicates)
        return _parse(entries)
    except (OSError, ValueError, RecursionError) as error:
        raise _unsound(path, error) from error


def _parse(entries: object) -> Header:
    if not isinstance(entries, dict):
        raise ValueError("its header is no table")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its metadata is no table of texts")
    tensors = {}
    for name, entry in entries.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        shape = entry.get("shape") if isinstance(entry, dict) else None
        if not isinstance(dtype, str) or not isinstance(shape, list) or not all(type(n) is int for n in shape):
            raise ValueError(f"its header does not say what {name!r} is")
        tensors[name] = (dtype, tuple(shape))
    return Header(metadata, tensors)


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"its header has {next(n for n in names if names.count(n) > 1)!r} twice")
    return table


def _look(path: Path, what: str) -> None:
    if reason := obstacle(path):
        raise AdapterFileError(f"no {what} file at {path}: it {reason}.")
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.safetensors"))
        hint = f" Did you mean {path / inside[0]}?" if inside else ""
        raise AdapterFileError(f"{path} is a folder, not an {what} file.{hint}")
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.safetensors")]) if path.parent.is_dir() else []
        hint = f" Near names there: {', '.join(near)}." if near else " Check the path."
        raise AdapterFileError(f"no {what} file at {path}.{hint}")


def _unsound(path: Path, error: Exception) -> AdapterFileError:
    if known := what_it_is(path):
        return AdapterFileError(f"{path} {known}")
    return AdapterFileError(
        f"{path} is no sound safetensors file ({error}). It is damaged or cut short: download or train it again."
    )
