"""results.md: the tables in Markdown, for docs and READMEs."""

from __future__ import annotations

import re

from lightning_meansparse.report.cells import (
    P_NOTE,
    alpha_column,
    attack_columns,
    capital,
    result_columns,
    signs,
    split_label,
    title,
)
from lightning_meansparse.report.findings import Findings
from lightning_meansparse.report.sources import Sources


def render_markdown(sources: Sources, findings: Findings) -> str:
    """Returns title, verdict and one table per split, the reported one first."""
    verdict = " ".join([f"**{findings.headline}**: {findings.sentence}", *findings.notes])
    parts = [f"# {_plain(title(sources))}", signs(verdict)]
    for split in findings.in_order:
        parts.append(f"## {_plain(capital(split_label(findings, split)))}")
        parts.append(_table(findings, split))
    parts.append(
        "Accuracies in percent, after each attack and all before it; intervals are Wilson 95%; the "
        f"gain is paired with the base model (α = 0) under the same attacks. {P_NOTE} Made by "
        "`meansparse report` from `records.parquet`."
    )
    return "\n\n".join(parts) + "\n"


def _table(findings: Findings, split: str) -> str:
    summaries = findings.summaries[split]
    columns = [*result_columns(summaries), *attack_columns(summaries)]
    first = [
        f"**{text}** (chosen)" if summary.alpha == findings.chosen else text
        for summary, text in zip(summaries, alpha_column(summaries).texts, strict=True)
    ]
    rows = [["α", *(_plain(column.head) for column in columns)], ["---:"] * (len(columns) + 1)]
    for place, alpha in enumerate(first):
        texts = (
            f"**{_plain(column.texts[place])}**"
            if column.kind == "worst"
            else _plain(column.texts[place])
            for column in columns
        )
        rows.append([alpha, *texts])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _plain(text: str) -> str:
    """Keeps names from files from becoming markup: no HTML, no table or emphasis marks."""
    text = " ".join(text.split())
    return re.sub(r"([\\`*_|<>\[\]])", r"\\\1", text)
