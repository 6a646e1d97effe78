"""How the pages look: Gradio's theme with the system's own fonts, and a little CSS for the pieces of parts.py."""

from __future__ import annotations

import gradio as gr

__all__ = ["CSS", "HEAD", "theme"]

SYSTEM_FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")


def theme() -> gr.themes.Base:
    """No font of it is fetched from anywhere: plain names are the visitor's own fonts."""
    return gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        radius_size="md",
        font=SYSTEM_FONTS,
        font_mono=("ui-monospace", "Consolas", "monospace"),
    ).set(
        # Gradio's own grey on white is below the contrast of 4.5 that small text needs.
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        input_placeholder_color="*neutral_500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_cancel_background_fill="#dc2626",
        button_cancel_background_fill_hover="#b91c1c",
        button_cancel_text_color="white",
    )


# The page's frame. It goes into the head: launch(css=...) rewrites selectors, and those of the frame no longer match.
HEAD = """<style>
.gradio-container { width: 100% !important; max-width: 1180px !important;
  margin: 0 auto !important; padding: 0 16px 32px !important; }
.gradio-container .html-container { padding: 0 !important; }
.gradio-container .prose { max-width: none; }
/* The caption table sizes itself by its longest text: it must scroll inside its own box, never widen the page. */
#captions { contain: inline-size; overflow-x: auto; }
button[role="tab"][aria-selected="true"] { color: #1d4ed8 !important; }
.dark button[role="tab"][aria-selected="true"] { color: #93c5fd !important; }
@media (max-width: 640px) {
  .gradio-container { padding: 0 0 24px !important; }
  .gradio-container .main { padding: 8px 14px !important; }
}
</style>"""

# The pieces of parts.py, for launch(css=...), whose rewriting makes them stronger than Gradio's own rules for texts.
CSS = """
#top { align-items: center; gap: 8px; padding: 14px 0 2px; flex-wrap: wrap; }
#top > * { flex: 0 1 auto; width: auto; }
#top .dd-right { margin-left: auto; } #top #stop-job { min-width: 96px; flex: none; }
.dd-brand { display: flex; align-items: baseline; gap: 4px 14px; flex-wrap: wrap; }
.dd-brand h1 { font-size: 1.35rem; font-weight: 700; margin: 0; letter-spacing: -.01em; }
.dd-brand p { margin: 0; color: var(--body-text-color-subdued); font-size: .9rem; }
.dd-chip { display: inline-block; padding: 4px 12px; border-radius: 99px; font-size: .85rem; font-weight: 600;
  font-variant-numeric: tabular-nums; background: var(--background-fill-secondary);
  border: 1px solid var(--border-color-primary); }
.dd-chip.dd-training, .dd-chip.dd-preparing { border-color: #2563eb; color: #2563eb; }
.dd-chip.dd-finished { border-color: #15803d; color: #15803d; }
.dd-chip.dd-stopped, .dd-chip.dd-interrupted, .dd-chip.dd-waiting { border-color: #b45309; color: #b45309; }
.dark .dd-chip.dd-stopped, .dark .dd-chip.dd-interrupted, .dark .dd-chip.dd-waiting { color: #fcd34d; }
.dd-chip.dd-failed { border-color: #dc2626; color: #dc2626; }
.dark .dd-chip.dd-training, .dark .dd-chip.dd-preparing { color: #93c5fd; }
.dark .dd-chip.dd-finished { color: #86efac; } .dark .dd-chip.dd-failed { color: #fca5a5; }

.dd-adapter { border: 1px solid var(--border-color-primary); border-radius: 10px; padding: 12px !important; gap: 8px; }
#captions .header-icons { display: none; } /* padlocks with a label where none may be */
#captions td, #captions th { font-family: inherit !important; font-size: .85rem; }
.dd-under { align-items: center; }
.dd-adapter .block { padding: 0 !important; border-width: 0 !important; background: none; box-shadow: none; }
.dd-adapter .block:has(input[type=range]) { padding-bottom: 5px !important; }
.dd-adapter .form { border: none; box-shadow: none; background: none; gap: 10px; }
.dd-card { font-size: .82rem; color: var(--body-text-color-subdued); min-height: 1.3em; margin: 0; }
.dd-card b { color: var(--body-text-color); }

.dd-grid { display: grid; grid-template-columns: repeat(var(--columns, 3), minmax(0, 1fr)); gap: 14px 16px; }
.dd-grid.dd-wide { grid-template-columns: repeat(var(--columns), minmax(120px, 1fr)); }
.dd-grid.dd-two { max-width: 760px; margin: 0 auto; }
.dd-scroll { overflow-x: auto; }
.dd-rowhead { grid-column: 1 / -1; margin: 8px 0 0; font-weight: 600; }
.dd-lead { margin: 4px 0 10px; color: var(--body-text-color); line-height: 1.5; }
.dd-badge { display: inline-block; margin: 0 0 10px; padding: 2px 10px; border-radius: 99px; font-size: .82rem;
  font-weight: 600; color: #92400e; background: #fef3c7; border: 1px solid #f59e0b; }
.dark .dd-badge { color: #fde68a; background: #422006; border-color: #b45309; }
.dd-changed { margin: 2px 0 8px; padding: 6px 12px; border-radius: 8px; font-size: .9rem; line-height: 1.45;
  color: #92400e; background: #fef3c7; border: 1px solid #f59e0b; }
.dark .dd-changed { color: #fde68a; background: #422006; border-color: #b45309; }
.dd-cached { color: #0f766e; } .dark .dd-cached { color: #5eead4; }
.dd-pairs { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 16px; }
.dd-pair { margin: 0; max-width: 560px; width: 100%; }
.dd-pair figcaption { display: flex; justify-content: space-between; gap: 12px; margin-top: 6px; font-size: .82rem;
  color: var(--body-text-color-subdued); } .dd-pair figcaption span:last-child { text-align: right; }
.dd-slide { --cut: 50%; position: relative; aspect-ratio: 1; overflow: hidden; border-radius: 10px;
  border: 1px solid var(--border-color-primary); background: #fff; }
.dd-pair .dd-slide img { position: absolute; inset: 0; width: 100%; height: 100%; object-fit: contain; margin: 0; }
.dd-slide img + img { clip-path: inset(0 0 0 var(--cut)); }
.dd-slide i { position: absolute; top: 0; bottom: 0; left: var(--cut); width: 3px; margin-left: -1.5px;
  background: #2563eb; box-shadow: 0 0 0 1px #fff; pointer-events: none; }
.dd-slide i::after { content: "↔"; position: absolute; top: 50%; left: 50%; width: 32px; height: 32px;
  margin: -16px; border-radius: 50%; background: #2563eb; color: #fff; font: 700 16px/32px system-ui;
  text-align: center; box-shadow: 0 0 0 2px #fff; }
.dd-slide input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; cursor: ew-resize; }
.dd-slide:focus-within { outline: 3px solid #2563eb; outline-offset: 2px; }
.dd-legend { max-width: 440px; margin-bottom: 14px; font-size: .82rem; color: var(--body-text-color-subdued); }
.dd-legend p { margin: 0 0 5px; } .dd-legend div:nth-child(2) { height: 12px; border-radius: 4px; }
.dd-marks { display: flex; justify-content: space-between; font-variant-numeric: tabular-nums; }
.dd-result { padding: 10px 14px; border-left: 4px solid #2563eb; background: var(--background-fill-secondary);
  border-radius: 6px; line-height: 1.55; } .dd-result p { margin: 0; }
.dd-links { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center; font-size: .88rem;
  color: var(--body-text-color-subdued); }
.dd-links .dd-link { padding: 5px 12px; border-radius: 8px; border: 1px solid var(--border-color-primary);
  color: var(--body-text-color); text-decoration: none; background: var(--background-fill-secondary); }
.dd-cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(280px, 1fr)); gap: 20px; }
.dd-plot { margin: 0 0 14px; } .dd-plot img { width: 100%; height: auto; border-radius: 10px; margin: 0;
  border: 1px solid var(--border-color-primary); background: #fff; }
.dd-plot figcaption { font-size: .82rem; color: var(--body-text-color-subdued); }
.dd-facts h3 { margin: 0 0 6px; font-size: 1rem; }
.dd-facts table { border-collapse: collapse; font-size: .85rem; width: 100%; margin: 0; }
.dd-facts th, .dd-facts td { padding: 4px 12px 4px 0; text-align: left; vertical-align: top; border: none;
  border-bottom: 1px solid var(--border-color-primary); font-weight: 400; }
.dd-facts th { color: var(--body-text-color-subdued); white-space: nowrap; }
.dd-facts td, .dd-facts code { overflow-wrap: anywhere; font-size: .85rem; color: var(--body-text-color); }
.dd-previews p { margin: 0 0 6px; font-size: .85rem; color: var(--body-text-color-subdued); }
.dd-strip { display: flex; gap: 8px; align-items: center; flex-wrap: wrap; margin-bottom: 8px; }
.dd-strip b { width: 3.2em; font-size: .9rem; } .dd-strip figure { margin: 0; text-align: center; }
.dd-strip img { width: 84px; height: 84px; object-fit: contain; border-radius: 8px; background: #fff; margin: 0;
  border: 1px solid var(--border-color-primary); }
.dd-strip figcaption { font-size: .75rem; color: var(--body-text-color-subdued); }
.dd-head { display: flex; flex-direction: column; padding-bottom: 2px; overflow: hidden; }
.dd-head b { font-size: 1.05rem; } .dd-head small { color: var(--body-text-color-subdued); overflow: hidden;
  text-overflow: ellipsis; white-space: nowrap; }
.dd-cell { margin: 0; } .dd-grid .dd-cell a { display: block; padding: 0; }
.dd-cell img, .dd-wait, .dd-next { display: block; width: 100%; height: auto; aspect-ratio: 1; border-radius: 10px;
  border: 1px solid var(--border-color-primary); background: #fff; }
.dd-grid .dd-cell img { object-fit: contain; margin: 0; }
.dd-wait, .dd-next { background: var(--background-fill-secondary); }
.dd-next { animation: dd-pulse 1.4s ease-in-out infinite; }
.dd-cell figcaption { margin-top: 5px; font-size: .82rem; line-height: 1.45; color: var(--body-text-color-subdued);
  overflow-wrap: anywhere; }
.dd-cell figcaption span { display: block; } .dd-nothing { color: #dc2626; font-weight: 600; }
.dd-warn { color: #92400e; } .dark .dd-warn { color: #fcd34d; } .dark .dd-nothing { color: #fca5a5; }
.dd-diff { font-variant-numeric: tabular-nums; color: var(--body-text-color); }
@keyframes dd-pulse { 50% { opacity: .45; } }
@keyframes dd-turn { to { transform: rotate(1turn); } }
@media (prefers-reduced-motion: reduce) { .dd-next, .dd-spin { animation: none; } }

.dd-status { margin: 0; display: flex; align-items: center; gap: 8px; min-height: 1.5em; font-size: .92rem;
  color: var(--body-text-color-subdued); font-variant-numeric: tabular-nums; }
.dd-spin { width: 14px; height: 14px; border-radius: 50%; border: 2px solid #2563eb; border-right-color: transparent;
  animation: dd-turn .9s linear infinite; flex: none; }
.dd-empty { border: 1px dashed var(--border-color-primary); border-radius: 10px; padding: 28px 20px;
  text-align: center; }
.dd-empty p { margin: 0 auto; max-width: 46rem; color: var(--body-text-color-subdued); line-height: 1.6; }
.dd-empty b { color: var(--body-text-color); }
.dd-empty code { padding: 1px 6px; border-radius: 5px; background: var(--background-fill-secondary); }
.dd-error { border: 1px solid #dc2626; border-left-width: 5px; border-radius: 10px; padding: 12px 16px;
  background: color-mix(in srgb, #dc2626 7%, transparent); }
.dd-error pre { white-space: pre-wrap; overflow-wrap: anywhere; font: inherit; margin: 4px 0;
  background: none; padding: 0; }
.dd-error small { color: var(--body-text-color-subdued); }

.dd-checks { list-style: none; margin: 0; padding: 0; font-size: .92rem; line-height: 1.6; }
.dd-checks li { padding-left: 1.6em; position: relative; overflow-wrap: anywhere; }
.dd-checks li::before { position: absolute; left: 0; font-weight: 700; }
.dd-hint::before { content: "•"; color: var(--body-text-color-subdued); }
.dd-ok::before { content: "✓"; color: #15803d; } .dd-bad::before { content: "✕"; color: #dc2626; }
.dark .dd-ok::before { color: #86efac; } .dark .dd-bad::before { color: #fca5a5; }
.dd-bar { height: 8px; border-radius: 99px; background: var(--background-fill-secondary); overflow: hidden; }
.dd-bar i { display: block; height: 100%; background: #2563eb; border-radius: 99px; transition: width .4s; }
.dd-finished .dd-bar i { background: #15803d; } .dd-failed .dd-bar i { background: #dc2626; }
.dd-stopped .dd-bar i, .dd-interrupted .dd-bar i { background: #d97706; }
.dd-job p { margin: 8px 0 0; font-weight: 600; font-variant-numeric: tabular-nums; }
.dd-curves { width: 100%; max-width: 760px; height: auto; display: block; font-size: 11px; }
.dd-curves text { fill: var(--body-text-color-subdued); }
.dd-curves .dd-key { fill: var(--body-text-color); font-size: 13px; }
.dd-gridline { stroke: var(--border-color-primary); }
#captions img { width: 44px; height: 44px; object-fit: contain; background: #fff; border-radius: 6px; margin: 2px 0; }

@media (max-width: 640px) {
  .dd-grid { gap: 10px 8px; } .dd-head b { font-size: .95rem; }
  .dd-cell figcaption, .dd-head small { font-size: .72rem; }
}
"""
