"""Errors in the words of the page's forms: a visitor sees fields, never the keys of a configuration file."""

from __future__ import annotations

import re

from pydantic import ValidationError

from dora_diffusion.errors import ConfigError

__all__ = ["FIELDS", "LOAD_WHAT_FITS", "MORE", "form_error", "in_form_words"]

LOAD_WHAT_FITS = "Load what fits of a file"  # the box on the Compare tab
# Keys of TrainConfig that are true when chosen, as the form and its checklist have them.
MORE = {
    "random_flip": "Mirror pictures at random",
    "train_feed_forward": "Feed-forward layers too",
    "train_convolutions": "Convolutions of a UNet too",
    "train_text_encoder": "Text encoder too",
    "cut_captions": "Cut captions that are too long",
}
FIELDS = {
    "instance_prompt": "Caption of pictures that have none",
    "kind": "Adapters",
    "steps": "Steps of each",
    "rank": "Rank",
    "alpha": "Rank",  # it is as large, always
    "batch_size": "Batch size",
    "learning_rate": "Learning rate",
    "seed": "Seed",
    "norm_axis": "DoRA's norm",
    "start_from": "Go on from",
    "save_every": "Keep the adapters on the way",
    "preview_prompts": "Preview prompt",
    **MORE,
}
# Several words in one are a key wherever they stand; a single one, such as rank, where a line sets it.
KEY = re.compile(rf"\b({'|'.join(key for key in FIELDS if '_' in key)})\b(?: = (?:true|false)\b)?")
LINE = re.compile(rf"^( *)({'|'.join(FIELDS)})(?= = |:)", re.MULTILINE)
KNOWN_KEYS = re.compile(r": known keys: [a-z_, ]+")
MEMORY = re.compile(r" What needs less: .*\(keys of the configuration.*", re.DOTALL)


def in_form_words(message: str) -> str:
    """The message of any error with the form's fields in place of keys."""
    message = KNOWN_KEYS.sub(", which this version does not know", MEMORY.sub(_less_memory, message))
    message = message.replace("partial=True (--partial)", f"“{LOAD_WHAT_FITS}”")
    message = LINE.sub(lambda found: f"{found[1]}“{FIELDS[found[2]]}”", message)
    return KEY.sub(lambda found: f"“{FIELDS[found[1]]}”", message)


def _less_memory(advice: re.Match[str]) -> str:
    """What of the advice a visitor can follow; an app is packed where packing helps."""
    packed = ", or an app that is started with --quantise nf4" if "nf4" in advice[0] else ""
    return (
        f" What needs less: a smaller “{FIELDS['batch_size']}”{packed}. The command line can do more: the run's "
        "config is there to be downloaded."
    )


def form_error(error: ConfigError) -> ConfigError:
    """What is wrong with the form's values, a line for each field."""
    cause = error.__cause__
    if not isinstance(cause, ValidationError):
        return error
    lines = []
    for problem in cause.errors():
        key = str(problem["loc"][0]) if problem["loc"] else ""
        said = problem["msg"].removeprefix("Value error, ")
        said = said[:1].lower() + said[1:]
        lines.append(f"“{FIELDS[key]}” is {problem['input']!r}: {said}." if key in FIELDS else in_form_words(said))
    return ConfigError("\n".join(dict.fromkeys(lines)))
