"""The numbers as plain text, in the one form that page, picture and Markdown share."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from lightning_meansparse.records import AlphaSummary, Proportion
from lightning_meansparse.report.findings import Findings
from lightning_meansparse.report.sources import Sources

NOT_MEASURED = "not measured"
P_NOTE = (
    "p is McNemar's exact test, for each row by itself: it is not corrected for looking at "
    "several rows."
)
"""The footnote of the tables."""


@dataclass(frozen=True)
class Column:
    """One column: its head and its texts; ``kind`` is "apparent", "worst", "gain" or ""."""

    head: str
    texts: tuple[str, ...]
    kind: str = ""


def alpha_column(summaries: list[AlphaSummary]) -> Column:
    """The first column of every table."""
    return Column("α", tuple(f"{summary.alpha:g}" for summary in summaries))


def result_columns(summaries: list[AlphaSummary]) -> list[Column]:
    """What counts, in percent and points: clean, apparent, worst case, gain, p, masking, n."""
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
        Column("p", tuple(_p(s) for s in summaries)),
        Column(
            "masking",
            tuple(NOT_MEASURED if s.masking is None else number(s.masking) for s in summaries),
        ),
        Column("n", tuple(f"{s.n:,}" for s in summaries)),
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
    return f"MeanSparse on {_short(model)}" + (f", {_short(name)}" if name else "")


def _short(name: object) -> str:
    """A name as it is; of a local folder the end, as where it lay tells a reader nothing."""
    text = str(name)
    return "/".join(PurePath(text).parts[-2:]) if text.startswith(("/", ".", "~")) else text


def replacement(sources: Sources) -> str:
    """What the operator puts in the place of a value."""
    known = {"global": "the mean over all channels", "zero": "zero"}
    return known.get(str(sources.metadata.get("center")), "their channel’s mean")


def role(findings: Findings, split: str) -> str:
    """What a split was for: "chose α", "reported", both, or ""."""
    parts = []
    if split == findings.chooser:
        parts.append("chose α")
    if split == findings.reporter:
        parts.append("reported")
    return " and ".join(parts)


def split_label(findings: Findings, split: str) -> str:
    """A split with its n and role, such as "test images, n = 1,000 (reported)"."""
    counts = sorted({summary.n for summary in findings.summaries[split]})
    n = f"{counts[0]:,}" if len(counts) == 1 else f"{counts[0]:,} to {counts[-1]:,}"
    part = role(findings, split)
    return f"{split} images, n = {n}" + (f" ({part})" if part else "")


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
