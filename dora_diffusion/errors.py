"""Every mistake a user can make, as one tree.

DoraDiffusionError
├── ConfigError          a configuration key or value that cannot be used
│   └── TargetError      target_modules that match no layer, or layers that cannot be adapted
├── DataError            a training folder, an image or a caption that cannot be read
├── AdapterFileError     an adapter file that is broken, unsafe or not an adapter
│   └── AdapterMismatchError   a sound adapter file that does not fit this base model
├── BaseModelError       a base model that cannot be found, loaded or used
├── PromptError          a prompt that the text encoder would cut short
├── NotEnoughMemoryError a machine or a GPU whose memory is too small for what was asked
├── OutputError          an output folder or file that cannot be written
├── AdapterStateError    a call that does not fit what was done to the adapter before (fused, ejected)
└── TrainingError        a run that cannot start, go on or be resumed

The command line prints the message and exits with status 1; the web app shows it in a panel. Each message
says what was wrong, where, and the way out.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "AdapterFileError",
    "AdapterMismatchError",
    "AdapterStateError",
    "BaseModelError",
    "ConfigError",
    "DataError",
    "DoraDiffusionError",
    "NotEnoughMemoryError",
    "OutputError",
    "PromptError",
    "TargetError",
    "TrainingError",
    "nearest",
]


class DoraDiffusionError(Exception):
    """A mistake the user can mend; the message says how."""


class ConfigError(DoraDiffusionError):
    """A configuration key or value that cannot be used."""


class TargetError(ConfigError):
    """target_modules that match no layer, or a layer that cannot be adapted."""


class DataError(DoraDiffusionError):
    """A training folder, an image or a caption that cannot be read."""


class AdapterFileError(DoraDiffusionError):
    """An adapter file that is broken, unsafe or not an adapter."""


class AdapterMismatchError(AdapterFileError):
    """A sound adapter file that does not fit this base model."""


class BaseModelError(DoraDiffusionError):
    """A base model that cannot be found, loaded or used."""


class PromptError(DoraDiffusionError):
    """A prompt that the text encoder would cut short."""


class NotEnoughMemoryError(DoraDiffusionError):
    """A machine or a GPU whose memory is too small for what was asked."""


class OutputError(DoraDiffusionError):
    """An output folder or file that cannot be written."""


class AdapterStateError(DoraDiffusionError):
    """A call that does not fit what was done to the adapter before."""


class TrainingError(DoraDiffusionError):
    """A run that cannot start, go on or be resumed."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """The known names closest in spelling to `name`, best first; empty when none is close."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)
