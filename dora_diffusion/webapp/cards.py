"""The adapter card: what a file is, and how it fits the base, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from dora_diffusion.errors import AdapterFileError
from dora_diffusion.webapp.heavy import ready
from dora_diffusion.webapp.pictures import url_of
from dora_diffusion.webapp.wording import LOAD_WHAT_FITS

if TYPE_CHECKING:
    from dora_diffusion.comparison.card import AdapterCard
    from dora_diffusion.formats.files import Fit
    from dora_diffusion.inspection.parity import Parity
    from dora_diffusion.webapp.shelf import Shelved
    from dora_diffusion.webapp.studio import Studio

__all__ = ["full_card", "inspection", "short_card"]

MENTIONED = 3


def short_card(shelved: Shelved | None) -> str:
    """One line below the picker. Raises AdapterFileError."""
    if shelved is None:
        return "<p class='dd-card'>this column stays empty</p>"
    ready()
    from dora_diffusion.comparison.card import card_of

    card = card_of(shelved.path)
    facts = f"<b>{card.kind}</b> · rank {card.rank} · alpha {card.alpha:g} · {card.layers} layers"
    return f"<p class='dd-card'>{facts}{_left_out(card)}</p>"


def _left_out(card: AdapterCard) -> str:
    """What the box beside the pickers is for."""
    from dora_diffusion.formats.findings import counted

    if not card.left_out:
        return ""
    return f" · <span class='dd-nothing'>not read: {counted(card.left_out)}, so tick “{LOAD_WHAT_FITS}”</span>"


def full_card(shelved: Shelved, studio: Studio) -> str:
    """Everything about the file. Raises AdapterFileError."""
    ready()
    from dora_diffusion.comparison.card import card_of

    card = card_of(shelved.path)
    fit = studio.painter.fit(shelved.path)
    rows = "".join(f"<tr><th scope='row'>{escape(name)}</th><td>{value}</td></tr>" for name, value in _rows(card, fit))
    return (
        f"<section class='dd-facts'><h3>{escape(shelved.label)}</h3><div class='dd-scroll' tabindex='0' role='region' "
        f"aria-label='facts of {escape(shelved.label, quote=True)}'><table>{rows}</table></div></section>"
    )


def _rows(card: AdapterCard, fit: Fit | None) -> list[tuple[str, str]]:
    from dora_diffusion.formats.findings import counted

    base = f"{escape(card.base_name)} ({escape(card.base_class)}), fingerprint {card.base_fingerprint}"
    return [
        ("kind, by its tensors", card.kind),
        ("rank, alpha", f"{card.rank}, {card.alpha:g}"),
        ("targets", escape(", ".join(card.targets))),
        ("layers", str(card.layers) + (f"; not read: {counted(card.left_out)}" if card.left_out else "")),
        ("trainable parameters", f"{card.parameters:,}"),
        ("size", f"{card.size / 1024:,.0f} KiB"),
        ("SHA-256", f"<code>{card.sha256}</code>"),
        ("trained on", base if card.base_fingerprint else "the file does not say"),
        ("steps", str(card.steps) if card.steps is not None else "the file does not say"),
        ("this base", _fit(card, fit)),
    ]


def _fit(card: AdapterCard, fit: Fit | None) -> str:
    if fit is None:
        return "the base is not loaded yet"
    text = f"{fit.matched} of {card.layers} layers matched"
    if fit.unmatched:
        lines = "; ".join(escape(line) for line in fit.unmatched[:MENTIONED])
        more = f" and {len(fit.unmatched) - MENTIONED} more" if len(fit.unmatched) > MENTIONED else ""
        return f"<span class='dd-nothing'>{text}</span>; {lines}{more}"
    if not fit.same_weights:
        return f"{text}; <span class='dd-nothing'>other weights (fingerprint {fit.fingerprint})</span>"
    return f"{text}, the weights it was trained on"


def inspection(shelved: list[Shelved], studio: Studio) -> str:
    """What the adapters changed in the base, as a plot, and what other programs make of their files.

    Waits for its turn on the base. Raises DoraDiffusionError.
    """
    ready()
    from dora_diffusion.inspection.look import comparable, look_at
    from dora_diffusion.inspection.parity import compare_programs
    from dora_diffusion.inspection.plots import draw_analyses
    from dora_diffusion.lettering.fonts import note_on_missing

    paths = [each.path for each in shelved]
    with studio.painter.turn(lambda _: None) as base:
        analyses = [analysis for _, analysis in look_at(paths, base) if analysis is not None]
        plot = studio.albums.new().add(draw_analyses(comparable(analyses)))
        tables = ""
        for each in shelved:
            try:
                tables += _parity_table(each.label, compare_programs(each.path, base))
            except AdapterFileError as error:  # of this file alone: one made for a single program
                tables += f"<p class='dd-card'><b>{escape(each.label)}</b>: {escape(str(error))}</p>"
    note = note_on_missing([analysis.name for analysis in analyses])
    label = "change of magnitude against change of direction, a point for each layer, and the spectra of the changes"
    return (
        f"<figure class='dd-plot'><a href='{url_of(plot)}' target='_blank'><img src='{url_of(plot)}' alt='{label}'></a>"
        f"<figcaption>{label} <span class='dd-warn'>{escape(note)}</span></figcaption></figure>"
        f"<div class='dd-cards'>{tables}</div>"
    )


def _parity_table(label: str, found: Sequence[Parity]) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{escape(each.program.label)}</th>"
        f"<td>{f'{each.read} of {each.count}' if each.known else '-'}</td><td>{_verdict(each)}</td></tr>"
        for each in found
    )
    name = escape(label, quote=True)
    return (
        f"<section class='dd-facts'><h3>{escape(label)} in other programs</h3><div class='dd-scroll' tabindex='0' "
        f"role='region' aria-label='{name} in other programs'><table><tr><th scope='col'>program</th>"
        f"<th scope='col'>layers read</th><th scope='col'>error of the update</th></tr>{rows}</table></div></section>"
    )


def _verdict(parity: Parity) -> str:
    if not parity.known:
        return escape(parity.stopped)
    if parity.stopped:
        return f"<span class='dd-nothing'>fails: {escape(parity.stopped)}</span>"
    if parity.right:
        return "right"
    return f"<span class='dd-nothing'>{100 * parity.total:.1f} %</span> {escape('; '.join(parity.reasons))}"
