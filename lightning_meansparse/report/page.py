"""The HTML page: everything that comes from a file is escaped here, and nothing is fetched."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable
from html import escape
from importlib.resources import files
from string import Template

from lightning_meansparse.report.cells import (
    NOT_MEASURED,
    P_NOTE,
    Column,
    alpha_column,
    attack_columns,
    capital,
    cost_columns,
    flag_head,
    percent,
    quiet_flags,
    replacement,
    result_columns,
    signs,
    stage_label,
    title,
)
from lightning_meansparse.report.drawing import COLOURS
from lightning_meansparse.report.figures import accuracy_svg, histogram_svg, histogram_top
from lightning_meansparse.report.findings import Findings, Stage
from lightning_meansparse.report.method import again, method
from lightning_meansparse.report.sources import SiteShare, Sources

_TONES = {
    # headline: (class, mark)
    "Real gain": ("gain", "✓"),
    "Harm": ("harm", "✕"),
    "Not judged": ("flat", "?"),
}
_SPREAD = re.compile(r"(?<= )(\[.*\]|± .*)$")
_BAND = (
    '<rect y="3" width="38" height="12" fill="var(--worst)" opacity="0.18"/>'
    '<path d="M0 9H38" stroke="var(--worst)" stroke-width="2.4"/>'
)
_MARK = (
    '<path d="M19 0V18M15 0H23M15 18H23" stroke="var(--worst)" stroke-width="1.8"/>'
    '<rect x="14" y="4" width="10" height="10" fill="var(--worst)"/>'
)


def render(sources: Sources, findings: Findings) -> str:
    """Returns the whole page."""
    package = files("lightning_meansparse.report")
    page = Template(package.joinpath("page.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=escape(title(sources)),
        css=_theme() + package.joinpath("style.css").read_text(encoding="utf-8"),
        verdict=_verdict(findings),
        flags=_flags(findings),
        accuracy=_accuracy(findings),
        reading=_reading(findings),
        tables=_numbers(sources, findings),
        histogram=_histogram(sources),
        sites=_sites(sources, findings.chosen),
        method=method(sources, findings),
        again=again(sources),
    )


def shown_alpha(sources: Sources, chosen: float) -> float:
    """The alpha whose replaced shares are shown: the chosen one, else one that replaces values."""
    if chosen > 0 and chosen in sources.alphas:
        return chosen
    if sources.histogram and sources.histogram.alpha in sources.alphas:
        return sources.histogram.alpha
    return max(sources.alphas)


def _prose(text: str) -> str:
    """A plain sentence, escaped; "n = 300" stays on one line."""
    return escape(capital(signs(text))).replace(" = ", "&nbsp;=&nbsp;")


def _theme() -> str:
    def block(which: int) -> str:
        return " ".join(f"--{name}: {pair[which]};" for name, pair in COLOURS.items())

    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {block(1)} }} }}"
    return f":root {{ color-scheme: light dark; {block(0)} }}\n{dark}\n"


def _verdict(findings: Findings) -> str:
    tone, mark = _TONES.get(findings.headline, ("flat", "="))
    notes = "".join(f"<li>{_prose(note)}</li>" for note in findings.notes)
    return (
        f'<div class="verdict {tone}" role="note" aria-label="Verdict">'
        f'<p class="headline"><span class="mark" aria-hidden="true">{mark}</span>'
        f"{escape(findings.headline)}</p>"
        f'<p class="sentence">{_prose(findings.sentence)}</p>'
        f"<ul>{notes}</ul></div>"
    )


def _flags(findings: Findings) -> str:
    raised = "".join(
        f'<li class="{"doubt" if findings.concerns(flag) else "flat"}">'
        f"<b>{_prose(flag_head(flag))}</b>{_prose(flag.seen)} "
        f'<span class="muted">See <code>{escape(flag.read_on)}</code>.</span></li>'
        for flag in findings.raised
    )
    quiet = "".join(f'<p class="muted">{_prose(line)}</p>' for line in quiet_flags(findings))
    return (f'<ul class="flags">{raised}</ul>' if raised else "") + quiet


def _accuracy(findings: Findings) -> str:
    judged = findings.judged
    key = [_key("line and 95% band", _BAND, stage_label(findings, findings.curve))]
    if findings.marked is not None:
        key.append(_key("big mark and 95% bar", _MARK, stage_label(findings, findings.marked)))
    apparent = percent(judged.apparent.value) if judged.apparent else NOT_MEASURED
    label = (
        f"Line chart of accuracy against alpha. At alpha {judged.alpha:g} on {judged.split} "
        f"images: clean {percent(judged.clean.value)}, apparent {apparent}, worst case "
        f"{percent(judged.worst.value)}; base model's worst case {percent(judged.base.value)}. "
        "The table below holds every number."
    )
    missing = (
        ""
        if judged.apparent
        else "Apparent accuracy was not measured: no attack followed the exact gradient. "
    )
    masked = any(summary.masking is not None for summary in findings.curve)
    hatched = " Hatched: masking, robustness that is only apparent." if masked else ""
    drawing = _both(lambda narrow, name: accuracy_svg(findings, narrow=narrow, name=name), label)
    return (
        f'<figure><ul class="key">{"".join(key)}</ul>{drawing}'
        f"<figcaption>{missing}Dotted line: the base model's worst case under the same attacks; "
        f"a real gain lies above it.{hatched}</figcaption></figure>"
    )


def _key(what: str, drawing: str, label: str) -> str:
    return (
        f'<li><svg viewBox="0 0 38 18" aria-hidden="true">{drawing}</svg>{what}: '
        f"{escape(label)}</li>"
    )


def _both(draw: Callable[[bool, str], str], label: str) -> str:
    """A wide and a narrow drawing of one figure; the style sheet shows one of them."""
    return "".join(
        f'<div class="plot {kind}" role="img" aria-label="{escape(label)}">'
        f"{draw(kind == 'narrow', f'{zlib.crc32(label.encode()):x}{kind}')}</div>"
        for kind in ("wide", "narrow")
    )


def _reading(findings: Findings) -> str:
    interval = (
        "held-out images chose α and the test images only judged it"
        if findings.honest
        else "the same images chose α and judged it, so a small gain may be luck"
    )
    items = (
        '<b class="clean">Clean</b> is the accuracy on unchanged images; '
        '<b class="worst">worst case</b> counts an image only if it is still classified rightly '
        "after every attack in the list, each kept inside the perturbation budget.",
        '<b class="apparent">Apparent</b> counts only attacks that follow the model’s own '
        "gradient; the operator has no gradient where it replaces values, which blinds such "
        "attacks without making the model more robust: the gap to the worst case is masking.",
        "<b>Gain</b> compares with the base model (α = 0) on the same images under the same "
        f"attacks, {interval}; an interval that contains 0 means that no change was shown.",
    )
    return "\n".join(f"<li>{item}</li>" for item in items)


def _numbers(sources: Sources, findings: Findings) -> str:
    cost, *columns = cost_columns(sources.table)
    return "\n".join(
        [
            *(_tables(findings, stage, f"t-{i}") for i, stage in enumerate(findings.in_order)),
            f'<p class="muted">{escape(P_NOTE)}</p>',
            '<details><summary id="t-cost">Model evaluations, round by round</summary>',
            _table(cost, columns, "t-cost"),
            "</details>",
        ]
    )


def _tables(findings: Findings, stage: Stage, name: str) -> str:
    label, split = escape(stage_label(findings, stage)), escape(stage[0].split)
    alphas = alpha_column(stage)
    chosen = next((i for i, s in enumerate(stage) if s.alpha == findings.chosen), None)
    table = f'<h3 id="{name}">{capital(label)}</h3>' + _table(
        alphas, result_columns(stage), name, chosen=chosen
    )
    if not stage[0].robust:
        return table
    return (
        f'{table}<details><summary id="{name}a">Attack by attack, {split} images</summary>'
        '<p class="muted">Accuracy after each attack and all before it, in percent.</p>'
        + _table(alphas, attack_columns(stage), f"{name}a", chosen=chosen)
        + "</details>"
    )


def _table(first: Column, columns: list[Column], name: str, *, chosen: int | None = None) -> str:
    head = "".join(f'<th scope="col">{_cell(c.head)}</th>' for c in (first, *columns))
    body = []
    for place, text in enumerate(first.texts):
        tag = ' <span class="tag">chosen</span>' if place == chosen else ""
        row = "".join(f'<td class="{c.kind}">{_cell(c.texts[place])}</td>' for c in columns)
        body.append(
            f"<tr{' class=chosen' * (place == chosen)}>"
            f'<th scope="row">{escape(text)}{tag}</th>{row}</tr>'
        )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}">'
        f'<table class="numbers" aria-labelledby="{name}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _cell(text: str) -> str:
    """Interval and standard error under the number they belong to."""
    return _SPREAD.sub(r" <small>\g<0></small>", escape(text))


def _histogram(sources: Sources) -> str:
    found = sources.histogram
    if found is None:
        return '<p class="muted">No histogram was recorded (sites.json holds none).</p>'
    tall = max(*found.before, *found.after) > histogram_top(found)
    cut = "Bars that reach the top are cut off. " if tall else ""
    drawing = _both(
        lambda narrow, name: histogram_svg(found, narrow=narrow, name=name),
        f"Two histograms of channel {found.channel} at {found.site}, before and after the "
        f"operator: values within {found.alpha:g} standard deviations of the mean become "
        f"{replacement(sources)}.",
    )
    return (
        f"<figure>{drawing}<figcaption>Channel {found.channel} at "
        f"<code>{escape(found.site)}</code>: values closer to the mean "
        f"{signs(f'{found.mean:.3g}')} (dashed) than α·σ = {found.alpha:g} × {found.std:.3g} "
        f"(shaded) become {replacement(sources)}; all others pass unchanged. {cut}"
        "Shares are of the values shown.</figcaption></figure>"
    )


def _sites(sources: Sources, chosen: float) -> str:
    if not sources.sites:
        return '<p class="muted">The shares were not recorded (sites.json is missing).</p>'
    alpha = shown_alpha(sources, chosen)
    place = sources.alphas.index(alpha)
    shares = [site.replaced[place] for site in sources.sites]
    mean = sum(shares) / len(shares)
    why = "the chosen α" if alpha == chosen else "shown because α = 0 replaces nothing"
    rows = "\n".join(
        _site_row(site, share) for site, share in zip(sources.sites, shares, strict=True)
    )
    return (
        f"<p>At α = {alpha:g} ({why}), {percent(mean)} of the values become {replacement(sources)} "
        f"on average over {len(shares)} site{'s' * (len(shares) != 1)}, between "
        f"{percent(min(shares))} and {percent(max(shares))} "
        f"(counted on {sources.images:,} images, in the order of execution).</p>"
        f'<div class="sites" tabindex="0" role="region" aria-label="Share of values replaced per '
        f'site"><table><thead><tr><th scope="col">Site</th><th scope="col">Channels</th>'
        f'<th scope="col">Values replaced</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )


def _site_row(site: SiteShare, share: float) -> str:
    return (
        f'<tr><th scope="row">{escape(site.site)}</th><td>{site.channels:,}</td>'
        f'<td><div class="bar"><span style="--share: {100 * share:.2f}%"></span>'
        f"<b>{percent(share)}</b></div></td></tr>"
    )
