"""Text from outside in a Markdown file: it is shown as it was written, whatever Markdown would make of it."""

from __future__ import annotations

import re

from dora_diffusion.screen import printable

__all__ = ["code", "plain"]


def plain(text: object) -> str:
    """In one line, with a backslash before what Markdown or HTML would act on within a line (CommonMark 2.4)."""
    return re.sub(r"([\\`*_\[\]<>&|~!#$:])", r"\\\1", printable(text))


def code(text: object) -> str:
    """As inline code, between more backticks than the text has in a row (CommonMark 6.1)."""
    shown = printable(text)
    ticks = "`" * (max((len(run) for run in re.findall("`+", shown)), default=0) + 1)
    # A space at both ends is taken away, where there is more than spaces; a backtick there would join ours.
    ends = shown[:1] + shown[-1:]
    space = " " if "`" in ends or (ends == "  " and shown.strip()) else ""
    return f"{ticks}{space}{shown}{space}{ticks}"
