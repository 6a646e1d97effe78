"""The ways to look at a comparison that was drawn."""

from __future__ import annotations

from dora_diffusion.webapp import cells
from dora_diffusion.webapp.pictures import Albums
from dora_diffusion.webapp.shown import Shown

__all__ = ["BLIND", "GRID", "PAIRS", "SLIDER", "VIEWS", "hidden_grid", "show_view"]

GRID, SLIDER, DIFFERENCE, BLIND = "Grid", "Slider", "Difference", "Blind vote"
VIEWS = (GRID, SLIDER, DIFFERENCE, BLIND)
PAIRS = {"Base | LoRA": (0, 1), "Base | DoRA": (0, 2), "LoRA | DoRA": (1, 2)}


def show_view(shown: Shown, view: str, pair: str, albums: Albums) -> str:
    """The HTML of one view. A blind vote shows nothing here: its own part of the page does."""
    if view == BLIND:
        return hidden_grid(shown)
    if view == GRID or not shown.is_whole:
        return cells.grid(shown)
    if view == DIFFERENCE:
        return cells.differences(shown, albums.new())
    columns = len(shown.request.columns)
    first, second = PAIRS.get(pair, (0, 1))
    return cells.slider(shown, first, second) if second < columns else cells.slider(shown, 0, columns - 1)


def hidden_grid(shown: Shown) -> str:
    """In a grid's place during a blind vote: how many pictures there are, and none of them."""
    ready = f"{len(shown.cells)} of {shown.request.pictures} pictures are ready"
    return f"<p class='dd-lead'>{ready}, and hidden for the vote.</p>"
