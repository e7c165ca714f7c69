"""The HTML page: everything that comes from a file is escaped here, and nothing is fetched."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from lightning_meansparse.report.cells import (
    NOT_MEASURED,
    P_NOTE,
    Column,
    alpha_column,
    attack_columns,
    capital,
    percent,
    replacement,
    result_columns,
    signs,
    split_label,
    title,
)
from lightning_meansparse.report.drawing import COLOURS
from lightning_meansparse.report.figures import accuracy_svg, histogram_svg, histogram_top
from lightning_meansparse.report.findings import Findings
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
_LABELS = {
    "model": "Model",
    "base": "Base model",
    "data": "Data",
    "dataset": "Data",
    "eps": "Perturbation budget ε",
    "norm": "Norm",
    "seed": "Seed",
    "where": "Placement",
    "versions": "Versions",
    "hardware": "Hardware",
}


def render(sources: Sources, findings: Findings) -> str:
    """Returns the whole page."""
    package = files("lightning_meansparse.report")
    page = Template(package.joinpath("page.html").read_text(encoding="utf-8"))
    return page.substitute(
        title=escape(title(sources)),
        css=_theme() + package.joinpath("style.css").read_text(encoding="utf-8"),
        verdict=_verdict(findings),
        accuracy=_accuracy(findings),
        reading=_reading(findings),
        tables="\n".join(_tables(findings, split) for split in findings.in_order)
        + f'\n<p class="muted">{escape(P_NOTE)}</p>',
        histogram=_histogram(sources),
        sites=_sites(sources, findings.chosen),
        method=_method(sources),
        again=_again(sources),
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


def _accuracy(findings: Findings) -> str:
    judged = findings.judged
    key = [_key("line and 95% band", _BAND, split_label(findings, findings.curve))]
    if findings.marked is not None:
        key.append(_key("big mark and 95% bar", _MARK, split_label(findings, findings.marked)))
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
    hatched = (
        "" if judged.masking is None else " Hatched: masking, robustness that is only apparent."
    )
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


def _tables(findings: Findings, split: str) -> str:
    summaries = findings.summaries[split]
    label = escape(split_label(findings, split))
    name = f"t-{findings.in_order.index(split)}"
    return (
        f'<h3 id="{name}">{capital(label)}</h3>'
        + _table(findings, split, result_columns(summaries), name)
        + f'<details><summary id="{name}a">Attack by attack, {escape(split)} images</summary>'
        + '<p class="muted">Accuracy after each attack and all before it, in percent.</p>'
        + _table(findings, split, attack_columns(summaries), f"{name}a")
        + "</details>"
    )


def _table(findings: Findings, split: str, columns: list[Column], name: str) -> str:
    summaries = findings.summaries[split]
    first = alpha_column(summaries)
    head = "".join(f'<th scope="col">{_cell(c.head)}</th>' for c in (first, *columns))
    body = []
    for place, summary in enumerate(summaries):
        chosen = summary.alpha == findings.chosen
        tag = ' <span class="tag">chosen</span>' if chosen else ""
        row = "".join(f'<td class="{c.kind}">{_cell(c.texts[place])}</td>' for c in columns)
        body.append(
            f"<tr{' class=chosen' * chosen}>"
            f'<th scope="row">{escape(first.texts[place])}{tag}</th>{row}</tr>'
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


def _method(sources: Sources) -> str:
    metadata = dict(sources.metadata)
    attacks = metadata.pop("attacks", None)
    metadata.pop("command", None)  # stands in a section of its own
    known = [(_LABELS[key], metadata.pop(key)) for key in _LABELS if key in metadata]
    known += [(key.replace("_", " ").capitalize(), metadata[key]) for key in sorted(metadata)]
    kept = {k: v for k, v in sources.adapter.items() if not isinstance(v, list | dict)}
    if kept:
        known.append(("Adapter", kept))
    seeds = sorted(set(sources.table.column("seed").to_pylist()))
    if "seed" not in sources.metadata:
        known.append(("Seed", seeds[0] if len(seeds) == 1 else seeds))
    pairs = "".join(f"<dt>{escape(k)}</dt><dd>{_value(v)}</dd>" for k, v in known)
    return f'<div class="method">{_attacks(sources, attacks)}<dl>{pairs}</dl></div>'


def _attacks(sources: Sources, attacks: Any) -> str:
    specs = {
        spec.get("name"): {k: v for k, v in spec.items() if k not in ("name", "kind")}
        for spec in (attacks if isinstance(attacks, list) else [])
        if isinstance(spec, Mapping)
    }
    table = sources.table.group_by(["order", "attack", "kind"]).aggregate([]).sort_by("order")
    items = [
        f"<dt>{escape(entry['attack'])} <small>{escape(entry['kind'])}</small></dt>"
        f"<dd>{_value(specs.get(entry['attack'], {})) or 'budget not recorded'}</dd>"
        for entry in table.to_pylist()
        if entry["attack"] != "clean"
    ]
    if not items:
        return "<p>No attack was run.</p>"
    return (
        "<p>Attacks in this order; each gets the images that still stand. The base model faced the "
        f"same list.</p><dl>{''.join(items)}</dl><h3>Settings</h3>"
    )


def _again(sources: Sources) -> str:
    command = sources.metadata.get("command")
    sweep = (
        f"<p>The measurement was made by</p><pre><code>{escape(str(command))}</code></pre>"
        if command
        else ""
    )
    return (
        "<p>Every number above is computed from <code>records.parquet</code> (one row per image, α "
        "and attack). In this folder:</p><pre><code>meansparse report .</code></pre>" + sweep
    )


def _value(value: Any, *, between: str = " · ") -> str:
    """Any JSON value as readable, escaped text."""
    if isinstance(value, Mapping):
        return between.join(
            f"{escape(str(key).replace('_', ' '))} {_value(item, between=', ')}"
            for key, item in _present(value.items())
        )
    if isinstance(value, list):
        return ", ".join(_value(item, between=", ") for item in value) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    return escape(str(value))


def _present(items: Iterable[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    return [(key, item) for key, item in items if item not in (None, [], {}, "")]
