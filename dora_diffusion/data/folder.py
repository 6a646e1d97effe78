"""A folder of pictures to train on: find them, check them, caption them.

Captions come from a sidecar text file (cat.png and cat.txt), else from metadata.jsonl in the folder (lines with
"file_name" and "text"), else from the instance prompt.
"""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from dora_diffusion.errors import DataError
from dora_diffusion.paths import obstacle

__all__ = ["ImageFolder", "TrainingImage", "first_caption", "list_pictures", "open_image", "read_folder"]

HEIF = {".heic", ".heif"}  # photographs as telephones save them
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", *HEIF}
MAX_PIXELS = 100_000_000  # larger ones are refused before they are decoded: a small file can claim any size
MENTIONED = 8


def _learn_heif() -> bool:
    """Let Pillow read HEIC by the package of the extra `heic`, or by its larger sister, where one is installed."""
    for package in ("pi_heif", "pillow_heif"):
        if find_spec(package) is not None:
            import_module(package).register_heif_opener()
            return True
    return False


READS_HEIF = _learn_heif()


@dataclass(frozen=True)
class TrainingImage:
    path: Path
    caption: str


@dataclass(frozen=True)
class ImageFolder:
    """The pictures of a folder, sorted by name, and the files in it that were passed over."""

    path: Path
    images: tuple[TrainingImage, ...]
    ignored: tuple[str, ...]


def read_folder(path: str | os.PathLike[str], instance_prompt: str | None = None, *, smallest: int = 16) -> ImageFolder:
    """Read a folder of pictures and captions; all pictures are decoded once to find broken ones now.

    `smallest` is the shortest side in pixels that is still useful. Raises DataError, which lists every bad file.
    """
    folder = Path(path)
    pictures = list_pictures(folder)
    problems = [f"{p.name}: {reason}" for p in pictures if (reason := _problem(p, smallest))]
    if problems:
        more = f"\n  and {len(problems) - MENTIONED} more" if len(problems) > MENTIONED else ""
        raise DataError(
            f"{len(problems)} of {len(pictures)} pictures in {folder} cannot be used:\n  "
            + "\n  ".join(problems[:MENTIONED])
            + more
            + "\nReplace them or move them out of the folder, then start again."
        )
    captions = _captions(folder, pictures)
    missing = [p.name for p in pictures if p not in captions]
    if missing and not (instance_prompt or "").strip():
        raise DataError(
            f"{len(missing)} pictures in {folder} have no caption ({', '.join(missing[:3])}…): give an instance prompt "
            "(--instance-prompt 'a photo of sks dog'), or a text file beside each picture."
        )
    used = {*pictures, *(p.with_suffix(".txt") for p in pictures), folder / "metadata.jsonl"}
    images = tuple(TrainingImage(p, captions.get(p, instance_prompt or "")) for p in pictures)
    passed_over = (p for p in sorted(folder.iterdir()) if p not in used and not p.name.startswith("."))
    return ImageFolder(folder, images, tuple(p.name + "/" * p.is_dir() for p in passed_over))


def first_caption(path: str | os.PathLike[str], instance_prompt: str | None = None) -> str:
    """What the folder's first picture is trained with; no picture is opened. Raises DataError."""
    pictures = list_pictures(path)
    return _captions(Path(path), pictures).get(pictures[0], instance_prompt or "")


def list_pictures(path: str | os.PathLike[str]) -> list[Path]:
    """The picture files of a folder by name, not opened yet. Raises DataError when there are none."""
    folder = Path(path)
    if reason := obstacle(folder):
        raise DataError(f"no pictures at {folder}: it {reason}.")
    if not folder.exists():
        raise DataError(f"no folder at {folder}. Check the path given as images.")
    if not folder.is_dir():
        raise DataError(f"{folder} is a file; images must be a folder of pictures.")
    files = sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith("."))
    pictures = [p for p in files if _is_picture(p)]
    if not pictures:
        found = f" It holds {len(files)} other files ({', '.join(p.name for p in files[:3])})." if files else ""
        if within := [p for p in sorted(folder.iterdir()) if p.is_dir() and any(map(_is_picture, p.iterdir()))]:
            raise DataError(
                f"{folder} has no pictures itself, but its subfolders have ({', '.join(p.name for p in within[:3])}): "
                f"give one of these, such as {within[0]}, or put the pictures into one folder."
            )
        raise DataError(f"{folder} has no pictures.{found} Put in some of: {', '.join(sorted(SUFFIXES))}.")
    return pictures


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def open_image(path: Path) -> Image.Image:
    """The picture upright and opaque, as RGB: rotated as its EXIF says, transparency laid on white."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the size was checked against MAX_PIXELS
        with Image.open(path) as file:
            image = ImageOps.exif_transpose(file)
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                return Image.alpha_composite(white, image).convert("RGB")
            return image.convert("RGB")


def _problem(path: Path, smallest: int) -> str | None:
    """What is wrong with this picture, in words, or None."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path) as file:
                width, height = file.size
        if width * height > MAX_PIXELS:
            return f"{width} x {height} is more than {MAX_PIXELS // 1_000_000} million pixels; make it smaller"
        if min(width, height) < smallest:
            return f"{width} x {height} is too small; the shorter side must have at least {smallest} pixels"
        open_image(path)
    except Image.DecompressionBombError:
        return f"claims more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000} million pixels; make it smaller"
    except UnidentifiedImageError:
        if path.suffix.lower() in HEIF and not READS_HEIF:
            return "is a HEIC photograph, which needs one more package: pip install 'dora-diffusion[heic]'"
        return "is no picture, or of a kind that cannot be read"
    except PermissionError:
        return "may not be read; check its permissions"
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        return f"is damaged ({error})"
    return None


def _captions(folder: Path, pictures: list[Path]) -> dict[Path, str]:
    captions = _metadata_captions(folder, pictures)
    for picture in pictures:
        sidecar = picture.with_suffix(".txt")
        if sidecar.is_file():
            text = _read_text(sidecar).strip()
            if not text:
                raise DataError(f"{sidecar} is empty: write the caption into it, or delete it.")
            captions[picture] = text
    return captions


def _metadata_captions(folder: Path, pictures: list[Path]) -> dict[Path, str]:
    path = folder / "metadata.jsonl"
    if not path.is_file():
        return {}
    captions = {}
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(
                f'{path}, line {number}: {line[:60]!r} is not like {{"file_name": "cat.png", "text": "a cat"}} '
                f"({type(error).__name__}: {error})."
            ) from error
        if folder / str(name) not in pictures:
            raise DataError(f"{path}, line {number}: there is no picture {name!r} in {folder}.")
        captions[folder / str(name)] = str(text).strip()
    return captions


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}): "
            "save it again with UTF-8 encoding."
        ) from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}.") from error
