"""What a file is that is no safetensors, told from how it begins; it is never opened as what it says it is."""

from __future__ import annotations

import zipfile
from pathlib import Path

__all__ = ["what_it_is"]

PICKLE = (
    "is a pickle, which can run any code when it is opened, so it is never loaded here. Get the .safetensors version "
    "of it, or convert it in a sandbox you trust."
)
_UNPACK = "Unpack it, and give the .safetensors in it."
_PICTURE = "is a picture, no adapter. Give the .safetensors file."
_STARTS: dict[bytes, str] = {
    b"GGUF": "is a GGUF file, as llama.cpp and ComfyUI-GGUF read it. Get the .safetensors version of it.",
    b"version https://git-lfs": "is a git-lfs pointer, a note in place of the file. Run git lfs pull in its folder, or "
    "download the file from its page.",
    b"\x1f\x8b": f"is a gzip archive. {_UNPACK}",
    b"7z\xbc\xaf": f"is a 7-Zip archive. {_UNPACK}",
    b"Rar!": f"is a RAR archive. {_UNPACK}",
    b"\x89PNG": _PICTURE,
    b"\xff\xd8\xff": _PICTURE,
    b"\x89HDF": "is an HDF5 file, as Keras writes it. Get the .safetensors version of it.",
}


def what_it_is(path: Path) -> str:
    """What the file is and the way out, as the rest of a sentence; empty for one that may have been a safetensors."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError:
        return ""
    if start.startswith(b"PK\x03\x04"):
        return _of_zip(path)
    if known := next((said for begins, said in _STARTS.items() if start.startswith(begins)), ""):
        return known
    # A safetensors file begins with its header's length, and a brace after it.
    if start[8:9] == b"{":
        return ""
    if start[:1] == b"\x80" and start[1:2] <= b"\x05":
        return PICKLE
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page, not the file: the download got the page, or one that asks to log in. Download it again."
    if start.lstrip().startswith(b"{") and start.isascii():
        return "is a JSON text, as a server sends for an error, or a configuration. Give the .safetensors file."
    return ""


def _of_zip(path: Path) -> str:
    """torch.save writes a zip with a pickle in it; any other is an archive, whose names alone are read."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return "is a zip, or a pickle of torch.save, which is cut short. Get it again, as .safetensors."
    if any(name.endswith("data.pkl") for name in names):
        return PICKLE
    inside = [name for name in names if name.endswith(".safetensors")]
    found = f" It holds {', '.join(inside[:3])}." if inside else ""
    return f"is a zip archive.{found} {_UNPACK}"
