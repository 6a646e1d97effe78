"""Blind votes on a page: which two pictures, which one left, and what may be said before and after the vote."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, replace
from html import escape
from itertools import combinations

from dora_diffusion.comparison.request import written_number
from dora_diffusion.comparison.votes import Choice, Tally, Vote, pictures_digest
from dora_diffusion.webapp.pictures import Album, url_of
from dora_diffusion.webapp.shown import Shown

__all__ = ["Ballot", "first_ballot", "next_ballot", "pairs_to_vote_on", "show_ballot", "show_result", "vote_of"]

SEEN = (
    "You have seen these pictures with their names, so this vote does not count. For one that does, keep this view "
    "open, write other seeds and press Compare."
)
Place = tuple[int, tuple[int, int]]  # a row and two columns


@dataclass(frozen=True)
class Ballot:
    """The pairs still to be voted on, in random order; `swapped` puts the second column's picture left.

    `total` is how many pairs there were at first; `seen` when the visitor knows the pair at hand with its names, and
    `done` when it was voted on.
    """

    shown: Shown
    places: tuple[Place, ...]
    total: int
    swapped: bool
    seen: bool = False
    done: bool = False

    @property
    def row(self) -> int:
        return self.places[0][0]

    @property
    def columns(self) -> tuple[int, int]:
        return self.places[0][1]


def pairs_to_vote_on(shown: Shown) -> list[tuple[int, int]]:
    """The columns to choose between: two adapters at one strength, as a sweep has them, else the first two."""
    columns = shown.request.columns
    pairs = list(combinations(range(1, len(columns)), 2))
    alike = [
        (a, b) for a, b in pairs if columns[a].strength == columns[b].strength and columns[a].path != columns[b].path
    ]
    return alike or pairs[:1]


def first_ballot(shown: Shown, voted: frozenset[str] = frozenset()) -> Ballot | None:
    """None where there is nothing to choose between, or all pairs are among those `voted` on."""
    if not shown.is_whole:
        return None
    pairs = pairs_to_vote_on(shown)
    places = [(row, pair) for row in range(len(shown.request.rows)) for pair in pairs]
    places = [place for place in places if _digest(shown, place) not in voted]
    secrets.SystemRandom().shuffle(places)
    return Ballot(shown, tuple(places), len(places), secrets.randbits(1) == 1) if places else None


def next_ballot(ballot: Ballot) -> Ballot | None:
    places = ballot.places[1:]
    return replace(ballot, places=places, swapped=secrets.randbits(1) == 1, seen=False, done=False) if places else None


def vote_of(ballot: Ballot, side: str) -> Vote:
    """`side` is "left", "right" or "same"."""
    choice: Choice = "same" if side == "same" else ("first" if (side == "left") != ballot.swapped else "second")
    prompt, seed = ballot.shown.request.rows[ballot.row]
    first, second = (_name(ballot.shown, column) for column in ballot.columns)
    return Vote(first, second, choice, prompt, seed, _digest(ballot.shown, ballot.places[0]))


def _digest(shown: Shown, place: Place) -> str:
    row, (first, second) = place
    return pictures_digest(shown.by_place[row, first].path, shown.by_place[row, second].path)


def _name(shown: Shown, column: int) -> str:
    each = shown.request.columns[column]
    return f"{each.label}, {shown.names[column]}, strength {written_number(each.strength)}"


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
    at = ballot.total - len(ballot.places) + 1
    seen = f"<p class='dd-changed'>{SEEN}</p>" if ballot.seen else ""
    return (
        f"<div id='ballot'><p class='dd-lead'>Pair {at} of {ballot.total}: which is the better picture of "
        f"“{escape(prompt)}” (seed {seed})? Which adapter drew which is told after the vote.</p>{seen}"
        f"<div class='dd-grid dd-two' style='--columns:2'>{figures}</div></div>"
    )


def show_result(ballot: Ballot, vote: Vote, tally: Tally, *, counted: bool) -> str:
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
    reason = "you had seen these pictures with their names" if ballot.seen else "you have voted on this pair before"
    uncounted = "" if counted else f"<p>This vote does not count: {reason}.</p>"
    is_last = len(ballot.places) == 1
    more = "That was the last pair; keep this view open and press Compare with other seeds for more." * is_last
    return (
        f"<div id='vote-result' class='dd-result'><p>Left was <b>{escape(left)}</b>, right was <b>{escape(right)}</b>. "
        f"You preferred <b>{escape(chosen)}</b>.</p>{uncounted}<p>{share}; {tally.same} ties.</p><p>{more}</p></div>"
    )
