"""What the records say, decided once, for the page, the picture and the Markdown table alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from lightning_meansparse.records import (
    HELD_OUT,
    TEST,
    AlphaSummary,
    choose_alpha,
    splits,
    summarize,
    verdict,
)


@dataclass(frozen=True)
class Findings:
    """Summaries of every split and what follows from them.

    Attributes:
        summaries: per split, ascending in alpha.
        chooser: the split that chose alpha.
        reporter: the split that the verdict speaks of.
        chosen: the alpha chosen.
        judged: the summary of `chosen` on `reporter`.
        headline: "Real gain", "No measurable gain", "No gain", "Harm", "Not judged" or "Nothing
            measured".
        sentence: the rest of the verdict.
        notes: what else a reader must know, one sentence each.
    """

    summaries: Mapping[str, list[AlphaSummary]]
    chooser: str
    reporter: str
    chosen: float
    judged: AlphaSummary
    headline: str
    sentence: str
    notes: tuple[str, ...]

    @property
    def honest(self) -> bool:
        """Whether alpha was chosen on other images than those reported."""
        return self.chooser != self.reporter

    @property
    def curve(self) -> str:
        """The split drawn as lines: the one that saw more alphas, of equals the reporter."""
        pair = {self.reporter, self.chooser}
        return max(pair, key=lambda s: (len(self.summaries[s]), s == self.reporter))

    @property
    def marked(self) -> str | None:
        """The split drawn as single marks beside the lines; None when there is but one."""
        if not self.honest:
            return None
        return self.reporter if self.curve == self.chooser else self.chooser

    @property
    def in_order(self) -> list[str]:
        """All splits: the reported one, the one that chose, then the rest."""
        first = list(dict.fromkeys([self.reporter, self.chooser]))
        return first + [name for name in self.summaries if name not in first]


def find(table: pa.Table, metadata: Mapping[str, Any]) -> Findings:
    """Summarizes all splits, chooses alpha on held-out data and judges it on the test split.

    Args:
        table: the records.
        metadata: their metadata; ``"chosen_alpha"`` overrides the choice, and a note says so.

    Raises:
        ValueError: the records contradict each other (see `summarize`), or the chosen alpha
            was not measured.
    """
    names = splits(table)
    summaries = {name: summarize(table, split=name) for name in names}
    reporter = TEST if TEST in names else names[0]
    others = [name for name in names if name != reporter]
    chooser = HELD_OUT if HELD_OUT in names else (others or [reporter])[0]
    best = choose_alpha(summaries[chooser])
    given = metadata.get("chosen_alpha")
    chosen = best if given is None else float(given)
    notes = []
    if chosen != best:
        notes.append(
            f"alpha = {chosen:g} was not chosen by the largest worst-case accuracy on the "
            f"{chooser} images; that would have been alpha = {best:g}."
        )
    measured = {s.alpha: s for s in summaries[reporter]}
    if chosen not in measured and chosen in {s.alpha for s in summaries[chooser]}:
        notes.append(f"alpha = {chosen:g} has not been measured on the {reporter} images yet.")
        reporter, measured = chooser, {s.alpha: s for s in summaries[chooser]}
    if chosen not in measured:
        raise ValueError(
            f"metadata['chosen_alpha'] must be one of the alphas in the records, "
            f"{sorted(measured)}. Got {chosen:g}."
        )
    judged = measured[chosen]
    chose = reporter == chooser and len(summaries[chooser]) > 1
    headline, sentence = verdict(judged, chose=chose).split(": ", 1)
    if chose:
        notes.append("Measure the chosen alpha on images that chose nothing.")
    if chosen == 0:
        notes.extend(_why_the_base_stays(summaries[chooser]))
    else:
        notes.extend(_what_gradients_said(judged, measured[0.0]))
    return Findings(summaries, chooser, reporter, chosen, judged, headline, sentence, tuple(notes))


def _why_the_base_stays(summaries: list[AlphaSummary]) -> list[str]:
    base, *tried = summaries
    if not tried:
        return []
    best = max(tried, key=lambda s: (s.gain.value, -s.alpha))
    notes = [
        f"On the {best.split} images (n = {best.n:,}) no alpha made the model more robust; the "
        f"best, alpha = {best.alpha:g}, changed its worst case by {100 * best.gain.value:+.1f} "
        f"points (95% interval {100 * best.gain.low:+.1f} to {100 * best.gain.high:+.1f})."
    ]
    seeming = [
        (s.apparent.value - base.apparent.value, s)
        for s in tried
        if s.apparent is not None and base.apparent is not None and s.masking is not None
    ]
    promised, tempting = max(
        seeming, key=lambda pair: (pair[0], -pair[1].alpha), default=(0.0, best)
    )
    if promised > 0:
        notes.append(
            "Attacks that follow the model's own gradient would have promised "
            f"{100 * promised:+.1f} points at alpha = {tempting.alpha:g}; under all attacks it is "
            f"{100 * tempting.gain.value:+.1f} points."
        )
    return notes


def _what_gradients_said(judged: AlphaSummary, base: AlphaSummary) -> list[str]:
    if judged.apparent is None or base.apparent is None:
        return ["No attack followed the exact gradient, so masking was not measured."]
    if judged.masking is None:
        return [
            "No attack of another kind ran after those that follow the model's own gradient, so "
            "masking was not measured."
        ]
    seeming = 100 * (judged.apparent.value - base.apparent.value)
    return [
        "Attacks that follow the model's own gradient would have reported "
        f"{judged.apparent.value:.1%} ({seeming:+.1f} points against the base model); "
        f"{100 * judged.masking:.1f} points of that accuracy are masking, which the other attacks "
        "take away."
    ]
