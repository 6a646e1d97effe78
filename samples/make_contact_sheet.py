"""Puts every sample picture, small, on one sheet: `samples/contact_sheet.png`.

python samples/make_contact_sheet.py
"""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SAMPLES = Path(__file__).parent
FOLDERS = ("openmoji", "fluent", "blobby")
THUMBNAIL, GAP, HEADING, COLUMNS = 104, 8, 34, 8
INK, PAPER, FRAME = "#24323a", "#ffffff", "#d8dee2"


def folder_height(count: int) -> int:
    return HEADING + -(-count // COLUMNS) * (THUMBNAIL + GAP)


def contact_sheet(folders: dict[str, list[Path]]) -> Image.Image:
    """One block of thumbnails for each folder, under its name."""
    width = GAP + COLUMNS * (THUMBNAIL + GAP)
    sheet = Image.new("RGB", (width, GAP + sum(folder_height(len(p)) for p in folders.values())), PAPER)
    draw = ImageDraw.Draw(sheet)
    top = 0
    for name, pictures in folders.items():
        draw.text((GAP, top + 8), f"{name}  ·  {len(pictures)} pictures", INK, ImageFont.load_default(17))
        for index, path in enumerate(pictures):
            x = GAP + index % COLUMNS * (THUMBNAIL + GAP)
            y = top + HEADING + index // COLUMNS * (THUMBNAIL + GAP)
            with Image.open(path) as picture:
                small = picture.convert("RGB").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
            sheet.paste(small, (x, y))
            draw.rectangle((x, y, x + THUMBNAIL - 1, y + THUMBNAIL - 1), outline=FRAME)
        top += folder_height(len(pictures))
    return sheet


def main() -> None:
    folders = {name: sorted((SAMPLES / name).glob("*.png")) for name in FOLDERS}
    contact_sheet(folders).save(SAMPLES / "contact_sheet.png", optimize=True)


if __name__ == "__main__":
    main()
