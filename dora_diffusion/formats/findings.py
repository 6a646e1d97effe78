"""What is found wrong with an adapter file: all of it, in one error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from dora_diffusion.formats.kinds import advice

__all__ = ["Findings", "counted", "some"]

MENTIONED = 20  # keys of one sort named in a message; the rest is counted


@dataclass
class Findings:
    """All that does not fit, by sort; `total` counts the modules of the file.

    `foreign` is sound and of a kind that is not read here: nothing is wrong with the file.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    total: int = 0

    def __bool__(self) -> bool:
        return bool(self.all())

    def add_foreign(self, kinds: Mapping[str, str]) -> None:
        """Modules with what they are, one line for each kind."""
        for kind in dict.fromkeys(kinds.values()):
            first, *others = [module for module, its in kinds.items() if its == kind]
            more = f" and {len(others)} more modules" if others else ""
            way = f" ({advice(kind)})" if advice(kind) else ""
            self.foreign.append(f"{kind}, which is not read here{way}: {first}{more}")

    def all(self) -> list[str]:
        return [*self.foreign, *self.missing, *self.unexpected, *self.misshapen]

    def lines(self) -> str:
        sorts = {"not read": self.foreign, "missing": self.missing}
        sorts |= {"unexpected": self.unexpected, "misshapen": self.misshapen}
        return "".join(f"\n{name}:\n  " + some(keys, "\n  ") for name, keys in sorts.items() if keys)

    def way_out(self) -> str:
        if self.missing or self.misshapen:
            return (
                "It is damaged or incomplete: download or save it again, or load what is sound of it with "
                "partial=True (--partial)."
            )
        if self.foreign and not self.unexpected:
            return "The file is sound. Load the rest of it with partial=True (--partial), if that is what you want."
        return "Load the rest of it with partial=True (--partial), if that is what you want."


def counted(number: int, what: str = "key") -> str:
    """ "1 key", "2 keys"."""
    return f"{number} {what}" + "s" * (number != 1)


def some(keys: list[str], between: str = ", ") -> str:
    more = f"{between}and {len(keys) - MENTIONED} more" if len(keys) > MENTIONED else ""
    return between.join(keys[:MENTIONED]) + more
