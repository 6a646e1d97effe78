"""Labels that say which is which: long ones are shortened where they are alike, never where they differ."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from dora_diffusion.lettering.fonts import clusters, readable

__all__ = ["distinct", "named_apart", "wrapped"]

Length = Callable[[str], float]
Fits = Callable[[str], bool]


def distinct(texts: Sequence[str], fits: Fits) -> list[str]:
    """A label for each text, as it can be drawn and short enough to fit; texts that differ have labels that differ.

    A long text loses its middle. Where that makes it another's label, it keeps its beginning and the place where it
    differs; where that is not enough, or two texts look the same, all are numbered.
    """
    different = list(dict.fromkeys(texts))
    labels = {text: _without_middle(readable(text), fits) for text in different}
    for alike in _alike(labels):
        for text in alike:
            others = [readable(other) for other in alike if other != text]
            labels[text] = _around_difference(readable(text), others, fits)
    if _alike(labels):
        labels = {text: _without_middle(f"{i}. {readable(text)}", fits) for i, text in enumerate(different, 1)}
    return [labels[text] for text in texts]


def _alike(labels: dict[str, str]) -> list[list[str]]:
    """The texts that share a label with another."""
    often = Counter(labels.values())
    shared = {label: [text for text in labels if labels[text] == label] for label, count in often.items() if count > 1}
    return list(shared.values())


def _without_middle(text: str, fits: Fits) -> str:
    parts = clusters(text)

    def shortened(keep: int) -> str:
        return "".join([*parts[: keep - keep // 2], "…", *parts[len(parts) - keep // 2 :]])

    return text if fits(text) else _longest(shortened, len(parts) - 1, fits)


def _around_difference(text: str, others: Sequence[str], fits: Fits) -> str:
    """The beginning, and from where the text is first unlike its nearest other."""
    parts = clusters(text)
    place = max(_same_beginning(parts, clusters(other)) for other in others)

    def shortened(keep: int) -> str:
        first = keep // 4
        start = min(max(first, place - (keep - first) // 4), len(parts) - (keep - first))
        end = start + keep - first
        return "".join(
            [*parts[:first], "…" if start > first else "", *parts[start:end], "…" if end < len(parts) else ""]
        )

    return text if fits(text) else _longest(shortened, len(parts) - 1, fits)


def _longest(shortened: Callable[[int], str], most: int, fits: Fits) -> str:
    """With as many parts kept as fit; two at least, whatever fits."""
    return shortened(max(2, bisect_right(range(1, most + 1), 0, key=lambda keep: int(not fits(shortened(keep))))))


def _same_beginning(ours: Sequence[str], theirs: Sequence[str]) -> int:
    return next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))


def wrapped(text: str, width: float, length: Length) -> list[str]:
    """The text in lines of at most this width; a word that is wider, or a script without blanks, breaks anywhere."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if length(joined) <= width:
            lines[-1] = joined
            continue
        lines += [""] if lines[-1] else []
        for part in [word] if length(word) <= width else clusters(word):
            if lines[-1] and length(lines[-1] + part) > width:
                lines.append("")
            lines[-1] += part
    return lines


def named_apart(paths: Sequence[Path], folders_at_least: int = 0) -> list[str]:
    """The files' names; where two files have the same, with as many folders before as tell them apart."""

    def name(path: Path, folders: int) -> str:
        parts = (*path.parent.parts, path.stem if path.suffix == ".safetensors" else path.name)
        return "/".join(parts[max(0, len(parts) - 1 - folders) :])

    folders = dict.fromkeys(paths, folders_at_least)
    while shared := _shared({path: name(path, count) for path, count in folders.items()}):
        if all(folders[path] >= len(path.parts) for path in shared):
            break  # they differ in nothing but .safetensors
        folders |= {path: folders[path] + 1 for path in shared}
    return [name(path, folders[path]) for path in paths]


def _shared(names: dict[Path, str]) -> list[Path]:
    often = Counter(names.values())
    return [path for path, name in names.items() if often[name] > 1]
