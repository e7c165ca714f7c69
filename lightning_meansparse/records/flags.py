"""Evaluation flags: what would make a robust accuracy hard to believe, looked for in the records.

The questions are those of Carlini et al., On Evaluating Adversarial Robustness, arXiv 1902.06705,
Sec. 5, and of the checks of AutoAttack; docs/evaluation.md answers each with what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from lightning_meansparse.records.intervals import Paired
from lightning_meansparse.records.runs import Run, roles, rounds, runs, splits
from lightning_meansparse.records.table import MAIN

# Fewer images are what good attacks leave to each other anyway: where nothing is masked, Square
# takes up to 4 of 1,000 images that 100 steps of APGD have left.
_FEW = 0.005
_FEWEST = 2
# An attack that may move one pixel of a hundred is as good as blind.
_BLIND = 0.99
# Of the spread of the logits: two float32 passes differ by 1e-5 of it, random layers by 1e-2.
_FLOAT_NOISE = 1e-3
_SIGNIFICANT = 0.05

_ATTACK = 'run attacks="full", which holds every kind'
_AGAIN = "records of format 1, or without an attack, do not hold it; run the sweep again"
_CHECK = "run the sweep with check_images above 0"


@dataclass(frozen=True)
class Flag:
    """One doubt about an evaluation.

    Attributes:
        name: the doubt, as a heading of docs/evaluation.md.
        raised: whether the records give reason for it; None where they cannot tell.
        alphas: where it was raised, ascending; empty where it concerns all of them.
        seen: a sentence on what the records hold, with numbers; where they cannot tell, what to do
            (no sentence).
    """

    name: str
    raised: bool | None
    alphas: tuple[float, ...]
    seen: str

    @property
    def read_on(self) -> str:
        """Where it is explained: raised if, what it means, what to do."""
        return f"docs/evaluation.md#{self.name.replace(' ', '-')}"


class _Sight(NamedTuple):
    """What one run shows: whether that is too much, how much (a share), and in words."""

    raised: bool
    share: float
    alpha: float
    text: str


def flags(table: pa.Table, metadata: Mapping[str, Any] | None = None) -> list[Flag]:
    """Looks for every known reason to doubt an evaluation.

    Args:
        table: records with the columns of `SCHEMA`.
        metadata: their metadata, for the alpha that was chosen.

    Returns:
        Every flag, raised, not raised or not measured, always in the same order.

    Raises:
        ValueError: the records contradict each other, see `summarize`.
    """
    metadata = metadata or {}
    measured: list[Run] = []
    checks: dict[str, dict[str, list[Run]]] = {}
    for split in splits(table):
        for round in rounds(table, split):
            if round.startswith("check:"):
                checks.setdefault(round, {})[split] = runs(table, split, round)
            else:
                measured += runs(table, split, round)
    # Races are short: among many a few images fall to any attack by chance.
    full = [run for run in measured if run.round == MAIN]
    fewer, more = (checks.get(f"check:{which}-steps", {}) for which in ("fewer", "more"))
    sights: dict[str, tuple[Iterable[_Sight | None], str]] = {
        "blackbox beats white-box": ((_beaten(run, "blackbox") for run in full), _ATTACK),
        "transfer beats white-box": ((_beaten(run, "transfer") for run in full), _ATTACK),
        "zero gradients": (map(_blind, measured), _AGAIN),
        "random output": (map(_noisy, measured), _AGAIN),
        "probabilities": (map(_saturated, measured), _AGAIN),
        "more steps help the defender": (
            (
                _helped(short, long)
                for split in sorted(fewer.keys() & more.keys())
                for short, long in product(fewer[split], more[split])
                if short.alpha == long.alpha
            ),
            _CHECK,
        ),
        "accuracy at a large eps": (
            (_beyond(run) for found in checks.get("check:large-eps", {}).values() for run in found),
            _CHECK,
        ),
    }
    found = [_flag(name, seen, todo) for name, (seen, todo) in sights.items()]
    return [*found, _selection(measured, metadata.get("chosen_alpha"))]


def _flag(name: str, sights: Iterable[_Sight | None], todo: str) -> Flag:
    known = [sight for sight in sights if sight is not None]
    if not known:
        return Flag(name, None, (), todo)
    alphas = sorted({sight.alpha for sight in known if sight.raised})
    most = max(known, key=lambda sight: (sight.raised, sight.share))
    return Flag(name, bool(alphas), tuple(alphas), most.text)


def _many(k: int, n: int) -> bool:
    return k >= _FEWEST and k > _FEW * n


def _images(run: Run, k: int, n: int, what: str = "images") -> str:
    return f"at alpha = {run.alpha:g}, {k:,} of {n:,} {run.split} {what}"


def _beaten(run: Run, kind: str) -> _Sight | None:
    """Images that fall to a kind of attack after all that follow the exact gradient."""
    exact = [step for step, name in enumerate(run.kinds) if name == "gradient"]
    later = [s for s, name in enumerate(run.kinds) if name == kind and exact and s > exact[-1]]
    if not later:
        return None
    fell = sum(int((run.standing[:, s - 1] & ~run.standing[:, s]).sum()) for s in later)
    n, names = len(run.indices), ", ".join(run.names[s] for s in later)
    text = (
        f"{_images(run, fell, n)} fall to {names} after every attack on the exact gradient failed."
    )
    return _Sight(_many(fell, n), fell / n, run.alpha, text)


def _blind(run: Run) -> _Sight | None:
    known = run.standing[:, 0] & ~np.isnan(run.zero_gradient)
    zeros = run.zero_gradient[known]
    if not len(zeros):
        return None
    k, n = int((zeros >= _BLIND).sum()), len(zeros)
    text = (
        f"{_images(run, k, n, 'images that are classified right')} have a gradient of exactly 0 at "
        f"{_BLIND:.0%} of their pixels or more; over all of these images it is 0 at "
        f"{zeros.mean():.1%} of the pixels."
    )
    return _Sight(_many(k, n), k / n, run.alpha, text)


def _noisy(run: Run) -> _Sight | None:
    noise = run.noise[~np.isnan(run.noise)]
    if not len(noise):
        return None
    k, n = int((noise > _FLOAT_NOISE).sum()), len(noise)
    text = (
        f"{_images(run, k, n)} get other logits in a second forward pass, by up to "
        f"{noise.max():.2g} of their spread."
    )
    return _Sight(_many(k, n), k / n, run.alpha, text)


def _saturated(run: Run) -> _Sight | None:
    alike = run.probabilities
    if np.isnan(run.noise).all() and not alike.any():
        return None  # format 1 did not look
    text = f"{_images(run, int(alike.sum()), len(alike))} have outputs that are >= 0 and sum to 1."
    return _Sight(bool(alike.all()), float(alike.mean()), run.alpha, text)


def _helped(fewer: Run, more: Run) -> _Sight | None:
    _, few, many = np.intersect1d(fewer.indices, more.indices, return_indices=True)
    short, long = fewer.standing[few, -1], more.standing[many, -1]
    change = Paired(int((long & ~short).sum()), int((short & ~long).sum()), len(few))
    if not change.n:
        return None
    text = (
        f"at alpha = {more.alpha:g}, {long.mean():.1%} of {change.n:,} {more.split} images stand "
        f"after more steps, {short.mean():.1%} after fewer ({100 * change.value:+.1f} points, "
        f"p = {change.p:.2g})."
    )
    raised = change.value > 0 and change.p < _SIGNIFICANT
    return _Sight(raised, change.value, more.alpha, text)


def _beyond(run: Run) -> _Sight:
    k, n = int(run.standing[:, -1].sum()), len(run.indices)
    text = f"{_images(run, k, n)} withstand an attack whose ball holds every image, where none can."
    return _Sight(k > 0, k / n, run.alpha, text)


def _selection(measured: list[Run], chosen: float | None) -> Flag:
    """Whether the images that are reported have chosen alpha."""
    name = "selection on the test split"
    if not measured:
        return Flag(name, None, (), "there is no round but checks; finish the sweep")
    chooser, reporter = roles(sorted({run.split for run in measured}))
    tried = {run.alpha for run in measured if run.split == chooser} - {0.0}
    reported = {run.alpha for run in measured if run.split == reporter and run.round == MAIN}
    if len(tried) < 2 and chosen is None:
        return Flag(name, False, (), f"the {chooser} images have met no alphas to choose from.")
    if chooser == reporter:
        text = (
            f"the {reporter} images, the only ones, have met {len(tried)} alphas besides the base."
        )
        return Flag(name, True, (), text)
    if chosen is not None and chosen not in reported:
        text = f"only the {chooser} images, which chose alpha = {chosen:g}, have met it."
        return Flag(name, True, (chosen,), text)
    text = f"the {chooser} images chose alpha, the {reporter} images did not."
    return Flag(name, False, (), text)
