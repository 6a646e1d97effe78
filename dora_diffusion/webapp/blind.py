"""The blind vote's part of the Compare tab."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import gradio as gr

from dora_diffusion.errors import DoraDiffusionError
from dora_diffusion.webapp import parts
from dora_diffusion.webapp.ballots import (
    Ballot,
    first_ballot,
    next_ballot,
    pairs_to_vote_on,
    show_ballot,
    show_result,
    vote_of,
)
from dora_diffusion.webapp.shown import Shown
from dora_diffusion.webapp.studio import Studio
from dora_diffusion.webapp.visitors import visitor_of

__all__ = ["BlindVote"]

SIDES = {"left": "Left is better", "same": "About the same", "right": "Right is better"}
NOTHING = "A vote needs two adapters and a whole comparison: choose both, then press Compare."
ALL_DONE = "You have voted on all of these pairs, and know who drew which: press Compare with other seeds."
Update = tuple[object, ...]


class BlindVote:
    """Two pictures, three answers, and what the answers say so far."""

    def build(self) -> gr.Column:
        with gr.Column(visible=False, elem_id="blind") as self.part:
            self.start = gr.Button("Begin the vote", elem_id="blind-start")
            self.pair = gr.HTML("", elem_id="blind-pair")
            with gr.Row(visible=False, elem_id="blind-votes") as self.answers:
                self.buttons = {side: gr.Button(text, elem_id=f"vote-{side}") for side, text in SIDES.items()}
            self.result = gr.HTML("", elem_id="blind-result")
            self.next = gr.Button("Next pair", visible=False, elem_id="blind-next")
            self.ballot = gr.State(None)
        return self.part

    def connect(self, studio: Studio, shown: gr.State, drawn: Sequence[gr.events.Dependency]) -> None:
        """`drawn` are the events after which other pictures may be shown."""
        self.studio = studio
        outputs = [self.ballot, self.pair, self.answers, self.result, self.next, self.start]
        self.start.click(self.begin, shown, outputs, **parts.QUIET)
        self.next.click(self.go_on, self.ballot, outputs, **parts.QUIET)
        for side, button in self.buttons.items():
            button.click(self._voter(side), self.ballot, outputs, **parts.QUIET)
        for event in drawn:
            event.then(self.renew, [shown, self.ballot], outputs, **parts.QUIET)

    def begin(self, shown: Shown | None, page: gr.Request) -> Update:
        voted = self.studio.votes(visitor_of(page)).voted()
        ballot = first_ballot(shown, voted) if shown is not None else None
        if ballot is not None:
            return self._open(ballot, visitor_of(page))
        could = shown is not None and shown.is_whole and pairs_to_vote_on(shown)
        text = parts.status_line(ALL_DONE if could else NOTHING)
        return None, text, gr.update(visible=False), "", gr.update(visible=False), gr.skip()

    def go_on(self, ballot: Ballot | None, page: gr.Request) -> Update:
        following = next_ballot(ballot) if ballot and ballot.done else None
        return self._open(following, visitor_of(page)) if following else (gr.skip(),) * 6

    def vote(self, ballot: Ballot | None, side: str, page: gr.Request) -> Update:
        """A second answer to the same pair, as a double click sends it, does nothing."""
        if ballot is None or ballot.done:
            return (gr.skip(),) * 6
        ballot = self._judged(ballot, visitor_of(page))
        vote, votes = vote_of(ballot, side), self.studio.votes(visitor_of(page))
        try:
            counted = not ballot.seen and votes.add(vote)
        except DoraDiffusionError as error:
            parts.toast(error)
            return (gr.skip(),) * 6
        return (
            replace(ballot, done=True),
            gr.skip(),
            gr.update(visible=False),
            show_result(ballot, vote, votes.tally(vote.first, vote.second), counted=counted),
            gr.update(visible=len(ballot.places) > 1),
            gr.update(visible=False),
        )

    def renew(self, shown: Shown | None, ballot: Ballot | None) -> Update:
        """Other pictures are shown: a ballot and a result of those before them go."""
        if ballot is not None and shown is not None and ballot.shown.cells == shown.cells:
            return (gr.skip(),) * 6
        hidden = gr.update(visible=False)
        return None, "", hidden, "", hidden, gr.update(visible=True)

    def _voter(self, side: str) -> object:
        def voting(ballot: Ballot | None, page: gr.Request) -> Update:
            return self.vote(ballot, side, page)

        return voting

    def _judged(self, ballot: Ballot, visitor: str) -> Ballot:
        seen = self.studio.seen.all_of(visitor, ballot.shown, ballot.row, ballot.columns)
        return replace(ballot, seen=ballot.seen or seen)

    def _open(self, ballot: Ballot, visitor: str) -> Update:
        ballot = self._judged(ballot, visitor)
        html = show_ballot(ballot, self.studio.albums.new())
        return ballot, html, gr.update(visible=True), "", gr.update(visible=False), gr.update(visible=False)
