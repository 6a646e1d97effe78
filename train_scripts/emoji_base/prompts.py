"""The hundred prompts of the evaluation: common things, each style in turn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .icons import BASE_SETS, Icon

COMMON_THINGS = (
    "red apple", "banana", "strawberry", "watermelon", "grapes", "pineapple", "lemon", "cherries",
    "peach", "pear", "tomato", "carrot", "eggplant", "avocado", "mushroom", "bread", "croissant",
    "pizza", "hamburger", "french fries", "hot dog", "taco", "popcorn", "doughnut", "cookie",
    "birthday cake", "ice cream", "chocolate bar", "lollipop", "beer mug", "wine glass",
    "cat face", "dog face", "mouse face", "rabbit face", "fox", "bear", "panda", "koala",
    "tiger face", "lion", "cow face", "pig face", "frog", "monkey face", "chicken", "penguin",
    "bird", "duck", "owl", "unicorn", "honeybee", "butterfly", "snail", "lady beetle", "spider",
    "turtle", "snake", "octopus", "crab", "fish", "dolphin", "whale", "shark", "elephant",
    "tulip", "rose", "sunflower", "cactus", "palm tree", "evergreen tree", "maple leaf",
    "full moon", "sun", "star", "cloud", "rainbow", "snowflake", "fire", "droplet",
    "automobile", "bus", "bicycle", "airplane", "rocket", "sailboat", "house", "castle",
    "umbrella", "soccer ball", "basketball", "guitar", "trophy", "crown", "key", "light bulb",
    "balloon", "wrapped gift", "book", "scissors",
)  # fmt: skip
# Where an icon name is not what one would say first.
KNOWN_AS = {"book": "open book"}


@dataclass(frozen=True)
class Prompt:
    """A caption with what its picture should be."""

    text: str
    name: str
    style: str
    seed: int


def evaluation_prompts(icons: Iterable[Icon]) -> list[Prompt]:
    """All hundred, in styles in which the thing was seen."""
    seen = {(icon.name, icon.style) for icon in icons}
    styles = [info.style for info in BASE_SETS]
    prompts = []
    for k, thing in enumerate(COMMON_THINGS):
        name = KNOWN_AS.get(thing, thing)
        turn = [styles[(k + j) % len(styles)] for j in range(len(styles))]
        style = next((s for s in turn if (name, s) in seen), None)
        if style is None:
            raise LookupError(f"{name!r} is not among the training icons")
        prompts.append(Prompt(f"{name}, {style} style", name, style, seed=k))
    return prompts
