"""The numbers as plain text, in the one form that page, picture and Markdown share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

import pyarrow as pa

from lightning_meansparse.records import MAIN, AlphaSummary, Flag, Proportion, rounds, splits
from lightning_meansparse.report.findings import Findings, Stage
from lightning_meansparse.report.sources import Sources

NOT_MEASURED = "not measured"
P_NOTE = (
    "p is McNemar's exact test, for each row by itself: it is not corrected for looking at "
    "several rows."
)
"""The footnote of the tables."""


@dataclass(frozen=True)
class Column:
    """One column: its head and its texts; ``kind`` is "apparent", "worst", "gain", "text" or ""."""

    head: str
    texts: tuple[str, ...]
    kind: str = ""


def alpha_column(summaries: list[AlphaSummary]) -> Column:
    """The first column of every table."""
    return Column("α", tuple(f"{summary.alpha:g}" for summary in summaries))


def result_columns(summaries: list[AlphaSummary]) -> list[Column]:
    """What counts, in percent and points: clean, apparent, worst case, gain, p, masking, n.

    Where no attack ran: clean, its change against the base model, p, n.
    """
    n = Column("n", tuple(f"{s.n:,}" for s in summaries))
    p = Column("p", tuple(_p(s) for s in summaries))
    if not summaries[0].robust:
        return [
            Column("clean [95%]", tuple(_interval(s.clean) for s in summaries)),
            Column("change ± SE", tuple(_gain(s) for s in summaries)),
            p,
            n,
        ]
    return [
        Column("clean", tuple(number(s.clean.value) for s in summaries)),
        Column(
            "apparent",
            tuple(
                NOT_MEASURED if s.apparent is None else number(s.apparent.value) for s in summaries
            ),
            "apparent",
        ),
        Column("worst case [95%]", tuple(_interval(s.worst) for s in summaries), "worst"),
        Column("gain ± SE", tuple(_gain(s) for s in summaries), "gain"),
        p,
        Column(
            "masking",
            tuple(NOT_MEASURED if s.masking is None else number(s.masking) for s in summaries),
        ),
        n,
    ]


def attack_columns(summaries: list[AlphaSummary]) -> list[Column]:
    """Accuracy after each attack and all before it, and what the attacks cost."""
    return [
        *(
            Column(
                f"+ {name}" if place else name,
                tuple(number(s.robust[name].value) for s in summaries),
            )
            for place, name in enumerate(summaries[0].robust)
        ),
        Column("forward passes", tuple(f"{s.forwards:,}" for s in summaries)),
        Column("backward passes", tuple(f"{s.backwards:,}" for s in summaries)),
    ]


def _interval(share: Proportion) -> str:
    return f"{number(share.value)} [{number(share.low)}, {number(share.high)}]"


def _gain(summary: AlphaSummary) -> str:
    if summary.alpha == 0:
        return "base"
    gain = summary.gain
    spread = "–" if math.isnan(gain.se) else f"{100 * gain.se:.2f}"
    return signs(f"{100 * gain.value:+.2f} ± {spread}")


def _p(summary: AlphaSummary) -> str:
    if summary.alpha == 0:
        return "–"
    return "< 0.0001" if summary.gain.p < 1e-4 else f"{summary.gain.p:.2g}"


def title(sources: Sources) -> str:
    """What was measured, on which data."""
    model = sources.metadata.get("model") or sources.adapter.get("base") or "a model"
    data = sources.metadata.get("data")
    name = (data.get("name") if isinstance(data, Mapping) else data) or ""
    return f"MeanSparse on {short(model)}" + (f", {short(name)}" if name else "")


def short(name: object) -> str:
    """A name as it is; of a local folder the end, as where it lay tells a reader nothing."""
    text = str(name)
    return "/".join(PurePath(text).parts[-2:]) if text.startswith(("/", ".", "~")) else text


def replacement(sources: Sources) -> str:
    """What the operator puts in the place of a value."""
    known = {"global": "the mean over all channels", "zero": "zero"}
    return known.get(str(sources.metadata.get("center")), "their channel’s mean")


def role(findings: Findings, stage: Stage) -> str:
    """What a stage was for: "chose α", "reported", both, or ""."""
    parts = []
    if stage[0].split == findings.chooser:
        parts.append("chose α")
    if stage == findings.reported:
        parts.append("reported")
    return " and ".join(parts)


def stage_label(findings: Findings, stage: Stage) -> str:
    """A stage with its n and role, such as "test images, n = 1,000 (reported)"."""
    counts = sorted({summary.n for summary in stage})
    n = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    round = "" if stage[0].round == MAIN else f", {stage[0].round}"
    part = role(findings, stage)
    return f"{stage[0].split} images{round}, n = {n}" + (f" ({part})" if part else "")


def cost_columns(table: pa.Table) -> list[Column]:
    """What every round cost, and all together: the first column names the round."""
    cost = table.group_by(["split", "round"]).aggregate(
        [
            ("alpha", "count_distinct"),
            ("index", "count_distinct"),
            ("forwards", "sum"),
            ("backwards", "sum"),
        ]
    )
    found = {(row["split"], row["round"]): row for row in cost.to_pylist()}
    rows = [found[split, round] for split in splits(table) for round in rounds(table, split)]
    heads = {
        "alphas": "alpha_count_distinct",
        "images": "index_count_distinct",
        "forward passes": "forwards_sum",
        "backward passes": "backwards_sum",
    }
    columns = [Column("round", (*(f"{row['split']}, {row['round']}" for row in rows), "all"))]
    for head, key in heads.items():
        total = f"{sum(row[key] for row in rows):,}" if head.endswith("passes") else ""
        columns.append(Column(head, (*(f"{row[key]:,}" for row in rows), total)))
    return columns


def flag_head(flag: Flag) -> str:
    """A raised flag's name, and at which alphas."""
    alphas = ", ".join(f"{alpha:g}" for alpha in flag.alphas)
    return capital(flag.name) + (f" at alpha = {alphas}" if alphas else "")


def quiet_flags(findings: Findings) -> list[str]:
    """One line on the flags that were not raised, one on those that nobody measured, and why."""
    passed = ", ".join(flag.name for flag in findings.flags if flag.raised is False)
    unknown: dict[str, list[str]] = {}
    for flag in findings.flags:
        if flag.raised is None:
            unknown.setdefault(flag.seen, []).append(flag.name)
    reasons = "; ".join(f"{', '.join(names)} ({why})" for why, names in unknown.items())
    lines = [("Looked for and not found", passed), ("Not measured", reasons)]
    return [f"{head}: {text}." for head, text in lines if text]


def signs(text: str) -> str:
    """Gives plain text the signs that a terminal may lack: α for alpha, − for a minus."""
    return re.sub(r"(?<![\w.\-])-(?=\d)", "−", re.sub(r"\balpha\b", "α", text))


def percent(share: float) -> str:
    """A fraction as "65.7%"."""
    return f"{share:.1%}"


def number(share: float) -> str:
    """A fraction in percent, without the sign: "65.7"."""
    return f"{100 * share:.1f}"


def capital(text: str) -> str:
    """Text as the beginning of a sentence; a Greek letter keeps its size."""
    return text if text.startswith("α") else text[:1].upper() + text[1:]
