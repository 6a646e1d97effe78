"""A comparison as HTML: as a grid, with two pictures under a handle, and as differences."""

from __future__ import annotations

from html import escape

from PIL import Image

from dora_diffusion.comparison.metrics import SCALE_COLOURS, SCALE_TOP, difference_of, difference_picture
from dora_diffusion.webapp.pictures import Album, url_of
from dora_diffusion.webapp.shown import Placed, Shown

__all__ = ["differences", "grid", "heading", "picture", "slider", "title"]

COLUMNS = 3  # base, LoRA, DoRA: always this many at least, so that nothing moves when an adapter is chosen
HANDLE = "this.parentNode.style.setProperty('--cut',this.value+'%')"


def grid(shown: Shown, drawing: bool = False) -> str:
    """A column each for the base and the adapters, a row for each prompt and seed."""
    columns = shown.request.columns
    count = max(COLUMNS, len(columns))
    parts = [heading(shown, i) for i in range(count)]
    for row, (prompt, _) in enumerate(shown.request.rows):
        if len(shown.request.prompts) > 1 and row % len(shown.request.seeds) == 0:
            parts.append(f"<p class='dd-rowhead'>{escape(prompt)}</p>")
        for i in range(count):
            if i >= len(columns):
                parts.append("<div class='dd-cell dd-none'></div>")
            elif (placed := shown.by_place.get((row, i))) is not None:
                parts.append(_cell(placed, columns[i].strength))
            else:
                wait = "dd-next" if drawing and row * len(columns) + i == len(shown.cells) else "dd-wait"
                parts.append(f"<figure class='dd-cell'><div class='{wait}'></div></figure>")
    badge = "<p class='dd-badge'>precomputed example</p>" if shown.is_example else ""
    return f"{badge}{_table(''.join(parts), count)}"


def _table(inside: str, columns: int) -> str:
    """A grid of so many equal columns; one that is wider than the page scrolls inside its own box."""
    if columns <= COLUMNS:
        return f"<div class='dd-grid' style='--columns:{columns}'>{inside}</div>"
    return (
        "<div class='dd-scroll' tabindex='0' role='region' aria-label='pictures'>"
        f"<div class='dd-grid dd-wide' style='--columns:{columns}'>{inside}</div></div>"
    )


def heading(shown: Shown, column: int) -> str:
    headings = shown.request.headings
    label = headings[column] if column < len(headings) else "–"
    name = shown.names[column] if column < len(shown.names) else "no adapter chosen"
    return f"<div class='dd-head'><b>{escape(title(label))}</b><small>{escape(name)}</small></div>"


def title(label: str) -> str:
    return label[:1].upper() + label[1:]


def picture(placed: Placed) -> str:
    alt = escape(f"{placed.caption}: {placed.prompt}", quote=True)
    return f"<img src='{url_of(placed.path)}' alt='{alt}' width='{placed.size[0]}' height='{placed.size[1]}'>"


def _cell(placed: Placed, strength: float) -> str:
    notes = []
    if placed.column > 0:
        notes.append(f"<span class='dd-diff'>mean |difference| {placed.difference:.1f}</span>")
    if not placed.fits:
        notes.append(f"<span class='dd-nothing'>{escape(placed.note)}</span>")
    elif placed.column > 0 and placed.difference == 0:
        why = "strength 0 is the base" if strength == 0 else "this adapter changed nothing"
        notes.append(f"<span class='{'dd-same' if strength == 0 else 'dd-nothing'}'>{why}</span>")
    elif placed.note:
        notes.append(f"<span class='dd-warn'>{escape(placed.note)}</span>")
    if placed.cached:
        notes.append("<span class='dd-cached'>from the cache</span>")
    return (
        f"<figure class='dd-cell'><a href='{url_of(placed.path)}' download title='save the PNG'>"
        f"{picture(placed)}</a><figcaption>{escape(placed.caption)}{''.join(notes)}</figcaption></figure>"
    )


def slider(shown: Shown, first: int, second: int) -> str:
    """For each row two pictures at the same place, the second to the right of a handle."""
    parts = []
    for row in range(len(shown.request.rows)):
        left, right = shown.by_place.get((row, first)), shown.by_place.get((row, second))
        if left is None or right is None:
            continue
        label = escape(f"show more of {left.caption} or of {right.caption}", quote=True)
        parts.append(
            f"<figure class='dd-pair'><div class='dd-slide'>{picture(left)}{picture(right)}<i></i>"
            f"<input type='range' min='0' max='100' value='50' step='1' aria-label='{label}' oninput=\"{HANDLE}\">"
            f"</div><figcaption><span>{escape(left.caption)}</span><span>{escape(right.caption)}</span></figcaption>"
            "</figure>"
        )
    return f"<div class='dd-pairs'>{''.join(parts)}</div>"


def differences(shown: Shown, album: Album) -> str:
    """For each row and each two columns, where and how far their pictures are apart."""
    columns, headings = shown.request.columns, shown.request.headings
    pairs = [(a, b) for a in range(len(columns)) for b in range(a + 1, len(columns))]
    heads = "".join(
        f"<div class='dd-head'><b>|{escape(title(headings[a]))} − {escape(title(headings[b]))}|</b></div>"
        for a, b in pairs
    )
    cells = []
    for row, (_, seed) in enumerate(shown.request.rows):
        images = {column: _open(shown.by_place[row, column]) for column in range(len(columns))}
        for a, b in pairs:
            apart = difference_of(images[a], images[b])
            url = url_of(album.add(difference_picture(images[a], images[b])))
            words = f"mean {apart.mean:.1f} · most {apart.most:.0f} · {100 * apart.changed:.0f} % of the pixels differ"
            cells.append(
                f"<figure class='dd-cell'><img src='{url}' alt='{escape(words, quote=True)}'>"
                f"<figcaption>seed {seed}<span class='dd-diff'>{words}</span></figcaption></figure>"
            )
    return _legend() + _table(heads + "".join(cells), max(1, len(pairs)))


def _legend() -> str:
    marks = "".join(f"<span>{round(SCALE_TOP * part / 4)}{'+' if part == 4 else ''}</span>" for part in range(5))
    return (
        "<div class='dd-legend'><p>difference of a pixel, mean of its three channels, 0 to 255; one scale for every "
        f"picture</p><div style='background:linear-gradient(90deg,{','.join(SCALE_COLOURS)})'></div>"
        f"<div class='dd-marks'>{marks}</div></div>"
    )


def _open(placed: Placed) -> Image.Image:
    with Image.open(placed.path) as image:
        return image.convert("RGB")
