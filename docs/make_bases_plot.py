"""Draws docs/bases.png from the table in docs/bases.md.

python docs/make_bases_plot.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PAGE = Path(__file__).parent / "bases.md"
BASES = {"emoji": "UNet", "emoji-dit": "transformer"}


def rows_of(base: str) -> list[list[float]]:
    """Hours, taught share, loss of the base and with the DoRA."""
    rows = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] == base:
            rows.append([float(cells[i].removesuffix(" %")) for i in (1, 2, 5, 6)])
    return rows


def main() -> None:
    figure, places = plt.subplots(1, len(BASES), figsize=(9, 3.4), layout="constrained")
    for place, (base, kind) in zip(places, BASES.items()):
        hours, taught, before, after = zip(*rows_of(base))
        place.plot(hours, before, "o--", color="#6b7280", label="loss of the base")
        place.plot(hours, after, "o-", color="#2563eb", label="loss with the DoRA")
        place.set(title=f"{base} ({kind})", xlabel="hours of its training", ylabel="held-out loss")
        share = place.twinx()
        share.plot(hours, taught, "s:", color="#d97706", label="taught, % of pictures")
        share.set(ylim=(0, 100), ylabel="% in the taught style")
        lines = [*place.get_lines(), *share.get_lines()]
    figure.legend(lines, [str(line.get_label()) for line in lines], ncols=3, loc="outside lower center", frameon=False)
    figure.savefig(PAGE.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
