"""Draws `samples/blobby/`: eight pictures of one made-up character, each with its caption.

    python samples/draw_subject.py

Blobby is the project's own work (CC0). The same code always gives the same pictures.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import resvg_py
from PIL import Image

SIZE = 256
FOLDER = Path(__file__).parent / "blobby"

INK, TEAL, TEAL_DARK = "#0d3b4a", "#2bb8ae", "#1f958f"
YELLOW, ORANGE, ORANGE_DARK = "#ffd84d", "#ff8a2b", "#d9601a"
RED, CREAM, PINK, VIOLET = "#e5484d", "#fff4de", "#ff9d8f", "#6a4cc4"

Point = tuple[float, float]


@dataclass(frozen=True)
class Pose:
    """One picture: where Blobby stands, what it does, and what is around it.

    Positions and sizes are in pixels of the 256 px picture. Arms are (bend, hand) in Blobby's own
    coordinates: its middle is (0, 0), its right is +x, down is +y, its body is about 140 px wide.
    """

    name: str
    caption: str
    at: Point = (128, 138)
    scale: float = 1.15
    tilt: float = 0.0  # degrees, clockwise
    stretch: float = 1.0  # height over width: above 1 tall, below 1 flat
    turn: float = 0.0  # how far the face looks aside, px
    eye: str = "open"
    mouth: str = "smile"
    left_arm: tuple[Point, Point] = ((-88, 34), (-78, 58))
    right_arm: tuple[Point, Point] = ((88, 34), (78, 58))
    feet: tuple[Point, Point] = ((-30, 76), (30, 76))
    behind: str = ""
    in_front: str = ""
    paper: str = "#ffffff"


# --- small shapes -------------------------------------------------------------------------------


def ellipse(x: float, y: float, rx: float, ry: float, fill: str, *, more: str = "") -> str:
    return f'<ellipse cx="{x}" cy="{y}" rx="{rx}" ry="{ry}" fill="{fill}" {more}/>'


def path(d: str, fill: str = "none", stroke: str = INK, width: float = 4.5) -> str:
    return (
        f'<path d="{d}" fill="{fill}" stroke="{stroke}" stroke-width="{width}" '
        f'stroke-linecap="round" stroke-linejoin="round"/>'
    )


def plain(d: str, fill: str) -> str:
    """A filled shape without an outline."""
    return f'<path d="{d}" fill="{fill}"/>'


def moved(x: float, y: float, inside: str, scale: float = 1.0) -> str:
    return f'<g transform="translate({x} {y}) scale({scale})">{inside}</g>'


# --- the character ------------------------------------------------------------------------------

BODY = "M0 -72 C46 -72 70 -40 72 4 C74 50 50 78 0 78 C-50 78 -74 50 -72 4 C-70 -40 -46 -72 0 -72 Z"
SCARF = "M-74 18 C-40 42 40 42 74 18 L73 38 C44 64 -44 64 -73 38 Z"
SCARF_TAIL = "M30 48 L54 42 L64 84 L38 90 Z"


def horns() -> str:
    one = path("M-20 -60 C-30 -74 -46 -86 -58 -90 C-60 -74 -58 -56 -48 -44 Z", ORANGE)
    ring = path("M-33 -75 C-40 -72 -52 -64 -56 -60", stroke=ORANGE_DARK, width=5)
    return "".join(f'<g transform="scale({side} 1)">{one}{ring}</g>' for side in (1, -1))


def limb(shoulder: Point, bend: Point, hand: Point) -> str:
    d = f"M{shoulder[0]} {shoulder[1]} Q{bend[0]} {bend[1]} {hand[0]} {hand[1]}"
    return path(d, width=26) + path(d, stroke=TEAL, width=17)


def foot(at: Point) -> str:
    return ellipse(at[0], at[1], 22, 13, TEAL_DARK, more=f'stroke="{INK}" stroke-width="4.5"')


def eye(kind: str, turn: float) -> str:
    if kind == "closed":
        return path(f"M{turn - 25} -24 q25 22 50 0", width=6) + path(
            f"M{turn - 15} -13 l-5 8 M{turn} -9 v9 M{turn + 15} -13 l5 8", width=4.5
        )
    if kind == "happy":
        return path(f"M{turn - 25} -16 q25 -34 50 0", width=7)
    look = turn * 1.35
    return (
        ellipse(turn, -25, 31, 32, "#ffffff", more=f'stroke="{INK}" stroke-width="4.5"')
        + ellipse(look, -23, 18, 19, VIOLET)
        + ellipse(look, -23, 11, 12, INK)
        + ellipse(look + 7, -31, 6, 6.5, "#ffffff")
        + ellipse(look - 6, -16, 3, 3, "#ffffff")
    )


def mouth(kind: str, turn: float) -> str:
    if kind == "open":
        return path(f"M{turn - 14} 11 q14 5 28 0 q-1 19 -14 19 q-13 0 -14 -19 Z", RED)
    if kind == "round":
        return ellipse(turn, 17, 5.5, 6, INK)
    return path(f"M{turn - 12} 12 q12 12 24 0", width=5)


def cheeks(turn: float) -> str:
    return ellipse(turn - 43, 4, 9, 6, PINK) + ellipse(turn + 43, 4, 9, 6, PINK)


def scarf() -> str:
    """A red band with cream stripes around the neck, one end hanging in front."""
    stripes = "".join(path(f"M{x} 10 L{x * 0.94} 70", stroke=CREAM, width=11) for x in (-60, -30, 0, 30, 60))
    tail_stripes = path("M28 58 L64 50 M32 76 L66 68", stroke=CREAM, width=8)
    return (
        f'<clipPath id="tail"><path d="{SCARF_TAIL}"/></clipPath>'
        f'<clipPath id="scarf"><path d="{SCARF}"/></clipPath>'
        + plain(SCARF_TAIL, RED)
        + f'<g clip-path="url(#tail)">{tail_stripes}</g>'
        + path(SCARF_TAIL)
        + plain(SCARF, RED)
        + f'<g clip-path="url(#scarf)">{stripes}</g>'
        + path(SCARF)
    )


def body(turn: float) -> str:
    shade = ellipse(-14, -14, 72, 82, TEAL)
    shine = ellipse(-44, -40, 9, 16, "#8fe6dc", more='transform="rotate(35 -44 -40)"')
    return (
        f'<clipPath id="body"><path d="{BODY}"/></clipPath>'
        + plain(BODY, TEAL_DARK)
        + f'<g clip-path="url(#body)">{shade}{ellipse(turn, 72, 46, 34, YELLOW)}{shine}</g>'
        + path(BODY)
    )


def blobby(pose: Pose) -> str:
    parts = [
        horns(),
        *(foot(at) for at in pose.feet),
        limb((-60, 32), *pose.left_arm),
        limb((60, 32), *pose.right_arm),
        body(pose.turn),
        cheeks(pose.turn),
        eye(pose.eye, pose.turn),
        mouth(pose.mouth, pose.turn),
        scarf(),
    ]
    wide, tall = pose.scale / pose.stretch**0.5, pose.scale * pose.stretch**0.5
    place = f"translate({pose.at[0]} {pose.at[1]}) rotate({pose.tilt}) scale({wide:.3f} {tall:.3f})"
    return f'<g transform="{place}">{"".join(parts)}</g>'


# --- the surroundings ---------------------------------------------------------------------------


def dots(points: tuple[Point, ...], radius: float, fill: str) -> str:
    return "".join(ellipse(x, y, radius, radius, fill) for x, y in points)


def shadow(x: float, y: float, rx: float, fill: str = "#dfe5ea") -> str:
    return ellipse(x, y, rx, rx * 0.14, fill)


def band(top: float, fill: str, wave: float = 0.0) -> str:
    """Ground or water from `top` down to the lower edge, with a wavy border of that height."""
    waves = "".join(f"q16 {-wave} 32 0 t32 0 " for _ in range(4))
    return plain(f"M0 {top} {waves}V256 H0 Z", fill)


def cloud(x: float, y: float, scale: float) -> str:
    puffs = ((0, 0, 20, 16), (-22, 6, 16, 11), (22, 6, 18, 11))
    return moved(x, y, "".join(ellipse(*puff, "#ffffff") for puff in puffs), scale)


def palm(x: float, y: float) -> str:
    leaf = "M0 0 C14 -22 38 -16 46 10 C32 -4 16 -2 0 0 Z"
    fan = ((1, 20, "#2f9e44"), (-1, 20, "#2f9e44"), (1, -22, "#51b85f"), (-1, -22, "#51b85f"))
    leaves = "".join(
        f'<g transform="scale({side} 1) rotate({turn})">{plain(leaf, green)}</g>' for side, turn, green in fan
    )
    return moved(x, y, path("M0 0 C-6 34 -4 66 4 96", stroke="#9a6a3a", width=10) + leaves)


def pine(x: float, y: float, scale: float) -> str:
    tier = plain("M0 0 L42 52 H-42 Z", "#3f7f6b") + plain("M0 0 L18 22 Q0 32 -18 22 Z", "#ffffff")
    tiers = moved(0, -40, tier) + moved(0, -72, tier, 0.84) + moved(0, -98, tier, 0.64)
    return moved(x, y, plain("M-6 8 h12 v18 h-12 Z", "#7a5230") + tiers, scale)


def letter_z(x: float, y: float, scale: float) -> str:
    return moved(x, y, path("M0 0 H16 L0 18 H16", stroke=CREAM, width=5), scale)


def balloon(x: float, y: float, hand: Point) -> str:
    string = path(f"M{x} {y + 50} Q{x - 8} {y + 70} {hand[0]} {hand[1]}", width=2.5)
    return (
        string
        + path(f"M{x} {y + 38} l-7 12 h14 Z", "#d92b3a", width=3.5)
        + ellipse(x, y, 33, 39, "#f03a48", more=f'stroke="{INK}" stroke-width="4"')
        + ellipse(x - 13, y - 16, 5, 10, "#ffb3b3", more=f'transform="rotate(28 {x - 13} {y - 16})"')
    )


def flower(x: float, y: float, petal: str) -> str:
    petals = "".join(ellipse(x + dx, y + dy, 5, 5, petal) for dx, dy in ((0, -6), (6, 0), (0, 6), (-6, 0)))
    return petals + ellipse(x, y, 4, 4, YELLOW)


# --- the eight pictures -------------------------------------------------------------------------

MEADOW = (
    band(206, "#8bd15a", 5)
    + shadow(128, 230, 50, "#6bb540")
    + flower(30, 226, "#ff7aa8")
    + flower(222, 238, "#ffffff")
    + flower(204, 220, "#ff7aa8")
)
NIGHT = (
    ellipse(206, 48, 26, 26, "#ffe9a3")
    + ellipse(195, 42, 22, 22, "#2d3169")
    + dots(((30, 40), (78, 22), (150, 30), (236, 104), (18, 104)), 2.5, "#ffe9a3")
)
PILLOW = "M10 196 q0 -36 40 -34 h60 q34 0 34 30 q0 24 -34 24 h-64 q-36 2 -36 -20 Z"
BED = path("M-12 204 H268 V270 H-12 Z", "#8f76d6") + path(PILLOW, "#f3ecff")
QUILT = "M112 206 C134 166 196 148 236 172 C254 186 258 212 268 222 V270 H84 C90 246 98 224 112 206 Z"
QUILT_DOTS = ((146, 202), (182, 180), (216, 196), (172, 226), (212, 232), (130, 236), (244, 224))
BLANKET = path(QUILT, "#5b8def") + dots(QUILT_DOTS, 6, "#bcd4ff")
FLAKES = ((20, 30), (64, 18), (104, 42), (150, 16), (196, 36), (238, 20), (26, 92), (232, 92), (84, 8))
BEACH = ellipse(214, 44, 24, 24, "#ffe14d") + band(124, "#3fa7e0", 4) + band(172, "#f6dc9c", 4) + palm(40, 84)
SNOW = pine(46, 168, 1.0) + pine(214, 172, 0.8) + band(186, "#ffffff", 6) + dots(FLAKES, 4.5, "#ffffff")
SKY = cloud(48, 56, 1.1) + cloud(218, 196, 0.9) + cloud(36, 214, 0.8)
SEA = ellipse(44, 48, 22, 22, "#ffe14d") + cloud(200, 44, 1.0) + band(176, "#6cc3ee", 6)
BOAT = (
    path("M34 170 H222 C216 206 196 226 172 226 H84 C60 226 40 206 34 170 Z", "#c9814a")
    + path("M28 164 H228 V178 H28 Z", "#e5a468")
    + path("M52 200 H204", stroke="#9a5a2c", width=4)
    + band(214, "#3f9fdb", 7)
)

POSES = (
    Pose("01-front", "blobby, front view", behind=shadow(128, 240, 66)),
    Pose(
        "02-waving",
        "blobby, waving",
        at=(112, 140),
        scale=1.1,
        tilt=-7,
        mouth="open",
        right_arm=((106, 24), (100, -22)),
        behind=shadow(114, 240, 62, "#f1cf9c")
        + path("M190 86 q6 -13 19 -17 M181 74 q8 -17 25 -22 M238 122 q9 -10 8 -24", stroke=ORANGE, width=4.5),
        paper="#ffe8c2",
    ),
    Pose(
        "03-jumping",
        "blobby, jumping on the grass",
        at=(128, 112),
        scale=1.0,
        stretch=1.12,
        eye="happy",
        mouth="open",
        left_arm=((-98, 6), (-88, -40)),
        right_arm=((98, 6), (88, -40)),
        feet=((-38, 74), (38, 74)),
        behind=MEADOW,
        paper="#d5f0ff",
    ),
    Pose(
        "04-sleeping",
        "blobby, sleeping in a bed at night",
        at=(108, 146),
        scale=0.98,
        tilt=-62,
        eye="closed",
        mouth="round",
        left_arm=((-92, 20), (-84, 56)),
        right_arm=((60, 50), (50, 60)),
        behind=NIGHT + BED,
        in_front=BLANKET + letter_z(112, 62, 0.8) + letter_z(136, 40, 1.1),
        paper="#2d3169",
    ),
    Pose(
        "05-beach",
        "blobby on a beach",
        at=(144, 148),
        scale=0.98,
        turn=-13,
        mouth="open",
        left_arm=((-100, 26), (-92, -8)),
        behind=BEACH + shadow(144, 230, 58, "#dfbd74"),
        paper="#bfe6fb",
    ),
    Pose(
        "06-snow",
        "blobby in snow",
        at=(124, 164),
        scale=0.8,
        turn=6,
        left_arm=((-96, 20), (-94, -14)),
        right_arm=((94, 36), (98, 14)),
        behind=SNOW + shadow(124, 230, 52, "#c9dcee"),
        in_front=ellipse(207, 166, 14, 14, "#ffffff", more=f'stroke="{INK}" stroke-width="3.5"'),
        paper="#a9c9ea",
    ),
    Pose(
        "07-balloon",
        "blobby holding a red balloon",
        at=(104, 160),
        scale=0.92,
        tilt=5,
        turn=9,
        right_arm=((98, 30), (98, -10)),
        feet=((-28, 77), (28, 77)),
        behind=SKY,
        in_front=balloon(206, 62, (194, 158)),
        paper="#cfeaff",
    ),
    Pose(
        "08-boat",
        "blobby in a boat",
        at=(124, 112),
        scale=0.98,
        tilt=4,
        turn=12,
        left_arm=((-96, 30), (-88, 56)),
        right_arm=((104, 16), (98, -26)),
        behind=SEA,
        in_front=BOAT,
        paper="#d9f1ff",
    ),
)


def picture(pose: Pose) -> str:
    """The whole picture as SVG text."""
    paper = f'<rect width="256" height="256" fill="{pose.paper}"/>'
    inside = paper + pose.behind + blobby(pose) + pose.in_front
    return f'<svg xmlns="http://www.w3.org/2000/svg" width="256" height="256">{inside}</svg>'


def drawn(svg: str) -> Image.Image:
    """The SVG as an RGB picture; drawn four times too large first, which makes its edges smooth."""
    large = resvg_py.svg_to_bytes(
        svg_string=svg, width=4 * SIZE, height=4 * SIZE, background="#ffffff", skip_system_fonts=True
    )
    with Image.open(BytesIO(large)) as picture:
        return picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BOX)


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for pose in POSES:
        drawn(picture(pose)).save(FOLDER / f"{pose.name}.png", optimize=True)
        (FOLDER / f"{pose.name}.txt").write_text(f"{pose.caption}\n", encoding="utf-8")
    print(f"{len(POSES)} pictures in {FOLDER}")


if __name__ == "__main__":
    main()
