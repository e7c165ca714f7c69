"""Records in, numbers and words out: summaries per alpha, the choice of alpha, the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_meansparse.records.intervals import Paired, Proportion
from lightning_meansparse.records.table import HELD_OUT, MAIN

# Two passes over one image differ by float noise; two different images by far more.
_MARGIN_TOLERANCE = 1e-2


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


def splits(table: pa.Table) -> tuple[str, ...]:
    """Names of the splits in a records table, sorted."""
    return tuple(sorted(pc.unique(table.column("split")).to_pylist()))


def rounds(table: pa.Table, split: str) -> tuple[str, ...]:
    """Names of a split's rounds: numbered ones by their number, `MAIN`, then the checks."""
    names = pc.unique(table.filter(pc.equal(table.column("split"), split)).column("round"))

    def rank(name: str) -> tuple[bool, bool, str, int]:
        stem, _, number = name.rpartition("-")
        known = (stem, int(number)) if number.isdecimal() else (name, 0)
        return name.startswith("check:"), name == MAIN, *known

    return tuple(sorted(names.to_pylist(), key=rank))


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
    if split not in splits(table):
        raise ValueError(
            f"split must be one of {list(splits(table))}, the splits in these records. "
            f"Got {split!r}."
        )
    known = rounds(table, split)
    if round not in known:
        raise ValueError(
            f"round must be one of {list(known)}, the rounds of split {split!r}. Got {round!r}."
        )
    chosen = pc.and_(pc.equal(table.column("split"), split), pc.equal(table.column("round"), round))
    table = table.filter(chosen)
    alphas = sorted(pc.unique(table.column("alpha")).to_pylist())
    if alphas[0] != 0.0:
        raise ValueError(
            f"table must hold the base model's rows (alpha = 0) of {_place(split, round)}: a "
            f"gain is measured against them. Got alphas {alphas}; add 0 to the sweep's alphas."
        )
    column = table.column("alpha")
    runs = [
        _Run.from_rows(table.filter(pc.equal(column, alpha)), split, round, alpha)
        for alpha in alphas
    ]
    return [run.summary(base=runs[0]) for run in runs]


def _place(split: str, round: str) -> str:
    return f"split {split!r}" + ("" if round == MAIN else f", round {round!r}")


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
    places = sorted({_place(summary.split, summary.round) for summary in summaries})
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
    where = ""
    if (summary.split == HELD_OUT) if chose is None else chose:
        where = ", on the very images that chose alpha"
    if summary.alpha == 0:
        return (
            f"No gain: alpha = 0 leaves the base model as it is; {worst.value:.1%} of the {images} "
            f"withstand every attack, 95% interval {worst.low:.1%} to {worst.high:.1%}{where}."
        )
    # An attack that succeeded is proof, whatever it knew; one that failed is not.
    harm = gain.p < 0.05 and gain.value < 0
    judged = harm or "adaptive" in summary.kinds.values()
    measured = (
        f"at alpha = {summary.alpha:g}, {worst.value:.1%} of the {images} withstand "
        f"{'every attack' if judged else 'the attacks that were run'}, "
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


@dataclass(frozen=True)
class _Run:
    """One alpha in one round as arrays, checked and free of duplicates.

    Attributes:
        names: ``"clean"`` and the attacks, in order; kinds likewise.
        indices: sample indices, ascending, (N,).
        standing: cumulative flags, (N, A + 1).
        cost: forward and backward passes of all samples.
    """

    split: str
    round: str
    alpha: float
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    indices: np.ndarray
    standing: np.ndarray
    cost: tuple[int, int]

    @classmethod
    def from_rows(cls, table: pa.Table, split: str, round: str, alpha: float) -> _Run:
        """Raises ValueError, naming the sample or attack, when rows contradict each other."""
        where = f"alpha = {alpha:g} of {_place(split, round)}"
        column = {name: table.column(name).to_numpy() for name in table.column_names}
        steps = sorted(set(zip(column["order"], column["attack"], column["kind"], strict=True)))
        orders, names, kinds = zip(*steps, strict=True)
        if len(set(orders)) < len(steps) or len(set(names)) < len(steps) or names[0] != "clean":
            raise ValueError(
                f"table must hold one order of attacks, 'clean' first, for {where}. "
                f"Got {[(int(order), name) for order, name, _ in steps]}."
            )
        indices, row = np.unique(column["index"], return_inverse=True)
        shape, cell = (len(indices), len(steps)), (row, np.searchsorted(orders, column["order"]))
        seen = np.zeros(shape, dtype=bool)
        seen[cell] = True
        if not seen.all():
            sample, attack = np.argwhere(~seen)[0]
            raise ValueError(
                f"table must hold every attack for every sample of {where}. Sample "
                f"{indices[sample]} lacks {names[attack]!r}; run the sweep again to complete it."
            )
        for name, tolerance in (("label", 0.0), ("margin", _MARGIN_TOLERANCE)):
            values = column[name].astype(np.float64)
            first = np.empty(len(indices))
            first[row] = values
            same = np.isclose(values, first[row], rtol=tolerance, atol=tolerance, equal_nan=True)
            if not same.all():
                raise ValueError(
                    f"table must name each image by one index. In {where}, index "
                    f"{column['index'][~same][0]} has two values of {name!r}; number the samples "
                    "over the whole split, not per batch."
                )
        standing = np.ones(shape, dtype=bool)
        np.logical_and.at(standing, cell, column["standing"])
        risen = np.argwhere(standing[:, 1:] & ~standing[:, :-1])
        if len(risen):
            raise ValueError(
                f"standing must be cumulative: in {where}, sample {indices[risen[0, 0]]} fell "
                f"before {names[risen[0, 1] + 1]!r} and stands after it."
            )
        cost = []
        for name in ("forwards", "backwards"):
            spent = np.zeros(shape, dtype=np.int64)
            np.maximum.at(spent, cell, column[name])
            cost.append(int(spent.sum()))
        return cls(split, round, alpha, names, kinds, indices, standing, (cost[0], cost[1]))

    def summary(self, *, base: _Run) -> AlphaSummary:
        """Compares with the base run; raises ValueError unless it is comparable."""
        where = f"alpha = {self.alpha:g} of {_place(self.split, self.round)}"
        if self.names != base.names:
            raise ValueError(
                f"{where} must be attacked as the base model was, by {list(base.names[1:])}. "
                f"Got {list(self.names[1:])}."
            )
        unpaired = np.setdiff1d(self.indices, base.indices)
        if len(unpaired):
            raise ValueError(
                f"table must hold the base model's rows (alpha = 0) for every sample of {where}. "
                f"{len(unpaired)} are missing, the first is index {unpaired[0]}."
            )
        n = len(self.indices)
        left = [Proportion(int(flags.sum()), n) for flags in self.standing.T]
        exact = [place for place, kind in enumerate(self.kinds) if kind == "gradient"]
        apparent = left[exact[-1]] if exact else None
        masking = None
        if apparent is not None and exact[-1] < len(self.kinds) - 1:
            masking = (apparent.k - left[-1].k) / n
        mine = self.standing[:, -1]
        others = base.standing[np.searchsorted(base.indices, self.indices), -1]
        return AlphaSummary(
            split=self.split,
            round=self.round,
            alpha=self.alpha,
            n=n,
            clean=left[0],
            robust=dict(zip(self.names[1:], left[1:], strict=True)),
            kinds=dict(zip(self.names[1:], self.kinds[1:], strict=True)),
            apparent=apparent,
            worst=left[-1],
            gain=Paired(int((mine & ~others).sum()), int((others & ~mine).sum()), n),
            masking=masking,
            forwards=self.cost[0],
            backwards=self.cost[1],
        )
