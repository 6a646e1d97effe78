"""A hundred common things: they weigh most in training, and the evaluation asks for them."""

from __future__ import annotations

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
    "balloon", "wrapped gift", "open book", "scissors",
)  # fmt: skip
