"""Rows as arrays: one run per split, round and alpha, checked and free of duplicates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_meansparse.records.table import HELD_OUT, MAIN, TEST

# Two passes over one image differ by float noise; two different images by far more.
_MARGIN_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Run:
    """One alpha in one round of one split, N samples under A attacks.

    A sample that occurs twice (a distributed sampler pads its last batch) counts once: it stands
    only where every copy stands, and of all other facts the larger counts.

    Attributes:
        split: name of the split.
        round: name of the round.
        alpha: threshold in standard deviations.
        names: ``"clean"`` and the attacks, in order.
        kinds: ``"clean"`` and the attacks' kinds.
        indices: sample indices, ascending, (N,).
        standing: cumulative flags, (N, A + 1); the first column is clean.
        noise: the column of that name, (N,).
        zero_gradient: likewise, (N,).
        probabilities: likewise, (N,).
        forwards: forward passes of all samples.
        backwards: backward passes of all samples.
    """

    split: str
    round: str
    alpha: float
    names: tuple[str, ...]
    kinds: tuple[str, ...]
    indices: np.ndarray
    standing: np.ndarray
    noise: np.ndarray
    zero_gradient: np.ndarray
    probabilities: np.ndarray
    forwards: int
    backwards: int

    @property
    def where(self) -> str:
        """The run in words, for messages."""
        return f"alpha = {self.alpha:g} of {place(self.split, self.round)}"


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


def roles(names: Sequence[str]) -> tuple[str, str]:
    """Of some splits the one that chooses alpha and the one that is reported; one alone is both."""
    reporter = TEST if TEST in names else names[0]
    others = [name for name in names if name != reporter]
    return (HELD_OUT if HELD_OUT in names else (others or [reporter])[0]), reporter


def place(split: str, round: str) -> str:
    """A split, and the round of it unless it is `MAIN`, for messages."""
    return f"split {split!r}" + ("" if round == MAIN else f", round {round!r}")


def runs(table: pa.Table, split: str, round: str) -> list[Run]:
    """Takes one round out of a records table, a run per alpha.

    Returns:
        The runs, ascending in alpha; the first is the base model, and all others have met the
        same attacks on samples that it has met, too.

    Raises:
        ValueError: as `summarize`.
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
    here = pc.and_(pc.equal(table.column("split"), split), pc.equal(table.column("round"), round))
    table = table.filter(here)
    column = table.column("alpha")
    alphas = sorted(pc.unique(column).to_pylist())
    if alphas[0] != 0.0:
        raise ValueError(
            f"table must hold the base model's rows (alpha = 0) of {place(split, round)}: a "
            f"gain is measured against them. Got alphas {alphas}; add 0 to the sweep's alphas."
        )
    base, *others = (
        _run(table.filter(pc.equal(column, alpha)), split, round, alpha) for alpha in alphas
    )
    for run in others:
        if run.names != base.names:
            raise ValueError(
                f"{run.where} must be attacked as the base model was, by {list(base.names[1:])}. "
                f"Got {list(run.names[1:])}."
            )
        unpaired = np.setdiff1d(run.indices, base.indices)
        if len(unpaired):
            raise ValueError(
                f"table must hold the base model's rows (alpha = 0) for every sample of "
                f"{run.where}. {len(unpaired)} are missing, the first is index {unpaired[0]}."
            )
    return [base, *others]


def _run(table: pa.Table, split: str, round: str, alpha: float) -> Run:
    """Raises ValueError, naming the sample or attack, when rows contradict each other."""
    where = f"alpha = {alpha:g} of {place(split, round)}"
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

    def spent(name: str) -> int:
        passes = np.zeros(shape, dtype=np.int64)
        np.maximum.at(passes, cell, column[name])
        return int(passes.sum())

    def largest(name: str) -> np.ndarray:
        values = np.full(len(indices), np.nan)
        np.fmax.at(values, row, column[name])  # unlike maximum without a word about NaN
        return values

    return Run(
        split=split,
        round=round,
        alpha=alpha,
        names=names,
        kinds=kinds,
        indices=indices,
        standing=standing,
        noise=largest("noise"),
        zero_gradient=largest("zero_gradient"),
        probabilities=largest("probabilities") > 0,
        forwards=spent("forwards"),
        backwards=spent("backwards"),
    )
