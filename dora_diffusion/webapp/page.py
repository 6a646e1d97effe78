"""Gradio's page, with every call judged where its arguments come in, whether a browser or a program made it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr
from gradio.block_function import BlockFunction

from dora_diffusion.webapp.arguments import NOT_YOURS, foreign_file, in_words, unfit
from dora_diffusion.webapp.received import Received
from dora_diffusion.webapp.visitors import visitor_of

__all__ = ["Page"]

NOT_OFFERED = "not in the list of choices"  # as Gradio has it, with the whole list behind
GONE = "What was chosen is no longer offered. Choose again from the list."


class Page(gr.Blocks):
    """Whoever calls a function of it is told of their own mistakes, and nothing of them is printed here."""

    received: Received

    async def process_api(
        self,
        block_fn: BlockFunction | int,
        inputs: list[Any],
        state: Any = None,
        request: Any = None,
        iterator: Any = None,
        **rest: Any,
    ) -> dict[str, Any]:
        """Raises gr.Error for arguments that the function does not take, and for files that are not the caller's."""
        if iterator is None:
            self._judge(self.fns[block_fn] if isinstance(block_fn, int) else block_fn, inputs, request)
        return await super().process_api(block_fn, inputs, state, request, iterator, **rest)

    async def preprocess_data(
        self, block_fn: BlockFunction, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> list[Any]:
        """Raises gr.Error: what goes wrong before a function is called is wrong with its arguments."""
        try:
            return await super().preprocess_data(block_fn, inputs, state, explicit_call)
        except Exception as error:
            words = GONE if NOT_OFFERED in str(error) else f"This cannot be used: {error}"
            raise gr.Error(words, print_exception=False) from error

    def _judge(self, function: BlockFunction, inputs: Sequence[object], request: object) -> None:
        if not isinstance(request, gr.Request):
            raise gr.Error("This call comes from nobody.", print_exception=False)
        if foreign_file(list(inputs), visitor_of(request), self.received):
            raise gr.Error(NOT_YOURS, print_exception=False)
        if wrong := unfit(function, inputs):
            raise gr.Error(in_words(wrong), print_exception=False)
