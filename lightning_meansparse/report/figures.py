"""The three figures: accuracy against alpha, one channel's values, shares replaced per site.

For the page they are drawn twice, wide and narrow: scaled text is unreadable on a phone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from lightning_meansparse.records import AlphaSummary, Proportion
from lightning_meansparse.report.drawing import PLACEHOLDER, axes_at, dress, svg
from lightning_meansparse.report.findings import Findings
from lightning_meansparse.report.sources import Histogram

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MEASURES = {
    # name: (label, marker, dashes, line width)
    "clean": ("clean", "o", (0, (1, 1.5)), 1.6),
    "apparent": ("apparent", "^", (0, (5, 2)), 1.8),
    "worst": ("worst case", "s", "solid", 2.4),
}


def accuracy_svg(findings: Findings, *, narrow: bool, name: str) -> str:
    """Accuracy against alpha as an inline SVG element; `name` makes its ids unique."""
    width, height = (340, 330) if narrow else (760, 400)

    def draw(figure: Figure) -> None:
        left, right = (42, 12) if narrow else (52, 148)
        axes = axes_at(figure, left, 48 if narrow else 50, right, 58 if narrow else 30)
        draw_accuracy(axes, findings, PLACEHOLDER, narrow=narrow)

    return svg(draw, width, height, name)


def histogram_svg(histogram: Histogram, *, narrow: bool, name: str) -> str:
    """One channel before and after as an inline SVG element."""
    width, height = (340, 430) if narrow else (760, 260)

    def draw(figure: Figure) -> None:
        for place, part in enumerate(("before", "after")):
            if narrow:
                axes = axes_at(figure, 42, 48 + 205 * (1 - place), 12, 30 + 205 * place)
            else:
                axes = axes_at(figure, 52 + 365 * place, 50, 20 + 365 * (1 - place), 30)
            draw_histogram(axes, histogram, part, PLACEHOLDER)

    return svg(draw, width, height, name)


def draw_accuracy(
    axes: Axes, findings: Findings, colours: Mapping[str, str], *, narrow: bool
) -> None:
    """Draws clean, apparent and worst-case accuracy with 95 % intervals.

    Lines with bands are the stage with the most alphas; big marks with bars another one.
    """
    lines, marks = findings.curve, findings.marked or []
    alphas = sorted({s.alpha for s in [*lines, *marks]})
    span = (alphas[-1] - alphas[0]) or 1.0
    axes.set_xlim(alphas[0] - 0.045 * span, alphas[-1] + 0.045 * span)
    low = min(share.low for s in [*lines, *marks] for share in _shares(s).values())
    high = max(share.high for s in [*lines, *marks] for share in _shares(s).values())
    axes.set_ylim(max(0.0, 5 * ((100 * low - 3) // 5)), min(104.0, 100 * high + 6))
    dress(axes, colours, xlabel="threshold α (standard deviations)", ylabel="accuracy (%)")
    _alpha_ticks(axes, alphas, findings.chosen)

    attacked = next((stage[0] for stage in (lines, marks) if stage and stage[0].robust), None)
    if attacked:
        base = 100 * attacked.worst.value
        axes.axhline(base, color=colours["muted"], lw=1, ls=(0, (2, 3)), zorder=1)
    axes.axvline(findings.chosen, color=colours["ink"], lw=1.2, zorder=1)
    left = findings.chosen > alphas[0] + 0.6 * span
    axes.annotate(
        f"chosen α = {findings.chosen:g}",
        (findings.chosen, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if left else 4, 2),
        textcoords="offset points",
        ha="right" if left else "left",
        va="bottom",
        color=colours["ink"],
        weight="bold",
        size=11,
    )
    for measure, (_, marker, dashes, width) in _MEASURES.items():
        known = [(s.alpha, _shares(s)[measure]) for s in lines if measure in _shares(s)]
        if known:
            x, shares = [a for a, _ in known], [p for _, p in known]
            axes.fill_between(
                x,
                [100 * p.low for p in shares],
                [100 * p.high for p in shares],
                color=colours[measure],
                alpha=0.13,
                lw=0,
                zorder=2,
            )
            axes.plot(
                x,
                [100 * p.value for p in shares],
                color=colours[measure],
                ls=dashes,
                lw=width,
                marker=marker,
                ms=4.5,
                clip_on=False,
                zorder=4,
            )
    _draw_marks(axes, marks, colours, shift=0.012 * span)
    if len(lines) == 1:  # a band needs two alphas
        _draw_marks(axes, lines, colours, shift=0.0)
    _draw_masking(axes, lines, colours)
    if narrow:
        _legend(axes, lines, colours)
    else:
        _end_labels(axes, lines, attacked, colours)


def draw_histogram(axes: Axes, histogram: Histogram, part: str, colours: Mapping[str, str]) -> None:
    """Draws the values of one channel, ``part`` = "before" or "after" the operator."""
    edges = histogram.edges
    total = sum(histogram.before) or 1.0
    shares = [100 * count / total for count in getattr(histogram, part)]
    top = 100 * histogram_top(histogram) / total
    half = histogram.alpha * histogram.std
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, top)
    dress(axes, colours, xlabel="pre-activation value", ylabel="share of values (%)")
    if part == "after":
        axes.set_ylabel("")
    axes.axvspan(
        histogram.mean - half, histogram.mean + half, color=colours["band"], alpha=0.2, lw=0
    )
    axes.stairs(shares, edges, fill=True, color=colours["worst"], alpha=0.85, lw=0)
    if part == "before":
        axes.axvline(histogram.mean, color=colours["band"], lw=1.4, ls=(0, (4, 2)))
        note = f"mean ± {histogram.alpha:g} σ"
    else:
        note = f"{100 * replaced_share(histogram):.0f}% replaced"
    axes.set_title(part, loc="left", size=12, weight="bold", color=colours["ink"], pad=7)
    axes.set_title(note, loc="right", size=10, color=colours["band"], pad=7)


def replaced_share(histogram: Histogram) -> float:
    """Share of the values shown that lie inside the band, by the bins whose middle does."""
    half = histogram.alpha * histogram.std
    inside = (
        count
        for (left, right), count in zip(pairwise(histogram.edges), histogram.before, strict=True)
        if abs((left + right) / 2 - histogram.mean) < half
    )
    return sum(inside) / (sum(histogram.before) or 1.0)


def histogram_top(histogram: Histogram) -> float:
    """Count at which bars are cut off, or one constant background would flatten all others."""
    filled = sorted(count for count in histogram.before if count) or [1.0]
    return 1.35 * filled[int(0.95 * (len(filled) - 1))]


def draw_replaced(
    axes: Axes, names: Sequence[str], shares: Sequence[float], colours: Mapping[str, str]
) -> None:
    """Draws horizontal bars of the share replaced per site; of many sites the first 14."""
    shown = min(len(names), 14)
    rows = range(shown)
    axes.barh(rows, [100 * s for s in shares[:shown]], color=colours["band"], height=0.62)
    axes.set_yticks(rows, [_shorten(name, 26) for name in names[:shown]])
    axes.set_ylim(shown - 0.4, -0.6)
    top = max([100 * s for s in shares[:shown]], default=0.0) or 1.0
    axes.set_xlim(0, 1.18 * top)
    dress(axes, colours, xlabel="values replaced (%)", ylabel="")
    axes.grid(visible=False, axis="y")
    for row in rows:
        axes.text(
            100 * shares[row] + 0.015 * top,
            row,
            f"{100 * shares[row]:.1f}",
            va="center",
            size=9,
            color=colours["ink"],
        )
    if len(names) > shown:
        axes.set_title(
            f"first {shown} of {len(names)} sites", loc="left", size=10, color=colours["muted"]
        )


def _shares(summary: AlphaSummary) -> dict[str, Proportion]:
    worst = summary.worst if summary.robust else None
    shares = {"clean": summary.clean, "apparent": summary.apparent, "worst": worst}
    return {name: share for name, share in shares.items() if share is not None}


def _alpha_ticks(axes: Axes, alphas: Sequence[float], chosen: float) -> None:
    """A tick per alpha, less those whose label would touch one that matters more."""
    first, last = axes.get_xlim()
    width = axes.get_window_extent().width * 72 / axes.figure.dpi
    kept: list[float] = []
    for alpha in sorted(alphas, key=lambda a: (a != chosen, a not in (alphas[0], alphas[-1]), a)):
        room = 4 + 7 * len(f"{alpha:g}")
        if all(abs(alpha - other) / (last - first) * width >= room for other in kept):
            kept.append(alpha)
    axes.set_xticks(kept, [f"{alpha:g}" for alpha in kept])


def _draw_marks(
    axes: Axes, marks: Sequence[AlphaSummary], colours: Mapping[str, str], *, shift: float
) -> None:
    many = len(marks) > 4
    for measure, (_, marker, _, _) in _MEASURES.items():
        known = [(s.alpha, _shares(s)[measure]) for s in marks if measure in _shares(s)]
        if not known:
            continue
        values = [100 * share.value for _, share in known]
        axes.errorbar(
            [alpha + shift for alpha, _ in known],
            values,
            yerr=[
                [value - 100 * share.low for value, (_, share) in zip(values, known, strict=True)],
                [100 * share.high - value for value, (_, share) in zip(values, known, strict=True)],
            ],
            color=colours[measure],
            ls="none",
            marker=marker,
            ms=6 if many else 9,
            mec=colours["paper"],
            mew=1.0 if many else 1.3,
            elinewidth=1.2 if many else 1.8,
            capsize=2 if many else 4,
            capthick=1.2 if many else 1.8,
            clip_on=False,
            zorder=6,
        )


def _draw_masking(axes: Axes, lines: Sequence[AlphaSummary], colours: Mapping[str, str]) -> None:
    """Names the gap between apparent and worst where it is widest."""
    known = [s for s in lines if s.masking is not None and s.apparent is not None]
    if not known:
        return
    axes.fill_between(
        [s.alpha for s in known],
        [100 * s.worst.value for s in known],
        [100 * s.apparent.value for s in known if s.apparent is not None],
        facecolor="none",
        edgecolor=colours["apparent"],
        hatch="////",
        alpha=0.35,
        lw=0,
        zorder=1.5,
    )
    widest = max(known, key=lambda s: (s.masking or 0.0, s.alpha))
    if not widest.masking or widest.apparent is None:
        return
    bottom, top = 100 * widest.worst.value, 100 * widest.apparent.value
    axes.annotate(
        "",
        (widest.alpha, top),
        (widest.alpha, bottom),
        arrowprops={"arrowstyle": "<->", "color": colours["apparent"], "lw": 1.4},
        zorder=5,
    )
    on_left = widest.alpha > sum(axes.get_xlim()) / 2
    roomy = (top - bottom) * _points_per_unit(axes) > 30
    axes.annotate(
        f"masking {100 * widest.masking:.1f}",
        (widest.alpha, (bottom + top) / 2 if roomy else bottom),
        xytext=(-7 if on_left else 7, 0 if roomy else -16),
        textcoords="offset points",
        ha="right" if on_left else "left",
        va="center",
        size=11,
        weight="bold",
        color=colours["apparent"],
        bbox={"fc": colours["paper"], "ec": "none", "alpha": 0.85 if roomy else 0, "pad": 1.5},
        zorder=7,
    )


def _end_labels(
    axes: Axes,
    lines: Sequence[AlphaSummary],
    base: AlphaSummary | None,
    colours: Mapping[str, str],
) -> None:
    """Names the lines at their right ends, moved apart where they would touch."""
    last = lines[-1]
    labels = [(100 * p.value, _MEASURES[m][0], m) for m, p in _shares(last).items()]
    labels = [(value, f"{text} {value:.1f}%", colour) for value, text, colour in labels]
    if base:
        labels.append((100 * base.worst.value, f"base, worst {base.worst.value:.1%}", "muted"))
    labels.sort()
    step = 16 / _points_per_unit(axes)
    places = [value for value, _, _ in labels]
    for _ in range(40):
        for i in range(len(places) - 1):
            overlap = step - (places[i + 1] - places[i])
            if overlap > 0:
                places[i] -= overlap / 2
                places[i + 1] += overlap / 2
    floor = axes.get_ylim()[0]
    for i, place in enumerate(places):
        places[i] = max(place, floor + i * step)
    for place, (_, text, colour) in zip(places, labels, strict=True):
        axes.annotate(
            text,
            (1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            annotation_clip=False,
            color=colours[colour],
            weight="normal" if colour == "muted" else "bold",
            size=11,
        )


def _legend(axes: Axes, lines: Sequence[AlphaSummary], colours: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    shown = _shares(lines[-1])
    handles = [
        Line2D([], [], color=colours[m], ls=dashes, lw=width, marker=marker, ms=5, label=label)
        for m, (label, marker, dashes, width) in _MEASURES.items()
        if m in shown
    ]
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(-0.14, 1.07),
        ncols=3,
        frameon=False,
        fontsize=10.5,
        labelcolor=[colours[m] for m in _MEASURES if m in shown],
        handlelength=2.0,
        columnspacing=0.9,
        handletextpad=0.5,
    )


def _points_per_unit(axes: Axes) -> float:
    low, high = axes.get_ylim()
    return axes.get_window_extent().height * 72 / axes.figure.dpi / (high - low)


def _shorten(name: str, length: int) -> str:
    tail = 2 * length // 3
    return name if len(name) <= length else f"{name[: length - tail - 1]}…{name[-tail:]}"
