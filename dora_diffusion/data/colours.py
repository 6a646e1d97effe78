"""Colours as a screen shows them: whatever a picture's numbers mean, the sRGB that its maker saw.

What the numbers mean is said by a profile inside the file; where there is none, by code points (H.273), by PNG's gAMA
and cHRM, or by the EXIF mark that cameras give Adobe RGB; and where nothing says it, they are sRGB. Conversions are
relative colorimetric with black point compensation: colours that sRGB has come out as they are, others as the nearest
that it has.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from PIL import ExifTags, Image, ImageCms

from dora_diffusion.data.code_points import CodePoints

__all__ = ["ADOBE_RGB", "HDR", "UNSAID", "Primaries", "from_code_points", "from_primaries", "primaries_of", "to_srgb"]

INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION
# A profile's colour space, and Pillow's modes whose numbers it can explain.
SPACES = {"RGB": ("RGB",), "GRAY": ("L",), "CMYK": ("CMYK",)}

Pair = tuple[float, float]
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


@dataclass(frozen=True)
class Primaries:
    """What red, green, blue and white are, as CIE x and y, and the exponent from a number to its light.

    Without a gamma it is sRGB's curve.
    """

    white: Pair
    red: Pair
    green: Pair
    blue: Pair
    gamma: float | None

    def to_xyz(self) -> np.ndarray:
        """Linear RGB to XYZ under D65: [3, 3]."""
        columns = np.array([_xyz(each) for each in (self.red, self.green, self.blue)]).T
        white = _xyz(self.white)
        scaled = columns * np.linalg.solve(columns, white)
        cones = (BRADFORD @ _xyz(SRGB.white)) / (BRADFORD @ white)
        return np.linalg.inv(BRADFORD) @ np.diag(cones) @ BRADFORD @ scaled


def _xyz(point: Pair) -> np.ndarray:
    x, y = point
    return np.array([x / y, 1.0, (1 - x - y) / y])


SRGB = Primaries((0.3127, 0.3290), (0.64, 0.33), (0.30, 0.60), (0.15, 0.06), 2.2)
ADOBE_RGB = Primaries((0.3127, 0.3290), (0.64, 0.33), (0.21, 0.71), (0.15, 0.06), 563 / 256)
# By H.273's numbers. The curves of television (1, 6, 14, 15) are shown as sRGB's is, as by browsers.
D65 = SRGB.white
POINTS = {
    1: (D65, SRGB.red, SRGB.green, SRGB.blue),
    5: (D65, (0.64, 0.33), (0.29, 0.60), (0.15, 0.06)),
    6: (D65, (0.630, 0.340), (0.310, 0.595), (0.155, 0.070)),
    9: (D65, (0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    12: (D65, (0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}
CURVES: dict[int, float | None] = {1: None, 4: 2.2, 5: 2.8, 6: None, 8: 1.0, 13: None, 14: None, 15: None}
UNSAID = 2
HDR = {16: "PQ", 18: "HLG"}
NEAR = 0.02  # a gamma so near to 1 / 0.45455 means sRGB, as every writer of it intends


def to_srgb(image: Image.Image, profile: bytes | None, primaries: Primaries | None = None) -> tuple[Image.Image, str]:
    """A picture of mode L, RGB, CMYK or LAB as RGB in sRGB, and what could not be done about its colours, or "".

    `profile` is an ICC profile; `primaries` counts only without one.
    """
    if image.mode == "LAB":
        return _converted(image, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))), ""
    unused = ""
    if profile:
        try:
            return _by_profile(image, profile), ""
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError) as error:
            unused = f"colour profile that cannot be used ({str(error).strip() or type(error).__name__})"
    if image.mode == "CMYK":
        return image.convert("RGB"), f"{unused or 'CMYK without a colour profile'}, its colours are only about right"
    if primaries is not None and not unused:
        return from_primaries(image.convert("RGB"), primaries), ""
    return image.convert("RGB"), unused and f"{unused}, taken as sRGB"


def _by_profile(image: Image.Image, profile: bytes) -> Image.Image:
    meaning = ImageCms.getOpenProfile(io.BytesIO(profile))
    space = meaning.profile.xcolor_space.strip()
    if image.mode == "L" and space == "RGB":
        image = image.convert("RGB")  # grey is red, green and blue alike
    if image.mode not in SPACES.get(space, ()):
        raise ValueError(f"made for {space}, and the picture is {image.mode}")
    return _converted(image, meaning)


def _converted(image: Image.Image, meaning: ImageCms.ImageCmsProfile) -> Image.Image:
    srgb = ImageCms.createProfile("sRGB")
    # What is worked out beforehand for greys is too coarse in the dark; and they are 256, so each is worked out once.
    grey = image.mode == "L"
    how = ImageCms.Flags.NOOPTIMIZE if grey else ImageCms.Flags.HIGHRESPRECALC
    asked = Image.frombytes("L", (256, 1), bytes(range(256))) if grey else image
    transform = ImageCms.buildTransform(meaning, srgb, asked.mode, "RGB", INTENT, FLAGS | how)
    converted = ImageCms.applyTransform(asked, transform)
    assert converted is not None  # it is None only where it works in place
    return Image.fromarray(np.asarray(converted)[0][np.asarray(image)]) if grey else converted


def primaries_of(info: Mapping[str | tuple[int, int], object], exif: Mapping[int, object]) -> Primaries | None:
    """What the file says of its colours without a profile; None where that is sRGB, or nothing.

    `info` is Pillow's of the file, `exif` its interoperability directory, where cameras mark Adobe RGB by "R03".
    """
    if exif.get(ExifTags.Interop.InteropIndex) == "R03":
        return ADOBE_RGB
    gamma, points = info.get("gamma"), info.get("chromaticity")
    if "srgb" in info or not (isinstance(gamma, float) and gamma > 0):
        return None
    white, red, green, blue = SRGB.white, SRGB.red, SRGB.green, SRGB.blue
    if isinstance(points, tuple) and len(points) == 8 and all(y > 0 for y in points[1::2]):
        white, red, green, blue = zip(points[::2], points[1::2], strict=True)
    away = np.subtract((white, red, green, blue), (SRGB.white, SRGB.red, SRGB.green, SRGB.blue))
    is_srgb = np.abs(away).max() < 2e-3 and abs(gamma - 0.45455) < NEAR
    return None if is_srgb else Primaries(white, red, green, blue, 1 / gamma)


def from_code_points(said: CodePoints) -> tuple[Primaries | None, str]:
    """What these mean, None where that is sRGB, and what could not be made of them, or "". HDR is the caller's."""
    points = POINTS.get(1 if said.primaries == UNSAID else said.primaries)
    transfer = 13 if said.transfer == UNSAID else said.transfer
    if points is None or transfer not in CURVES:
        return None, f"colours of a kind not known here (H.273 {said.primaries}, {said.transfer}), taken as sRGB"
    is_srgb = points == POINTS[1] and CURVES[transfer] is None
    return (None if is_srgb else Primaries(*points, CURVES[transfer])), ""


def from_primaries(image: Image.Image, primaries: Primaries) -> Image.Image:
    """An RGB picture whose numbers mean light by these primaries, in sRGB."""
    numbers = np.arange(256) / 255
    if primaries.gamma is None:
        light = np.where(numbers <= 0.04045, numbers / 12.92, ((numbers + 0.055) / 1.055) ** 2.4)
    else:
        light = numbers**primaries.gamma
    matrix = np.linalg.inv(SRGB.to_xyz()) @ primaries.to_xyz()
    linear = np.clip(light[np.asarray(image)] @ matrix.T, 0, 1)  # [height, width, 3]
    shown = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return Image.fromarray(np.rint(shown * 255).astype(np.uint8), "RGB")
