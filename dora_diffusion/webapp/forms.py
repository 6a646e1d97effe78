"""What people type, as requests: every limit is checked here, since a request need not come from the page's sliders."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.comparison.export import Record
from dora_diffusion.comparison.request import CompareRequest, parse_size
from dora_diffusion.errors import ConfigError, DoraDiffusionError, PromptError
from dora_diffusion.models.quantising import base_label
from dora_diffusion.webapp.heavy import ready
from dora_diffusion.webapp.studio import Studio

__all__ = [
    "MOST_SEEDS",
    "MOST_STEPS",
    "Chosen",
    "changed_settings",
    "compare_request",
    "parse_seeds",
    "parse_strengths",
    "restored",
    "sweep_of",
]

MOST_SEEDS = 8
MOST_STEPS = 100
MOST_STRENGTH = 1.5
MOST_GUIDANCE = 30
MOST_LETTERS = 2000
MOST_SIDE = 2048


@dataclass(frozen=True)
class Chosen:
    """An adapter by its key, at a strength."""

    key: str
    strength: float


def parse_seeds(text: str) -> tuple[int, ...]:
    """ "1, 2 3" as (1, 2, 3). Raises ConfigError."""
    words = [word for word in re.split(r"[,;\s]+", text.strip()) if word]
    if not words or not all(re.fullmatch(r"[0-9]{1,18}", word) for word in words):
        raise ConfigError(f"seeds is {text[:40]!r}; give whole numbers with commas between, such as 1, 2.")
    return _few_seeds([int(word) for word in words])


def _few_seeds(seeds: list[int]) -> tuple[int, ...]:
    if len(seeds) > MOST_SEEDS:
        raise ConfigError(f"{len(seeds)} seeds are more than the {MOST_SEEDS} this page draws at once. Give fewer.")
    return tuple(dict.fromkeys(seeds))


def parse_strengths(text: str) -> tuple[float, ...]:
    """ "0.5, 1" as (0.5, 1.0). Raises ConfigError."""
    words = [word for word in re.split(r"[,;\s]+", text.strip()) if word]
    try:
        values = [_strength(float(word)) for word in words]
    except ValueError as error:
        raise ConfigError(f"strengths is {text[:40]!r}; give numbers with commas between, such as 0.5, 1.") from error
    return tuple(dict.fromkeys(values))


def _strength(value: float | None) -> float:
    if value is None or not (math.isfinite(value) and 0 <= value <= MOST_STRENGTH):
        raise ConfigError(f"strength is {_shown(value)}; it must be between 0 and {MOST_STRENGTH}.")
    return float(value)


def _prompt(text: str) -> str:
    if not text.strip():
        raise PromptError("there is no prompt. Write what to draw, such as: tulip, openmoji style.")
    if len(text) > MOST_LETTERS:
        raise PromptError(f"a prompt of {len(text)} letters is longer than any base reads. Shorten it.")
    return text.strip()


def _lines(text: str) -> tuple[str, ...]:
    """A prompt on each line, at least one."""
    return tuple(_prompt(line) for line in text.splitlines() if line.strip()) or (_prompt(""),)


def _negative(text: str) -> str:
    return text.strip()[:MOST_LETTERS]


def _steps(value: float | None) -> int:
    if value is None or not (math.isfinite(value) and 1 <= value <= MOST_STEPS):
        raise ConfigError(f"steps is {_shown(value)}; it must be between 1 and {MOST_STEPS}.")
    return int(value)


def _shown(value: float | None) -> str:
    """An emptied field comes as None."""
    return "empty" if value is None else f"{value:g}"


def _guidance(text: str) -> float | None:
    """None, for the base's own, when nothing is written."""
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError as error:
        raise ConfigError(f"guidance is {text[:40]!r}; give a number, or nothing for the base's own.") from error
    if not 0 <= value <= MOST_GUIDANCE:
        raise ConfigError(f"guidance is {value:g}; it must be between 0 and {MOST_GUIDANCE}.")
    return value


def _size(text: str) -> tuple[int | None, int | None]:
    width, height = parse_size(text)
    if max(width or 0, height or 0) > MOST_SIDE:
        raise ConfigError(f"size is {text.strip()}; this page draws at most {MOST_SIDE} pixels a side.")
    return width, height


def compare_request(
    studio: Studio,
    visitor: str,
    prompt: str,
    seeds: str | list[int],
    chosen: list[Chosen],
    steps: float = 25,
    guidance: str = "",
    negative_prompt: str = "",
    size: str = "",
    partial: bool = False,
) -> tuple[CompareRequest, tuple[str, ...]]:
    """The request, and below each column's heading the name of its base or file. Raises DoraDiffusionError."""
    ready()
    from dora_diffusion.comparison.compare import columns_of

    prompt, steps = _prompt(prompt), _steps(steps)
    numbers = parse_seeds(seeds) if isinstance(seeds, str) else _few_seeds([int(seed) for seed in seeds])
    strengths = [_strength(each.strength) for each in chosen]
    width, height = _size(size)
    shelved = [studio.shelf.find(each.key, visitor) for each in chosen]
    request = CompareRequest(
        prompts=(prompt,),
        seeds=numbers,
        adapters=columns_of([each.path for each in shelved], strengths, partial),
        negative_prompt=_negative(negative_prompt),
        num_inference_steps=steps,
        guidance_scale=_guidance(guidance),
        width=width,
        height=height,
        partial=partial,
    )
    return request, (studio.base_name, *(each.label for each in shelved))


def sweep_of(
    studio: Studio,
    visitor: str,
    prompts: str,
    seeds: str,
    strengths: str,
    keys: list[str],
    steps: float,
    guidance: str = "",
    negative_prompt: str = "",
    size: str = "",
    partial: bool = False,
) -> tuple[CompareRequest, tuple[str, ...]]:
    """A sweep, a prompt on each line. Raises DoraDiffusionError."""
    ready()
    from dora_diffusion.comparison.sweep import sweep_request

    lines, (width, height) = _lines(prompts), _size(size)
    shelved = [studio.shelf.find(key, visitor) for key in keys if key]
    values = parse_strengths(strengths)
    paths = [each.path for each in shelved]
    request = sweep_request(
        lines,
        parse_seeds(seeds),
        values,
        paths,
        num_inference_steps=_steps(steps),
        guidance_scale=_guidance(guidance),
        negative_prompt=_negative(negative_prompt),
        width=width,
        height=height,
        partial=partial,
    )
    labels = [each.label for each in shelved for _ in values]
    return request, (studio.base_name, *labels)


def changed_settings(
    request: CompareRequest,
    paths: list[Path],
    prompts: str,
    seeds: str,
    strengths: str | list[float],
    steps: float,
    guidance: str,
    negative_prompt: str,
    size: str,
    partial: bool,
) -> list[str]:
    """What the form asks for otherwise than the request did, in its own words.

    `paths` are the adapters that are chosen; a sweep's form has its prompts on lines, and its strengths as text.
    """
    is_sweep = isinstance(strengths, str)
    drawn_at = [column.strength for column in request.adapters]
    drawn_with = [column.path for column in request.adapters]
    pairs: dict[str, tuple[object, Callable[[], object]]] = {
        "prompt": (request.prompts, lambda: _lines(prompts) if is_sweep else (_prompt(prompts),)),
        "seeds": (request.seeds, lambda: parse_seeds(seeds)),
        "adapters": (list(dict.fromkeys(drawn_with)) if is_sweep else drawn_with, lambda: paths),
        "steps": (request.num_inference_steps, lambda: _steps(steps)),
        "guidance": (request.guidance_scale, lambda: _guidance(guidance)),
        "negative prompt": (request.negative_prompt, lambda: _negative(negative_prompt)),
        "size": ((request.width, request.height), lambda: _size(size)),
        "what is loaded": (request.partial, lambda: partial),
    }
    if isinstance(strengths, str):
        pairs["strengths"] = (tuple(dict.fromkeys(drawn_at)), lambda: parse_strengths(strengths))
    elif drawn_with == paths:
        pairs["strength"] = (drawn_at, lambda: strengths)
    return [name for name, (drawn, asked) in pairs.items() if not _same(drawn, asked)]


def _same(drawn: object, asked: Callable[[], object]) -> bool:
    """Whether the form asks for what was drawn; one that cannot be read asks for something else."""
    try:
        return drawn == asked()
    except DoraDiffusionError:
        return False


def restored(studio: Studio, visitor: str, record: Record) -> tuple[list[Chosen | None], list[str]]:
    """The record's first two files, found again by their bytes, and what cannot be restored, in words."""
    found: list[Chosen | None] = []
    missing = []
    first_of = {adapter.sha256: adapter for adapter in reversed(record.adapters)}  # a sweep has each at many strengths
    files = list(dict.fromkeys(adapter.sha256 for adapter in record.adapters))
    of_a_sweep = len(record.prompts) > 1 or len(record.adapters) > 2
    for adapter in [first_of[digest] for digest in files[:2]] if of_a_sweep else record.adapters:
        shelved = studio.shelf.find_digest(adapter.sha256, visitor)
        found.append(Chosen(shelved.key, adapter.strength) if shelved else None)
        if shelved is None:
            missing.append(f"the adapter {adapter.name} ({adapter.label}) is not here: upload it, then choose it")
    drawn_with = base_label(record.base, record.quantise)
    if drawn_with != studio.base_label:
        missing.append(f"the picture was drawn with the base {drawn_with}, this server draws with {studio.base_label}")
    if of_a_sweep:
        missing.append("it belongs to a sweep: its first prompt and adapters are restored")
    return found, missing
