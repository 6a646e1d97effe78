"""What is found wrong with an adapter file: all of it, in one error."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Findings", "some"]

MENTIONED = 20  # keys of one sort named in a message; the rest is counted


@dataclass
class Findings:
    """All that does not fit, by sort; `total` counts the modules of the file."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    total: int = 0

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def all(self) -> list[str]:
        return [*self.missing, *self.unexpected, *self.misshapen]

    def lines(self) -> str:
        sorts = {"missing": self.missing, "unexpected": self.unexpected, "misshapen": self.misshapen}
        return "".join(f"\n{name}:\n  " + some(keys, "\n  ") for name, keys in sorts.items() if keys)

    def way_out(self) -> str:
        if self.missing or self.misshapen:
            return (
                "It is damaged or incomplete: download or save it again, or load what is sound of it with partial=True."
            )
        return "Load the rest of it with partial=True, if that is what you want."


def some(keys: list[str], between: str = ", ") -> str:
    more = f"{between}and {len(keys) - MENTIONED} more" if len(keys) > MENTIONED else ""
    return between.join(keys[:MENTIONED]) + more
