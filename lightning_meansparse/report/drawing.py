"""How every figure is drawn: one theme, axes by margins, SVG that fits into a page.

In the page a figure is inline SVG whose colours are CSS variables, so that one drawing serves light
and dark. In report.png the same functions draw with the light colours.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS: Mapping[str, tuple[str, str]] = {
    # name: (light, dark). Lines differ in lightness, dash and marker too, not in hue alone.
    "paper": ("#ffffff", "#14181d"),
    "panel": ("#f4f6f8", "#1d232a"),
    "ink": ("#16202a", "#e8edf2"),
    "muted": ("#55616d", "#a3afbb"),
    "grid": ("#dde2e7", "#323a43"),
    "clean": ("#5f6b77", "#a9b5c1"),
    "apparent": ("#b34a00", "#ffa04d"),
    "worst": ("#0059a8", "#62b5ff"),
    "band": ("#7a4fb5", "#bb9af0"),
    "good": ("#00664a", "#4cc79b"),
    "bad": ("#a8123c", "#ff8096"),
}
"""Colours of the report; the text colours have a contrast of at least 4.5 on paper and panel."""

LIGHT = {name: light for name, (light, _) in COLOURS.items()}
# SVG is drawn in placeholder colours, which `svg` then replaces by CSS variables.
PLACEHOLDER = {name: f"#fe{number:02x}dc" for number, name in enumerate(COLOURS)}
# Any: only newer releases of matplotlib type the keys.
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "text.parse_math": False,  # a name may contain a dollar sign
    "svg.fonttype": "none",
    "svg.hashsalt": "lightning_meansparse",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
}


def require_matplotlib() -> None:
    """Raises an ImportError that names the extra when matplotlib is missing."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "The report needs matplotlib, which is not installed. "
            'Install it with `pip install "lightning_meansparse[report]"`.'
        ) from error


def style() -> AbstractContextManager[None]:
    """The settings of matplotlib under which every figure is drawn."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def quiet_save(figure: Figure, target: io.BytesIO | io.StringIO, form: str) -> None:
    """Saves without date and version, so that the same data give the same bytes."""
    metadata = {"png": {"Software": None}, "svg": {"Date": None}}[form]
    with warnings.catch_warnings():
        # A site name in a script that the bundled font lacks shows boxes here, not in the page.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(target, format=form, metadata=metadata)


def axes_at(figure: Figure, left: float, bottom: float, right: float, top: float) -> Axes:
    """Axes by their margins in points, which text needs whatever the figure's size."""
    width, height = (72 * size for size in figure.get_size_inches())
    return figure.add_axes(
        (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
    )


def dress(axes: Axes, colours: Mapping[str, str], *, xlabel: str, ylabel: str) -> None:
    """Gives axes the look of the report: light grid, no box, labels in the theme's colours."""
    axes.set_facecolor("none")
    axes.grid(visible=True, axis="y", color=colours["grid"], lw=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_color(colours["muted"])
    axes.spines["left"].set_visible(False)
    axes.tick_params(colors=colours["muted"], labelsize=10.5, length=0, pad=5)
    axes.set_xlabel(xlabel, color=colours["ink"], size=11, labelpad=6)
    axes.set_ylabel(ylabel, color=colours["ink"], size=11, labelpad=4)


def svg(draw: Callable[[Figure], None], width: int, height: int, name: str) -> str:
    """Draws a figure of so many points and returns it as an inline SVG element."""
    from matplotlib.figure import Figure

    with style():
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        figure.patch.set_alpha(0)
        draw(figure)
        buffer = io.StringIO()
        quiet_save(figure, buffer, "svg")
    return inline_svg(buffer.getvalue(), name)


def inline_svg(text: str, name: str) -> str:
    """Makes matplotlib's SVG fit into an HTML page.

    Drops the XML prologue, the metadata (they hold addresses) and the style rule that would apply
    to the whole page; makes ids unique; turns placeholder colours into CSS variables; hides the
    drawing from screen readers, which get the caption and the table.
    """
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns|xmlns:xlink|version)="[^"]*"', "", text)
    text = re.sub(r'<svg\b[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1">', text, count=1)
    text = text.replace("xlink:href", "href")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = text.replace('href="#', f'href="#{name}-').replace("url(#", f"url(#{name}-")
    text = re.sub(r"; font-family: [^;\"]*|font-family: [^;\"]*; ", "", text)
    for key, colour in PLACEHOLDER.items():
        text = text.replace(colour, f"var(--{key})")
    return re.sub(r"\n\s*", "\n", text).strip()
