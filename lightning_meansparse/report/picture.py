"""report.png: the report's essence in one picture, for a README or a slide."""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING

from lightning_meansparse.report.cells import capital, flag_head, signs, stage_label, title
from lightning_meansparse.report.drawing import LIGHT, quiet_save, style
from lightning_meansparse.report.figures import draw_accuracy, draw_histogram, draw_replaced
from lightning_meansparse.report.findings import Findings
from lightning_meansparse.report.page import shown_alpha
from lightning_meansparse.report.sources import Sources

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TONES = {"Real gain": "good", "Harm": "bad"}


def render_png(sources: Sources, findings: Findings) -> bytes:
    """Returns the picture as PNG, 1800 pixels wide."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(12, 8), dpi=150, facecolor=LIGHT["paper"])
        _header(figure, sources, findings)
        draw_accuracy(figure.add_axes((0.055, 0.085, 0.39, 0.58)), findings, LIGHT, narrow=False)
        if sources.histogram:
            for left, part in ((0.635, "before"), (0.832, "after")):
                axes = figure.add_axes((left, 0.49, 0.158, 0.19))
                draw_histogram(axes, sources.histogram, part, LIGHT)
        if sources.sites:
            place = sources.alphas.index(shown_alpha(sources, findings.chosen))
            draw_replaced(
                figure.add_axes((0.765, 0.085, 0.223, 0.29)),
                [site.site for site in sources.sites],
                [site.replaced[place] for site in sources.sites],
                LIGHT,
            )
        buffer = io.BytesIO()
        quiet_save(figure, buffer, "png")
    return buffer.getvalue()


def _header(figure: Figure, sources: Sources, findings: Findings) -> None:
    tone = LIGHT[_TONES.get(findings.headline, "muted")]
    figure.text(0.02, 0.955, title(sources), size=13, color=LIGHT["muted"], va="center")
    figure.text(0.02, 0.905, findings.headline, size=22, weight="bold", color=tone, va="center")
    said = " ".join([capital(signs(findings.sentence)), *map(signs, findings.notes)])
    lines = textwrap.wrap(said, 138)
    text = "\n".join(lines[:4] if len(lines) <= 4 else [*lines[:3], f"{lines[3]} …"])
    figure.text(0.02, 0.875, text, size=11.5, color=LIGHT["ink"], va="top", linespacing=1.35)
    kinds = [f"lines and bands: {stage_label(findings, findings.curve)}"]
    if findings.marked is not None:
        kinds.append(f"big marks and bars: {stage_label(findings, findings.marked)}")
    figure.text(0.02, 0.747, "   ·   ".join(kinds), size=10, color=LIGHT["muted"], va="center")
    if findings.raised:
        tone = "apparent" if findings.concerns(findings.raised[0]) else "muted"
        doubts = "   ·   ".join(signs(flag_head(flag)) for flag in findings.raised)
        lines = textwrap.wrap(f"Reasons to doubt: {doubts}", 150, max_lines=1, placeholder=" …")
        figure.text(0.02, 0.72, lines[0], size=10, color=LIGHT[tone], va="center")
