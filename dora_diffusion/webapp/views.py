"""The ways to look at a comparison that was drawn."""

from __future__ import annotations

from itertools import combinations

from dora_diffusion.webapp import cells
from dora_diffusion.webapp.pictures import Albums
from dora_diffusion.webapp.shown import Shown

__all__ = ["BLIND", "GRID", "SLIDER", "VIEWS", "chosen_pair", "hidden_grid", "pairs_of", "show_view"]

GRID, SLIDER, DIFFERENCE, BLIND = "Grid", "Slider", "Difference", "Blind vote"
VIEWS = (GRID, SLIDER, DIFFERENCE, BLIND)


def pairs_of(shown: Shown) -> dict[str, tuple[int, int]]:
    """Each two columns that the slider can lay on each other, by what these columns are."""
    titles = [cells.title(heading) for heading in shown.request.headings]
    return {f"{titles[a]} | {titles[b]}": (a, b) for a, b in combinations(range(len(titles)), 2)}


def chosen_pair(shown: Shown, pair: str) -> str:
    """The pair if there is one of these columns, else the first two adapters, else the base and its adapter."""
    pairs = pairs_of(shown)
    return pair if pair in pairs else next((name for name, at in pairs.items() if at == (1, 2)), next(iter(pairs), ""))


def show_view(shown: Shown, view: str, pair: str, albums: Albums) -> str:
    """The HTML of one view. A blind vote shows nothing here: its own part of the page does."""
    if view == BLIND:
        return hidden_grid(shown)
    if view == GRID or not shown.is_whole:
        return cells.grid(shown)
    if view == DIFFERENCE:
        return cells.differences(shown, albums.new())
    return cells.slider(shown, *pairs_of(shown).get(chosen_pair(shown, pair), (0, 0)))


def hidden_grid(shown: Shown) -> str:
    """In a grid's place during a blind vote: how many pictures there are, and none of them."""
    ready = f"{len(shown.cells)} of {shown.request.pictures} pictures are ready"
    return f"<p class='dd-lead'>{ready}, and hidden for the vote.</p>"
