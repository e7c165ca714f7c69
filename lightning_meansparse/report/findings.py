"""What the records say, decided once, for the page, the picture and the Markdown table alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lightning_meansparse.records import (
    MAIN,
    SCHEMA,
    AlphaSummary,
    Flag,
    choose_alpha,
    flags,
    roles,
    rounds,
    splits,
    summarize,
    verdict,
)
from lightning_meansparse.report.choice import told

Stage = list[AlphaSummary]
"""Summaries of one round, or of several under the same attacks, ascending in alpha."""


@dataclass(frozen=True)
class Findings:
    """Summaries of everything measured and what follows from them.

    Attributes:
        stages: per split, in the order of measurement. Rounds that differ in their number only and
            ran the same attacks are one stage: every alpha with all images it has met.
        chooser: the split that chose alpha.
        reporter: the split that the verdict speaks of.
        chosen: the alpha chosen.
        judged: the summary of `chosen` on `reporter`.
        headline: "Real gain", "No measurable gain", "No gain", "Harm", "Not judged" or "Nothing
            measured".
        sentence: the rest of the verdict.
        notes: what else a reader must know, one sentence each.
        flags: every doubt that was looked for.
    """

    stages: Mapping[str, list[Stage]]
    chooser: str
    reporter: str
    chosen: float
    judged: AlphaSummary
    headline: str
    sentence: str
    notes: tuple[str, ...]
    flags: tuple[Flag, ...]

    @property
    def honest(self) -> bool:
        """Whether alpha was chosen on other images than those reported."""
        return self.chooser != self.reporter

    @property
    def reported(self) -> Stage:
        """The stage that the verdict speaks of."""
        return next(stage for stage in self.stages[self.reporter] if self.judged in stage)

    @property
    def choosing(self) -> Stage:
        """The stage that chose alpha: all attacks if they were run, else the most alphas."""
        return max(self.stages[self.chooser], key=lambda stage: (_is_main(stage), len(stage)))

    @property
    def curve(self) -> Stage:
        """The stage drawn as lines: the one that saw more alphas, of equals the reported."""
        known = [self.reported, self.choosing, *self.stages[self.chooser]]
        return max(known, key=len)

    @property
    def marked(self) -> Stage | None:
        """The stage drawn as single marks beside the lines; None when there is but one."""
        if self.curve != self.reported:
            return self.reported
        return self.choosing if self.honest else None

    @property
    def in_order(self) -> list[Stage]:
        """All stages: the reported one, those of the split that chose, then the rest."""
        own = sorted(self.stages[self.chooser], key=_is_main, reverse=True)
        rest = [stage for stages in self.stages.values() for stage in stages]
        known = [self.reported, *own, *rest]
        return list({(stage[0].split, stage[0].round): stage for stage in known}.values())

    @property
    def raised(self) -> list[Flag]:
        """The flags that were raised, those about what is reported first."""
        raised = [flag for flag in self.flags if flag.raised]
        return sorted(raised, key=self.concerns, reverse=True)

    def concerns(self, flag: Flag) -> bool:
        """Whether a flag is about the alpha that is reported, or the base it is compared with."""
        return not flag.alphas or bool({0.0, self.chosen} & set(flag.alphas))


def find(table: pa.Table, metadata: Mapping[str, Any]) -> Findings:
    """Summarizes everything, takes or makes the choice of alpha, and judges it on the test split.

    Args:
        table: the records.
        metadata: their metadata: ``"chosen_alpha"``, without which the largest worst-case gain on
            held-out data chooses, and ``"select"``, which says how it was chosen.

    Raises:
        ValueError: the records contradict each other (see `summarize`), hold nothing but checks,
            or the chosen alpha was not measured.
    """
    stages = {split: found for split in splits(table) if (found := _stages(table, split))}
    if not stages:
        raise ValueError("records must hold a round that is no check. Got checks alone.")
    chooser, reporter = roles(sorted(stages))
    grid = next(filter(_is_main, stages[chooser]), None)
    best = choose_alpha(grid) if grid else 0.0
    given = metadata.get("chosen_alpha")
    chosen = best if given is None else float(given)
    select = metadata.get("select") or {}
    method = select.get("method", "grid")
    notes = _how_far(stages, metadata)
    if given is None and notes:
        shown = "; the one shown would be, from these images" if grid else ""
        notes.append(f"No alpha is chosen yet{shown}.")
    if given is not None and method != "grid":
        names = [name for name in rounds(table, chooser) if not name.startswith("check:")]
        met = {name: summarize(table, split=chooser, round=name) for name in names}
        notes += told(met, select, chosen)
    if chosen != best and method in ("grid", "racing"):
        notes.append(
            f"alpha = {chosen:g} was not chosen by the largest worst-case accuracy on the "
            f"{chooser} images; that would have been alpha = {best:g}."
        )
    judged = _measured(stages[reporter], chosen)
    if judged is None and (judged := _measured(stages[chooser], chosen)):
        notes.append(f"alpha = {chosen:g} has not been measured on the {reporter} images yet.")
        reporter = chooser
    if judged is None:
        known = sorted({s.alpha for found in stages.values() for stage in found for s in stage})
        raise ValueError(
            f"metadata['chosen_alpha'] must be one of the alphas in the records, {known}. "
            f"Got {chosen:g}."
        )
    # One alpha beside the base, and no word of a choice: it was given.
    chose = reporter == chooser and (given is not None or max(map(len, stages[chooser])) > 2)
    headline, sentence = verdict(judged, chose=chose).split(": ", 1)
    if chose:
        notes.append("Measure the chosen alpha on images that chose nothing.")
    result = Findings(
        stages=stages,
        chooser=chooser,
        reporter=reporter,
        chosen=chosen,
        judged=judged,
        headline=headline,
        sentence=sentence,
        notes=(),
        flags=tuple(flags(table, metadata)),
    )
    if chosen == 0:
        notes += _why_the_base_stays(result.choosing)
    elif judged.robust:
        notes += _what_gradients_said(judged, result.reported[0])
    return replace(result, notes=tuple(notes))


def _stages(table: pa.Table, split: str) -> list[Stage]:
    """Summaries of a split's rounds, without checks; numbered ones under equal attacks as one."""
    here = table.filter(pc.equal(table.column("split"), split))
    found = []

    def kind(name: str) -> tuple[str, list[str]]:
        stem, _, number = name.rpartition("-")
        rows = here.filter(pc.equal(here.column("round"), name))
        steps = rows.group_by(["order", "attack"]).aggregate([]).sort_by("order")
        return stem if number.isdecimal() else name, steps.column("attack").to_pylist()

    names = [name for name in rounds(here, split) if not name.startswith("check:")]
    for _, group in groupby(names, key=kind):
        first, *others = group
        label = f"{first} to {others[-1]}" if others else first
        rows = here.filter(pc.is_in(here.column("round"), pa.array([first, *others])))
        column = pa.repeat(label, rows.num_rows)
        place = SCHEMA.get_field_index("round")
        rows = rows.set_column(place, SCHEMA.field(place), column)
        found.append(summarize(rows, split=split, round=label))
    return found


def _is_main(stage: Stage) -> bool:
    return stage[0].round == MAIN


def _measured(stages: list[Stage], alpha: float) -> AlphaSummary | None:
    """What an alpha did under all attacks; if it has not met them, in the last stage it met."""
    found = [s for stage in sorted(stages, key=_is_main) for s in stage if s.alpha == alpha]
    return found[-1] if found else None


def _how_far(stages: Mapping[str, list[Stage]], metadata: Mapping[str, Any]) -> list[str]:
    """Says of a sweep that has not finished how far it is."""
    if not metadata.get("unfinished"):
        return []
    so_far = ", ".join(
        f"{stage[0].n:,} {split}{'' if _is_main(stage) else f' ({stage[0].round})'}"
        for split, found in stages.items()
        for stage in found
    )
    return [f"The sweep has not finished; images so far: {so_far}."]


def _why_the_base_stays(summaries: list[AlphaSummary]) -> list[str]:
    base, *others = summaries
    # A race drops some early; what they did on fewer images is another comparison.
    tried = [s for s in others if s.n == base.n]
    if not tried or not base.robust:
        return []
    best = max(tried, key=lambda s: (s.gain.value, -s.alpha))
    attacks = "" if _is_main(summaries) else f"under {', '.join(best.robust)} "
    met = " that met all of them" if len(tried) < len(others) else ""
    notes = [
        f"On the {best.split} images (n = {best.n:,}) {attacks}no alpha{met} made "
        f"the model more robust; the best, alpha = {best.alpha:g}, changed its worst case by "
        f"{100 * best.gain.value:+.1f} points (95% interval {100 * best.gain.low:+.1f} to "
        f"{100 * best.gain.high:+.1f})."
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
