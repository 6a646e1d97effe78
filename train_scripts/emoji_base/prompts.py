"""The prompts of the evaluation: a hundred common things and a hundred others, each style in turn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .common import COMMON_THINGS
from .icons import BASE_SETS, Icon

# How every picture is drawn that is looked at or measured.
STEPS, GUIDANCE = 25, 5.0
OTHERS = 100  # how many of the things that are not common are asked for as well


@dataclass(frozen=True)
class Prompt:
    """A caption with what its picture should be."""

    text: str
    name: str
    style: str
    seed: int


def evaluation_prompts(icons: Iterable[Icon]) -> list[Prompt]:
    """All hundred, in styles in which the thing was seen."""
    return _prompts(COMMON_THINGS, icons)


def other_prompts(icons: Sequence[Icon]) -> list[Prompt]:
    """A hundred of the other things that the base saw, from all over the alphabet."""
    others = sorted({icon.name for icon in icons} - set(COMMON_THINGS))
    return _prompts(others[:: len(others) // OTHERS][:OTHERS], icons)


def _prompts(names: Sequence[str], icons: Iterable[Icon]) -> list[Prompt]:
    seen = {(icon.name, icon.style) for icon in icons}
    styles = [info.style for info in BASE_SETS]
    prompts = []
    for k, name in enumerate(names):
        turn = [styles[(k + j) % len(styles)] for j in range(len(styles))]
        style = next((s for s in turn if (name, s) in seen), None)
        if style is None:
            raise LookupError(f"{name!r} is not among the training icons")
        prompts.append(Prompt(f"{name}, {style} style", name, style, seed=k))
    return prompts
