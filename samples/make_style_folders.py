"""Draws `samples/openmoji/` and `samples/fluent/`: the same sixteen things in two styles, and eight more held out.

npm install @iconify-json/openmoji@1.2.29 @iconify-json/fluent-emoji@1.2.7
python samples/make_style_folders.py node_modules/@iconify-json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import resvg_py
from PIL import Image

SIZE = 256
SAMPLES = Path(__file__).parent
THINGS = (
    *("cat-face", "penguin", "butterfly", "turtle"),
    *("red-apple", "pizza", "birthday-cake"),
    *("automobile", "sailboat", "rocket"),
    *("house", "deciduous-tree", "sunflower"),
    *("umbrella", "guitar", "camera"),
)
# Not to train on: the loss on these tells how well the style carries over to things it was not shown on.
HELD_OUT = ("dog-face", "owl", "banana", "mushroom", "bus", "hot-beverage", "cactus", "bicycle")


@dataclass(frozen=True)
class Style:
    """One folder: which icon package it is drawn from, and the words that name its style."""

    folder: str
    package: str
    words: str


STYLES = (
    Style("openmoji", "openmoji", "openmoji style"),
    Style("fluent", "fluent-emoji", "fluentshade style"),
)


def svg_texts(package: Path, names: tuple[str, ...]) -> dict[str, str]:
    """The icons of these names as SVG text, by name."""
    icon_set = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    missing = [name for name in names if name not in icon_set["icons"]]
    if missing:
        raise SystemExit(f"{package} has no icon named {', '.join(missing)}; install the version named above")
    box = f"0 0 {icon_set['width']} {icon_set['height']}"
    bodies = {name: icon_set["icons"][name]["body"] for name in names}
    return {
        name: f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{body}</svg>' for name, body in bodies.items()
    }


def drawn(svg: str) -> Image.Image:
    """The SVG as an RGB picture; drawn four times too large first, which makes its edges smooth."""
    large = resvg_py.svg_to_bytes(
        svg_string=svg, width=4 * SIZE, height=4 * SIZE, background="#ffffff", skip_system_fonts=True
    )
    with Image.open(BytesIO(large)) as picture:
        return picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)


def write_folder(style: Style, names: tuple[str, ...], folder: Path, icons: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name, svg in svg_texts(icons / style.package, names).items():
        drawn(svg).save(folder / f"{name}.png", optimize=True)
        (folder / f"{name}.txt").write_text(f"{name.replace('-', ' ')}, {style.words}\n", encoding="utf-8")
    print(f"{len(names)} pictures in {folder}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the two style folders from the icon packages.")
    parser.add_argument("icons", type=Path, help="the folder that holds openmoji/ and fluent-emoji/")
    icons = parser.parse_args().icons
    for style in STYLES:
        write_folder(style, THINGS, SAMPLES / style.folder, icons)
        write_folder(style, HELD_OUT, SAMPLES / style.folder / "held-out", icons)


if __name__ == "__main__":
    main()
