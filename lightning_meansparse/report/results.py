"""results.md: the tables in Markdown, for docs and READMEs."""

from __future__ import annotations

import re
from dataclasses import replace

from lightning_meansparse.report.cells import (
    P_NOTE,
    Column,
    alpha_column,
    attack_columns,
    capital,
    cost_columns,
    flag_head,
    quiet_flags,
    result_columns,
    signs,
    stage_label,
    title,
)
from lightning_meansparse.report.findings import Findings, Stage
from lightning_meansparse.report.sources import Sources


def render_markdown(sources: Sources, findings: Findings) -> str:
    """Returns title, verdict, flags and one table per stage, the reported one first."""
    told = " ".join([findings.sentence, *findings.notes])
    parts = [f"# {plain(title(sources))}", f"**{findings.headline}**: {plain(signs(told))}"]
    raised = (
        f"- **{plain(signs(flag_head(flag)))}**: {plain(signs(flag.seen))} See `{flag.read_on}`."
        for flag in findings.raised
    )
    quiet = (plain(capital(line)) for line in quiet_flags(findings))
    parts += filter(None, ["\n".join(raised), *quiet])
    for stage in findings.in_order:
        parts.append(f"## {plain(capital(stage_label(findings, stage)))}")
        parts.append(_results(findings, stage))
    if len(findings.in_order) > len(findings.stages):
        named, *costs = cost_columns(sources.table)
        named = replace(named, texts=tuple(map(plain, named.texts)))
        parts += ["## Model evaluations, round by round", table(named, *costs)]
    parts.append(
        "Accuracies in percent, after each attack and all before it; intervals are Wilson 95%; the "
        f"gain is paired with the base model (α = 0) under the same attacks. {P_NOTE} Made by "
        "`meansparse report` from `records.parquet`."
    )
    return "\n\n".join(parts) + "\n"


def _results(findings: Findings, stage: Stage) -> str:
    alphas = alpha_column(stage)
    texts = (
        f"**{text}** (chosen)" if summary.alpha == findings.chosen else text
        for summary, text in zip(stage, alphas.texts, strict=True)
    )
    columns = [*result_columns(stage), *(attack_columns(stage) if stage[0].robust else [])]
    return table(Column(alphas.head, tuple(texts)), *columns)


def table(first: Column, *columns: Column) -> str:
    """A table in Markdown; the first column is taken as it is."""
    rows = [
        [first.head, *(plain(column.head) for column in columns)],
        [":---" if column.kind == "text" else "---:" for column in (first, *columns)],
    ]
    for place, text in enumerate(first.texts):
        texts = (
            f"**{plain(column.texts[place])}**"
            if column.kind == "worst"
            else plain(column.texts[place])
            for column in columns
        )
        rows.append([text, *texts])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plain(text: str) -> str:
    """Keeps names from files from becoming markup: no HTML, table, emphasis, formula or link."""
    text = "".join(c if c.isprintable() else " " for c in " ".join(text.split()))
    text = re.sub(r"([\\`*_|<>\[\]~$&@])", r"\\\1", text)
    return re.sub(r":(?=//)|(?<=www)\.", r"\\\g<0>", text, flags=re.IGNORECASE)
