"""SVG text to pixels, kept in one array file so that a resumed run starts at once."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from .files import write_atomically
from .icons import BASE_SETS, IMAGE_SIZE, Icon, IconSet, load_sets
from .renditions import OUTLINE, PLACES, RENDITIONS, SEED, Pixels, moved


def render(svg: str) -> Pixels:
    """One SVG on white: uint8 [64, 64, 3]."""
    png = resvg_py.svg_to_bytes(svg_string=svg, width=IMAGE_SIZE, height=IMAGE_SIZE)
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
    if picture.size != (IMAGE_SIZE, IMAGE_SIZE):
        picture = picture.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))


def render_all(svgs: Sequence[str]) -> Pixels:
    """Many SVGs: uint8 [pictures, 64, 64, 3]."""
    return np.stack([render(svg) for svg in svgs])


def _every_svg(sets: Sequence[IconSet], stroke: float) -> list[str]:
    return [s.svg(name, stroke) for s in sets for name in sorted(s.names()) if "skin" not in name]


def autoencoder_pixels(icons_root: Path, work: Path) -> tuple[Pixels, Pixels]:
    """All pictures of the base sets, plain and with drawn outlines.

    The outlined ones teach the autoencoder to hold thin dark lines, which none of the base
    styles has but a style adapter may want, without showing it any held-out set.
    """
    store = work / "autoencoder_pixels.npz"
    if not store.exists():
        sets = load_sets(icons_root, BASE_SETS)
        plain = render_all([v for v in _every_svg(sets, 0.0) if len(v) < 60_000])
        outlined = render_all([v for v in _every_svg(sets, OUTLINE)[::2] if len(v) < 60_000])
        with write_atomically(store) as temporary, temporary.open("wb") as file:
            np.savez(file, plain=plain, outlined=outlined)
    arrays = np.load(store)
    return arrays["plain"], arrays["outlined"]


def render_renditions(icons: Sequence[Icon], outlined: Sequence[Icon]) -> Pixels:
    """The icons, and the same ones with outlines, in all renditions and places: uint8 [pictures, 64, 64, 3]."""
    plain = {0.0: render_all([icon.svg for icon in icons]), OUTLINE: render_all([icon.svg for icon in outlined])}
    pixels: list[Pixels] = []
    for each in RENDITIONS:
        drawn = plain[each.outline]
        drawn = each.change(drawn) if each.change else drawn
        pixels += [moved(drawn, place == 2, SEED + place) if place else drawn for place in range(len(PLACES))]
    return np.concatenate(pixels)
