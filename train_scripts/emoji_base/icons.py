"""The icon sets: which names the base learns, their SVG text and their captions."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dora_diffusion.errors import DataError

from .common import COMMON_THINGS

IMAGE_SIZE = 64
# Share of captions that name a style nobody knows, so that such a word leaves the picture whole.
UNKNOWN_STYLES = 0.12


@dataclass(frozen=True)
class SetInfo:
    """One npm icon set: its folder, the caption word for its style, and its licence."""

    folder: str
    style: str
    title: str
    author: str
    licence: str
    url: str


BASE_SETS: tuple[SetInfo, ...] = (
    SetInfo("noto", "noto", "Noto Emoji", "Google Inc", "Apache-2.0",
            "https://github.com/googlefonts/noto-emoji"),
    SetInfo("noto-v1", "classic", "Noto Emoji (v1)", "Google Inc", "Apache-2.0",
            "https://github.com/googlefonts/noto-emoji"),
    SetInfo("fluent-emoji-flat", "fluent", "Fluent UI Emoji, flat", "Microsoft Corporation", "MIT",
            "https://github.com/microsoft/fluentui-emoji"),
    SetInfo("twemoji", "twemoji", "Twitter Emoji (Twemoji)", "Twitter", "CC-BY-4.0",
            "https://github.com/twitter/twemoji"),
)  # fmt: skip

# Never trained on: these are the styles that adapters are taught afterwards.
HELD_OUT_SETS: tuple[SetInfo, ...] = (
    SetInfo("openmoji", "openmoji", "OpenMoji", "OpenMoji", "CC-BY-SA-4.0",
            "https://github.com/hfg-gmuend/openmoji"),
    SetInfo("fluent-emoji", "glossy", "Fluent UI Emoji, shaded", "Microsoft Corporation", "MIT",
            "https://github.com/microsoft/fluentui-emoji"),
)  # fmt: skip

CATEGORIES = ("Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
# Dull or near-identical things that would only use up the small model's capacity.
LEFT_OUT = re.compile(
    r"o-?clock|thirty|^\d|keycap|button|symbol|arrow|flag|skin-tone|handshake|cricket"
    r"|(quarter|gibbous|waning|waxing|new)-?.*moon|volume|muted|banknote|locked-with|oncoming"
    r"|^page-|tray$|wheelchair|identification|incoming|^chart-|kaaba|love-hotel|slider"
    r"|^(ok|no|on|up|id|ng|vs|soon|end|back|top)$|^(man|woman|person|people|men|women|boy|girl)\b"
    r"|-suit$|mahjong|medal|-face$.*moon|card-index|card-file"
)


@dataclass(frozen=True)
class Icon:
    """One picture to be: a spoken name, its style word, and SVG text."""

    name: str
    variants: tuple[str, ...]
    style: str
    svg: str
    weight: float = 1.0


class IconSet:
    """The visible icons of one set, found by their own name or an alias."""

    def __init__(self, root: Path, info: SetInfo) -> None:
        folder = root / info.folder
        data = json.loads((folder / "icons.json").read_text(encoding="utf-8"))
        self.info = info
        self._bodies = {k: v for k, v in data["icons"].items() if not v.get("hidden")}
        self._size = (data.get("width", 16), data.get("height", 16))
        # An alias that also flips or rotates is another picture.
        self.aliases = {k: v["parent"] for k, v in data.get("aliases", {}).items() if set(v) == {"parent"}}
        meta = folder / "metadata.json"
        self.categories: dict[str, list[str]] = (
            json.loads(meta.read_text(encoding="utf-8")).get("categories", {}) if meta.exists() else {}
        )

    def names(self) -> set[str]:
        """All visible names, aliases not counted."""
        return set(self._bodies)

    def svg(self, name: str, stroke: float = 0.0) -> str:
        """The icon as a 64-pixel SVG; `stroke` (pixels) outlines every shape that has no line."""
        icon = self._bodies[name]
        width, height = icon.get("width", self._size[0]), icon.get("height", self._size[1])
        left, top = icon.get("left", 0), icon.get("top", 0)
        body = icon["body"]
        if stroke:
            line = stroke * max(width, height) / IMAGE_SIZE
            body = f'<g stroke="#000" stroke-width="{line:.2f}" stroke-linejoin="round">{body}</g>'
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" '
            f'width="{IMAGE_SIZE}" height="{IMAGE_SIZE}">{body}</svg>'
        )


def load_sets(root: Path, infos: Iterable[SetInfo]) -> list[IconSet]:
    """Read icon sets from the folder that holds them (npm's `node_modules/@iconify-json`)."""
    nested = root / "node_modules" / "@iconify-json"
    folder = nested if nested.is_dir() else root
    missing = [i.folder for i in infos if not (folder / i.folder / "icons.json").exists()]
    if missing:
        wanted = " ".join(f"@iconify-json/{name}" for name in missing)
        raise DataError(f"{folder} lacks {', '.join(missing)}: npm install {wanted}")
    return [IconSet(folder, info) for info in infos]


class NameIndex:
    """Joins the sets' names: names that any set lists as aliases of each other are one thing."""

    def __init__(self, sets: Iterable[IconSet]) -> None:
        self._parent: dict[str, str] = {}
        counts: Counter[str] = Counter()
        for icon_set in sets:
            counts.update(icon_set.names())
            for alias, name in icon_set.aliases.items():
                self._parent[self._root(alias)] = self._root(name)
        groups: dict[str, list[str]] = {}
        for name in sorted(set(counts) | set(self._parent)):
            groups.setdefault(self._root(name), []).append(name)
        # The name that most sets use speaks for the group.
        self._groups = {max(group, key=lambda n: (counts[n], -len(n), n)): group for group in groups.values()}

    def _root(self, name: str) -> str:
        while (above := self._parent.get(name, name)) != name:
            name = above
        return name

    def groups(self) -> dict[str, list[str]]:
        """Every thing's chief name, with all the names it goes by."""
        return self._groups


def spoken(name: str) -> str:
    """`red-apple` as a caption says it."""
    return name.replace("-", " ")


def _wanted_names(sets: list[IconSet], categories: Sequence[str]) -> set[str]:
    wanted = {name for s in sets for c in categories for name in s.categories.get(c, ())}
    return {name for name in wanted if not LEFT_OUT.search(name)}


def select_icons(sets: list[IconSet], most_words: int = 3, stroke: float = 0.0) -> list[Icon]:
    """Icons of the wanted categories: animals and foods of three sets, other things of all four.

    Common things weigh most: they are what people ask for first and judge hardest. `stroke` (pixels) outlines them.
    """
    wanted = _wanted_names(sets, CATEGORIES)
    living = _wanted_names(sets, CATEGORIES[:2])
    icons: list[Icon] = []
    for chief, group in sorted(NameIndex(sets).groups().items()):
        if not wanted.intersection(group) or any(LEFT_OUT.search(n) for n in group):
            continue
        found = [(s, next((n for n in [chief, *group] if n in s.names()), None)) for s in sets]
        least = len(sets) - 1 if living.intersection(group) else len(sets)
        if sum(name is not None for _, name in found) < least:
            continue
        if len(chief.split("-")) > most_words:
            continue
        variants = tuple(spoken(n) for n in group if n != chief and len(n.split("-")) <= 4)
        weight = 3.0 if spoken(chief) in COMMON_THINGS else 1.5 if living.intersection(group) else 1.0
        icons += [Icon(spoken(chief), variants, s.info.style, s.svg(name, stroke), weight) for s, name in found if name]
    return icons


def vocabulary(sets: Iterable[IconSet]) -> set[str]:
    """Every plain word in the sets' names, for the tokenizer."""
    names = {n for s in sets for n in s.names() if "flag" not in n and "skin" not in n}
    return {w for n in names for w in n.split("-") if re.fullmatch("[a-z]{2,14}", w)}


def caption(icon: Icon, draw: random.Random) -> str:
    """A training caption: mostly "NAME, STYLE style", with parts dropped now and then."""
    name = icon.name if not icon.variants or draw.random() < 0.85 else draw.choice(icon.variants)
    lead = draw.random()
    if lead < 0.10:
        name = f"a {name}"
    elif lead < 0.15:
        name = f"a picture of a {name}"
    drop = draw.random()
    if drop < 0.10:
        return ""
    if drop < 0.13:
        return f"{icon.style} style"
    if drop < 0.17:
        return name
    if drop < 0.17 + UNKNOWN_STYLES:
        return f"{name}, {invented_word(draw)} style"
    return f"{name}, {icon.style} style"


def invented_word(draw: random.Random) -> str:
    """A word that no caption has, such as those that people call their own styles by."""
    syllables = [draw.choice("bcdfghjklmnprstvwz") + draw.choice("aeiou") for _ in range(draw.randint(2, 4))]
    return "".join(syllables) + draw.choice(("", "n", "s", "x"))
