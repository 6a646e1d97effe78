"""Blind votes: which of two pictures people prefer, and how sure that is.

Once a vote has told who drew which, another one on the same two pictures is blind no more: each pair counts once.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from PIL import Image

from dora_diffusion.journal import append_entry, read_journal
from dora_diffusion.outputs import make_folder

__all__ = ["Choice", "Tally", "Vote", "Votes", "pictures_digest", "wilson_interval"]

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
    """One choice between two columns, named as people know them; `first` is the one further left in the comparison.

    `pictures` stands for the two that were shown, as `pictures_digest` gives it.
    """

    first: str
    second: str
    choice: Choice
    prompt: str
    seed: int
    pictures: str = ""


def pictures_digest(first: Path, second: Path) -> str:
    """What stands for two pictures in any order: of their pixels, so that a new file of the same is known again."""
    digests = []
    for path in (first, second):
        with Image.open(path) as image:
            digests.append(hashlib.sha256(repr((image.mode, image.size)).encode() + image.tobytes()).hexdigest())
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()[:32]


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

    _writing = threading.Lock()  # one for all files: a person may have several pages open

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, vote: Vote) -> bool:
        """Whether it was counted: of the votes on the same pictures only the first is. Raises OutputError."""
        make_folder(self.path.parent)
        with self._writing:
            if vote.pictures and vote.pictures in self.voted():
                return False
            append_entry(self.path, asdict(vote))
        return True

    def voted(self) -> frozenset[str]:
        """The pairs of pictures that were voted on, as `pictures_digest` gives them."""
        return frozenset(vote.pictures for vote in self._all())

    def tally(self, first: str, second: str) -> Tally:
        """All votes on these two, whichever of them stood further left."""
        counts: dict[str, int] = {"first": 0, "second": 0, "same": 0}
        other: dict[str, Choice] = {"first": "second", "second": "first", "same": "same"}
        for vote in self._all():
            if (vote.first, vote.second) == (first, second):
                counts[vote.choice] += 1
            elif (vote.first, vote.second) == (second, first):
                counts[other[vote.choice]] += 1
        return Tally(**counts)

    def _all(self) -> Iterator[Vote]:
        for entry in read_journal(self.path).entries:
            if entry.get("choice") in get_args(Choice):
                with contextlib.suppress(TypeError):  # a line of something else
                    yield Vote(**entry)  # type: ignore[arg-type]
