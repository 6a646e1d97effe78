"""The blind vote's part of the Compare tab."""

from __future__ import annotations

import gradio as gr

from dora_diffusion.webapp import parts
from dora_diffusion.webapp.ballots import Ballot, first_ballot, next_ballot, show_ballot, show_result, vote_of
from dora_diffusion.webapp.shown import Shown
from dora_diffusion.webapp.studio import Studio
from dora_diffusion.webapp.visitors import visitor_of

__all__ = ["BlindVote"]

SIDES = {"left": "Left is better", "same": "About the same", "right": "Right is better"}


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

    def connect(self, studio: Studio, shown: gr.State) -> None:
        self.studio = studio
        outputs = [self.ballot, self.pair, self.answers, self.result, self.next, self.start]
        self.start.click(self.begin, shown, outputs, **parts.QUIET)
        self.next.click(self.go_on, self.ballot, outputs, **parts.QUIET)
        for side, button in self.buttons.items():
            button.click(self._voter(side), self.ballot, outputs, **parts.QUIET)

    def begin(self, shown: Shown | None) -> tuple[object, ...]:
        ballot = first_ballot(shown) if shown is not None else None
        if ballot is None:
            text = "A vote needs two adapters and a whole comparison: choose both, then press Compare."
            return None, parts.status_line(text), gr.update(visible=False), "", gr.update(visible=False), gr.skip()
        return self._open(ballot)

    def go_on(self, ballot: Ballot | None) -> tuple[object, ...]:
        following = next_ballot(ballot) if ballot else None
        return self._open(following) if following else (gr.skip(),) * 6

    def vote(self, ballot: Ballot | None, side: str, page: gr.Request) -> tuple[object, ...]:
        if ballot is None:
            return (gr.skip(),) * 6
        vote = vote_of(ballot, side)
        tally = self.studio.votes(visitor_of(page)).add(vote)
        is_last = len(ballot.rows) == 1
        result = show_result(ballot, vote, tally, is_last)
        return (
            None if is_last else ballot,
            gr.skip(),
            gr.update(visible=False),
            result,
            gr.update(visible=not is_last),
            gr.update(visible=is_last, value="Vote again"),
        )

    def _voter(self, side: str) -> object:
        def voting(ballot: Ballot | None, page: gr.Request) -> tuple[object, ...]:
            return self.vote(ballot, side, page)

        return voting

    def _open(self, ballot: Ballot) -> tuple[object, ...]:
        html = show_ballot(ballot, self.studio.albums.new())
        return ballot, html, gr.update(visible=True), "", gr.update(visible=False), gr.update(visible=False)
