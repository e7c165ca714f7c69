"""Records in, numbers and words out: summaries per alpha, the choice of alpha, the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pyarrow as pa

from lightning_meansparse.records.intervals import Paired, Proportion
from lightning_meansparse.records.runs import Run, place, runs
from lightning_meansparse.records.table import HELD_OUT, MAIN


@dataclass(frozen=True)
class AlphaSummary:
    """What one alpha did in one round of one split.

    Attributes:
        split: name of the split.
        round: name of the round.
        alpha: threshold in standard deviations; 0 is the base model.
        n: number of samples.
        clean: accuracy without attack.
        robust: accuracy left after each attack and all before it, in the order of the attacks;
            empty where none ran.
        kinds: kind of each attack in `robust`.
        apparent: accuracy left after the last attack of kind ``"gradient"``; None if none ran.
        worst: accuracy left after all attacks; `clean` where none ran.
        gain: ``worst`` minus the base model's, on the same samples, under the same attacks.
        masking: ``apparent - worst``, a fraction; None (not measured) where ``apparent`` is, and
            where no attack of another kind ran after the gradient ones.
        forwards: forward passes spent by all attacks, counted per sample.
        backwards: backward passes, likewise.
    """

    split: str
    round: str
    alpha: float
    n: int
    clean: Proportion
    robust: dict[str, Proportion]
    kinds: dict[str, str]
    apparent: Proportion | None
    worst: Proportion
    gain: Paired
    masking: float | None
    forwards: int
    backwards: int

    @property
    def base(self) -> Proportion:
        """The base model's worst-case accuracy on the same samples."""
        return Proportion(self.worst.k - self.gain.gained + self.gain.lost, self.n)


def summarize(table: pa.Table, *, split: str, round: str = MAIN) -> list[AlphaSummary]:
    """Summarizes one round of one split of a records table, alpha by alpha.

    A sample that occurs twice (a distributed sampler pads its last batch) counts once: it stands
    only where every copy stands, and the dearer copy gives the cost.

    Args:
        table: records with the columns of `SCHEMA`.
        split: which split; the names are in ``splits(table)``.
        round: which round of it; the names are in ``rounds(table, split)``.

    Returns:
        One summary per alpha, ascending; the first is the base model.

    Raises:
        ValueError: the split, the round or the base rows are missing, an alpha ran on other
            samples or under other attacks than the base, a sample lacks an attack, stands up again
            after it fell, or one index names two different images.
    """
    base, *others = runs(table, split, round)
    return [_summary(run, base) for run in (base, *others)]


def _summary(run: Run, base: Run) -> AlphaSummary:
    n = len(run.indices)
    left = [Proportion(int(flags.sum()), n) for flags in run.standing.T]
    exact = [step for step, kind in enumerate(run.kinds) if kind == "gradient"]
    apparent = left[exact[-1]] if exact else None
    masking = None
    if apparent is not None and exact[-1] < len(run.kinds) - 1:
        masking = (apparent.k - left[-1].k) / n
    mine = run.standing[:, -1]
    others = base.standing[np.searchsorted(base.indices, run.indices), -1]
    return AlphaSummary(
        split=run.split,
        round=run.round,
        alpha=run.alpha,
        n=n,
        clean=left[0],
        robust=dict(zip(run.names[1:], left[1:], strict=True)),
        kinds=dict(zip(run.names[1:], run.kinds[1:], strict=True)),
        apparent=apparent,
        worst=left[-1],
        gain=Paired(int((mine & ~others).sum()), int((others & ~mine).sum()), n),
        masking=masking,
        forwards=run.forwards,
        backwards=run.backwards,
    )


def choose_alpha(summaries: Sequence[AlphaSummary]) -> float:
    """Chooses the alpha with the largest worst-case gain over the base.

    To stay honest, give it summaries of held-out data and report on the test split.

    Args:
        summaries: summaries of one round.

    Returns:
        The best alpha; of equals the smallest; 0.0 unless some alpha beats the base.

    Raises:
        ValueError: there are no summaries, or they are of several splits or rounds.
    """
    if not summaries:
        raise ValueError("summaries must hold at least one summary. Got none.")
    places = sorted({place(summary.split, summary.round) for summary in summaries})
    if len(places) > 1:
        raise ValueError(
            f"summaries must come from one round of one split, the one that chooses. Got {places}."
        )

    def rank(summary: AlphaSummary) -> tuple[Fraction, float]:
        gain = summary.gain
        return Fraction(gain.gained - gain.lost, gain.n), -summary.alpha

    best = max(summaries, key=rank)
    return best.alpha if rank(best)[0] > 0 else 0.0


def verdict(summary: AlphaSummary, *, chose: bool | None = None) -> str:
    """Says in one plain sentence whether this alpha makes the model more robust.

    "Real gain" and "Harm" need an exact McNemar p below 0.05; everything else is "No measurable
    gain", with the number of images that could have measured the difference seen. Without an
    attack of kind ``"adaptive"`` the operator may only have blinded the attacks: what is not
    harm is then "Not judged".

    Args:
        summary: one alpha's summary, best of the test split.
        chose: whether these images chose alpha, which the sentence then says; None for whether
            the split is `HELD_OUT`.

    Returns:
        The sentence, with n, the 95 % interval and p.
    """
    images = f"{summary.split} images (n = {summary.n:,})"
    if not summary.robust:
        return f"Nothing measured: no attack was run on the {images}."
    worst, gain = summary.worst, summary.gain
    every = "every attack" + ("" if summary.round == MAIN else f" of {summary.round}")
    where = ""
    if (summary.split == HELD_OUT) if chose is None else chose:
        where = ", on the very images that chose alpha"
    if summary.alpha == 0:
        return (
            f"No gain: alpha = 0 leaves the base model as it is; {worst.value:.1%} of the {images} "
            f"withstand {every}, 95% interval {worst.low:.1%} to {worst.high:.1%}{where}."
        )
    # An attack that succeeded is proof, whatever it knew; one that failed is not.
    harm = gain.p < 0.05 and gain.value < 0
    judged = harm or "adaptive" in summary.kinds.values()
    measured = (
        f"at alpha = {summary.alpha:g}, {worst.value:.1%} of the {images} withstand "
        f"{every if judged else 'the attacks that were run'}, "
        f"against {summary.base.value:.1%} for the base model under the same attacks "
        f"({100 * gain.value:+.1f} points, 95% interval {100 * gain.low:+.1f} to "
        f"{100 * gain.high:+.1f}, {_p(gain.p)})" + (f"{where}, which flatters it" if where else "")
    )
    if not judged:
        return (
            f"Not judged: {measured}; no attack that knows the operator was run, so the operator "
            'may only have blinded those. Measure again with attacks="basic", or with "adaptive" '
            "among the attacks."
        )
    if gain.p < 0.05:
        return f"{'Harm' if harm else 'Real gain'}: {measured}."
    needed = gain.needed()
    if needed is None:
        return f"No measurable gain: {measured}."
    step = 10 ** max(0, len(str(needed)) - 2)
    return (
        f"No measurable gain: {measured}; telling a difference this small from none would need "
        f"about {math.ceil(needed / step) * step:,} images (80% power, two-sided 5%)."
    )


def _p(p: float) -> str:
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"
