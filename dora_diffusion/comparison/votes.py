"""Blind votes: which of two pictures people prefer, and how sure that is."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from dora_diffusion.journal import append_entry, read_journal
from dora_diffusion.outputs import make_folder

__all__ = ["Choice", "Tally", "Vote", "Votes", "wilson_interval"]

Choice = Literal["first", "second", "same"]
Z = 1.959963984540054  # two-sided 95 %


def wilson_interval(successes: int, trials: int, z: float = Z) -> tuple[float, float]:
    """The interval for a share (Wilson 1927), which keeps its promise for few trials too. (0, 1) for none."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@dataclass(frozen=True)
class Vote:
    """One choice between two columns, named as people know them; `first` is the one further left in the comparison."""

    first: str
    second: str
    choice: Choice
    prompt: str
    seed: int


@dataclass(frozen=True)
class Tally:
    """All votes on one pair. Ties count as votes for neither and stay out of the share."""

    first: int = 0
    second: int = 0
    same: int = 0

    @property
    def decided(self) -> int:
        return self.first + self.second

    @property
    def interval(self) -> tuple[float, float]:
        """Of the second one's share among the decided votes."""
        return wilson_interval(self.second, self.decided)


class Votes:
    """One person's votes, a line of JSON each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, vote: Vote) -> Tally:
        """Raises OutputError."""
        make_folder(self.path.parent)
        append_entry(self.path, asdict(vote))
        return self.tally(vote.first, vote.second)

    def tally(self, first: str, second: str) -> Tally:
        counts: dict[str, int] = {"first": 0, "second": 0, "same": 0}
        for vote in read_journal(self.path).entries:
            choice = vote.get("choice")
            if (vote.get("first"), vote.get("second")) == (first, second) and choice in counts:
                counts[str(choice)] += 1
        return Tally(**counts)
