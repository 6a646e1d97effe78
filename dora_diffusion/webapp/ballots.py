"""Blind votes on a page: which two pictures, which one left, and what may be said before and after the vote."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from html import escape

from dora_diffusion.comparison.votes import Choice, Tally, Vote
from dora_diffusion.webapp.pictures import Album, url_of
from dora_diffusion.webapp.shown import Shown

__all__ = ["Ballot", "first_ballot", "next_ballot", "show_ballot", "show_result", "vote_of"]


@dataclass(frozen=True)
class Ballot:
    """The rows still to be voted on, in random order; `swapped` puts the second column's picture left."""

    shown: Shown
    rows: tuple[int, ...]
    columns: tuple[int, int]
    swapped: bool

    @property
    def row(self) -> int:
        return self.rows[0]


def first_ballot(shown: Shown) -> Ballot | None:
    """None where there are no two adapters to choose between."""
    if len(shown.request.columns) < 3 or not shown.is_whole:
        return None
    rows = list(range(len(shown.request.rows)))
    secrets.SystemRandom().shuffle(rows)
    return Ballot(shown, tuple(rows), (1, 2), secrets.randbits(1) == 1)


def next_ballot(ballot: Ballot) -> Ballot | None:
    rows = ballot.rows[1:]
    return replace(ballot, rows=rows, swapped=secrets.randbits(1) == 1) if rows else None


def vote_of(ballot: Ballot, side: str) -> Vote:
    """`side` is "left", "right" or "same"."""
    choice: Choice = "same" if side == "same" else ("first" if (side == "left") != ballot.swapped else "second")
    prompt, seed = ballot.shown.request.rows[ballot.row]
    first, second = (_name(ballot.shown, column) for column in ballot.columns)
    return Vote(first, second, choice, prompt, seed)


def _name(shown: Shown, column: int) -> str:
    each = shown.request.columns[column]
    return f"{each.label}, {shown.names[column]}, strength {each.strength:g}"


def show_ballot(ballot: Ballot, album: Album) -> str:
    """The two pictures under names that say nothing. The copies are made in the order in which they are shown."""
    columns = reversed(ballot.columns) if ballot.swapped else ballot.columns
    paths = [album.add_plain(ballot.shown.by_place[ballot.row, column].path) for column in columns]
    prompt, seed = ballot.shown.request.rows[ballot.row]
    figures = "".join(
        f"<figure class='dd-cell'><img src='{url_of(path)}' alt='the picture on the {side}'>"
        f"<figcaption>{side.capitalize()}</figcaption></figure>"
        for side, path in zip(("left", "right"), paths, strict=True)
    )
    total = len(ballot.shown.request.rows)
    at = total - len(ballot.rows) + 1
    return (
        f"<div id='ballot'><p class='dd-lead'>Pair {at} of {total}: which is the better picture of “{escape(prompt)}” "
        f"(seed {seed})? Which adapter drew which is told after the vote.</p>"
        f"<div class='dd-grid dd-two' style='--columns:2'>{figures}</div></div>"
    )


def show_result(ballot: Ballot, vote: Vote, tally: Tally, is_last: bool) -> str:
    """Who drew which, and all votes on these two so far."""
    left, right = (vote.second, vote.first) if ballot.swapped else (vote.first, vote.second)
    chosen = {"first": vote.first, "second": vote.second, "same": "neither"}[vote.choice]
    low, high = tally.interval
    share = (
        f"{escape(vote.second)} was preferred in {tally.second} of n = {tally.decided} decided votes "
        f"({100 * tally.second / tally.decided:.0f} %, 95 % Wilson interval {100 * low:.0f} to {100 * high:.0f} %)"
        if tally.decided
        else "no vote was decided yet (n = 0)"
    )
    more = "That was the last pair; press Compare with other seeds for more." if is_last else ""
    return (
        f"<div id='vote-result' class='dd-result'><p>Left was <b>{escape(left)}</b>, right was <b>{escape(right)}</b>. "
        f"You preferred <b>{escape(chosen)}</b>.</p><p>{share}; {tally.same} ties.</p><p>{more}</p></div>"
    )
