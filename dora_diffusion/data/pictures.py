"""Any picture file to the RGB that a person sees: the one reader of all pictures that come from outside.

Upright as EXIF says, in sRGB as the colour profile says (colours.py), what is transparent laid on white, and of several
frames the first. Greys of more than 8 bits are scaled by their range: 16 and 12 bits by all that they can count,
floating point from 0 to 1, and whole numbers of 32 bits as 16, where they use more than 8 and no more than 16; other
numbers do not say what white is, and are refused.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from dora_diffusion.data.code_points import CodePoints, code_points
from dora_diffusion.data.colours import HDR, UNSAID, Primaries, from_code_points, primaries_of, to_srgb
from dora_diffusion.errors import DataError

__all__ = ["SUFFIXES", "Picture", "is_picture", "open_image", "read_picture", "trouble_with"]

HEIF = {".heic", ".heif", ".hif"}  # photographs as telephones and cameras save them
JPEG = {".jpg", ".jpeg", ".jpe", ".jfif"}  # the last as browsers on Windows save them
SUFFIXES = {".png", *JPEG, ".jp2", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff", *HEIF}
# Whatever a file is called, no other of Pillow's readers is let near it: that of EPS runs a program.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "BMP", "DIB", "GIF", "TIFF", "HEIF", "JPEG2000")
MAX_PIXELS = 100_000_000  # larger ones are refused before they are decoded: a small file can claim any size
STRAIGHT = {"La": "LA", "RGBa": "RGBA"}  # colours that were multiplied by their opacity, and those that were not
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _learn_heif() -> bool:
    """Let Pillow read HEIC by the package of the extra `heic`, or by its larger sister, where one is installed."""
    for package in ("pi_heif", "pillow_heif"):
        if find_spec(package) is not None:
            import_module(package).register_heif_opener()
            return True
    return False


READS_HEIF = _learn_heif()


@dataclass(frozen=True)
class Picture:
    """A picture in RGB, upright and opaque, and what of its file was not used or taken on trust."""

    image: Image.Image
    notes: tuple[str, ...] = ()


class _Unusable(Exception):
    """Why a picture cannot be used; the words go on from its name."""


def open_image(path: Path) -> Image.Image:
    """The picture as a person sees it. Raises DataError, which names the file."""
    return read_picture(path).image


def read_picture(path: Path, *, smallest: int = 1, about: int | None = None) -> Picture:
    """The picture as a person sees it, with what is to be said of it.

    `smallest` is the shortest side in pixels that is useful; where a picture of `about` so many pixels a side is
    enough, a JPEG is decoded quicker. Raises DataError, which names the file.
    """
    try:
        return _read(path, smallest, about)
    except _Unusable as reason:
        raise DataError(f"the picture {path} {reason}.") from reason


def trouble_with(path: Path, smallest: int = 1) -> tuple[str, tuple[str, ...]]:
    """Why the picture cannot be used, as words that go on from its name, or ""; and its notes."""
    try:
        return "", _read(path, smallest, None).notes
    except _Unusable as reason:
        return str(reason), ()


def is_picture(name: str) -> bool:
    """By its suffix."""
    return Path(name).suffix.lower() in SUFFIXES


def _read(path: Path, smallest: int, about: int | None) -> Picture:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of sizes (checked here) and of odd metadata (not used)
            # A stream, for what Pillow maps into memory by its path it turns wrongly: TIFFs with an orientation.
            with path.open("rb") as stream:
                said = code_points(stream)
                with Image.open(stream, formats=_formats()) as file:
                    _check_size(file.size, smallest)
                    if about is not None and file.format == "JPEG":
                        file.draft(None, (about, about))
                    return _shown(file, said)
    except Image.DecompressionBombError as error:
        most = 2 * (Image.MAX_IMAGE_PIXELS or 0) // 1_000_000
        raise _Unusable(f"claims more than {most} million pixels; make it smaller") from error
    except UnidentifiedImageError as error:
        if path.suffix.lower() in HEIF and not READS_HEIF:
            reason = "is a HEIC photograph, which needs one more package: pip install 'dora-diffusion[heic]'"
        else:
            reason = "is no picture, or of a kind that cannot be read; save it as PNG"
        raise _Unusable(reason) from error
    except PermissionError as error:
        raise _Unusable("may not be read; check its permissions") from error
    except FileNotFoundError as error:
        raise _Unusable("is no longer there") from error
    except (_Unusable, MemoryError):
        raise
    except Exception as error:  # each format's reader fails on damaged files in its own way
        raise _Unusable(f"is damaged ({str(error) or type(error).__name__})") from error


def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _check_size(size: tuple[int, int], smallest: int) -> None:
    width, height = size
    if width * height > MAX_PIXELS:
        raise _Unusable(f"{width} x {height} is more than {MAX_PIXELS // 1_000_000} million pixels; make it smaller")
    if min(width, height) < smallest:
        raise _Unusable(f"{width} x {height} is too small; the shorter side must have at least {smallest} pixels")


def _shown(file: Image.Image, said: CodePoints | None) -> Picture:
    """The file's first frame, decoded; `said` is what it says of its colours by code points."""
    tiles = getattr(file, "tile", None)
    raw = str(tiles[0].args) if tiles else ""  # gone after loading; PNG's names the bits of a sample
    covered = tiles[0].extents if tiles and file.format == "GIF" else None
    _check_samples(getattr(file, "tag_v2", {}))
    file.load()
    frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)  # telephones hide a depth map behind the photo
    notes = [f"{frames} frames, of which the first is taken"] if frames > 1 else []
    turn, primaries, odd = _exif(file)
    colours, opacity = _parted(file, raw)
    profile = _profile(file)
    strange = ""
    if said is not None and (said.win or profile is None) and said != CodePoints(UNSAID, UNSAID, said.win):
        if said.transfer in HDR:
            raise _Unusable(f"is in HDR ({HDR[said.transfer]}), which training does not know; save it as SDR, in sRGB")
        profile = None
        primaries, strange = from_code_points(said)
    image, unused = to_srgb(colours, profile, primaries)
    if opacity is None and covered not in (None, (0, 0, *file.size)):  # round a GIF's first frame nothing is seen
        opacity = Image.new("L", file.size, 0)
        opacity.paste(255, covered)
    if opacity is not None:
        notes += ["transparent all over, so white"] if opacity.getextrema() == (0, 0) else []
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=opacity)
        image = white
    image = image.transpose(TURNS[turn]) if turn in TURNS else image
    return Picture(image, tuple(note for note in (*notes, strange, unused, odd) if note))


def _check_samples(tags: Mapping[int, object]) -> None:
    """Raise _Unusable for samples of a TIFF that Pillow takes for others without a word."""
    bits = tags.get(258, ())
    most = max(bits) if isinstance(bits, tuple) and bits else 8
    if tags.get(284) == 2 and most > 8 and isinstance(bits, tuple) and len(bits) > 1:
        raise _Unusable(f"has {most} bits a sample in a plane for each colour, which is not read; save it as PNG")
    kinds = tags.get(339)
    if most == 8 and isinstance(kinds, tuple) and 2 in kinds:
        raise _Unusable("has signed whole numbers of 8 bits, which do not say what white is; save it as PNG")


def _profile(file: Image.Image) -> bytes | None:
    profile = file.info.get("icc_profile")
    return bytes(profile) if isinstance(profile, (bytes, bytearray)) and profile else None


def _exif(file: Image.Image) -> tuple[int, Primaries | None, str]:
    """How the picture is to be turned, what its colours mean, and a note where EXIF cannot be read.

    Only what is needed is looked at: cameras write odd things into the rest.
    """
    camera: dict[int, object] = {}
    try:
        exif = file.getexif()
        turn = exif.get(ExifTags.Base.Orientation, 1)
        with contextlib.suppress(KeyError):  # Pillow's for a file that has no such directory
            camera = exif.get_ifd(ExifTags.IFD.Interop)
    except Exception:  # as damaged files do, whatever Pillow makes of it
        return 1, primaries_of(file.info, {}), "EXIF data that cannot be read, taken as it lies"
    meaning = primaries_of(file.info, camera)
    if not isinstance(turn, int):
        return 1, meaning, f"an EXIF orientation that is no number ({str(turn)[:20]!r}), taken as it lies"
    return turn, meaning, ""


def _parted(file: Image.Image, raw: str) -> tuple[Image.Image, Image.Image | None]:
    """The picture in mode L, RGB, CMYK or LAB, and its opacity in mode L, if it has one."""
    if file.mode.startswith("I") or file.mode == "F":
        return _grey_of(file)
    image: Image.Image = file
    clear = image.info.get("transparency")
    if image.mode in STRAIGHT:
        image = image.convert(STRAIGHT[image.mode])
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode in ("PA", "P"):
        image = image.convert("RGB" if image.mode == "P" and clear is None else "RGBA")
        clear = None
    if clear is not None and image.mode in ("L", "RGB"):
        image.info["transparency"] = _in_eight_bits(clear, raw)
        image = image.convert("LA" if image.mode == "L" else "RGBA")
    if image.mode in ("LA", "RGBA"):
        return image.convert(image.mode[:-1]), image.getchannel("A")
    return image if image.mode in ("L", "RGB", "CMYK", "LAB") else image.convert("RGB"), None


def _in_eight_bits(clear: object, raw: str) -> object:
    """The colour that is transparent as the samples are after loading; PNG gives it in as many bits as theirs."""
    if isinstance(clear, tuple) and ";16" in raw:
        return tuple(value >> 8 for value in clear)
    for bits in (2, 4):
        if isinstance(clear, int) and raw == f"L;{bits}":
            return clear * 255 // (2**bits - 1)
    return clear


def _grey_of(file: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Grey of more than 8 bits in mode L, and its opacity, if it has one. Raises _Unusable."""
    values = np.asarray(file)
    tags = getattr(file, "tag_v2", {})  # a TIFF's
    white = _white(values, file.mode, bits=_only(tags.get(258)), signed=_only(tags.get(339)) == 2)
    grey = np.clip(values.astype(np.float64) / white, 0, 1)
    if tags.get(262) == 0:  # 0 is white, which Pillow heeds for fewer bits alone
        grey = 1 - grey
    image = Image.fromarray(np.rint(grey * 255).astype(np.uint8), "L")
    clear = file.info.get("transparency")
    opacity = None if clear is None else Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8), "L")
    return image, opacity


def _only(value: object) -> object:
    return value[0] if isinstance(value, tuple) and len(value) == 1 else value


def _white(values: np.ndarray, mode: str, bits: object, signed: bool) -> float:
    """The number that is white. Raises _Unusable where the file does not say it."""
    low, high = float(values.min()), float(values.max())
    if mode == "F":
        if not (low >= -0.001 and high <= 1.001):
            raise _Unusable(_numbers(low, high, "floating point, which is read from 0 (black) to 1 (white)"))
        return 1.0
    if mode.startswith("I;16"):
        return 2.0**bits - 1 if isinstance(bits, int) and bits < 16 else 65535.0
    if bits == 16 or low < 0 or not 255 < high <= 65535:
        kind = f"{'signed ' if signed else ''}whole numbers of {bits if isinstance(bits, int) else 32} bits"
        raise _Unusable(_numbers(low, high, f"{kind}, which do not say what white is"))
    return 65535.0


def _numbers(low: float, high: float, kind: str) -> str:
    return f"has values from {low:g} to {high:g} in {kind}; save it in 8 or 16 bits, such as PNG"
