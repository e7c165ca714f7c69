"""Racing: to find the best of many alphas with few evaluations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_meansparse.records import HELD_OUT, MAIN, Paired, choose_alpha, summarize
from lightning_meansparse.tasks.rounds import Round, counted, names_in

if TYPE_CHECKING:
    from lightning_meansparse.attacks import AttackSpec

FIRST = 32
"""Racing decides nothing on fewer samples than this."""

LEVEL = 0.05
"""Of racing's tests, all of them together."""


@dataclass(frozen=True)
class Racing:
    """Cheap attacks on few samples first, then strong ones; the full suite for the finalist [1].

    Rounds `race-1`, `race-2`, … run the `screen` on an eighth, a quarter, a half and all of the
    samples (never fewer than 32 at first), each on the new samples alone. After a round an alpha is
    out when, on all samples so far, it

    - stands on fewer than the leader, which may be the base, by an exact one-sided McNemar test at
      5 % divided by the number of rounds and of alphas (Bonferroni: the chance that this test ever
      drops the best alpha stays below 5 %), or
    - cannot beat the base under the screen any more, whatever the samples to come would show. A
      gain smaller than the samples can tell is given up with it.

    So when the samples are used up only alphas with a gain are left. If these are several, one more
    race over all samples has the stronger attacks: those of `attacks` that know the operator. The
    best is the finalist and meets the base in the round `main`; it is chosen if it gains there too.
    Without a finalist there is no such round, and 0 is chosen.

    [1] After Maron & Moore, Hoeffding Races, NeurIPS 1993, with an exact paired test.

    Attributes:
        alphas: Ascending, with 0.
        attacks: Of the round `main`.
        screen: Of the races.
        samples: Number of held-out samples.
    """

    alphas: tuple[float, ...]
    attacks: tuple[AttackSpec, ...]
    screen: tuple[AttackSpec, ...]
    samples: int

    @property
    def stops(self) -> tuple[int, ...]:
        """The samples after which each race stops, counted from the first of all.

        Examples:
            >>> Racing((0.0, 0.1), (), (), samples=1000).stops
            (125, 250, 500, 1000)
            >>> Racing((0.0, 0.1), (), (), samples=100).stops
            (50, 100)
        """
        parts = (8, 4, 2)
        early = [self.samples // part for part in parts if self.samples // part >= FIRST]
        return (*early, self.samples)

    @property
    def stronger(self) -> tuple[AttackSpec, ...]:
        """The attacks that decide between several alphas that the screen has left."""
        return tuple(spec for spec in self.attacks if spec.kind in ("transfer", "adaptive"))

    def next(self, table: pa.Table) -> Round | None:
        """Return the next race, the final, or None."""
        run, left = self._standing(table)
        if not left or MAIN in names_in(table):
            return None
        name, alphas = f"race-{run + 1}", (0.0, *sorted(left))
        if run < len(self.stops):
            start, stop = (0, *self.stops)[run : run + 2]
            return Round(name, alphas, self.screen, start, stop)
        if run == len(self.stops) and len(left) > 1 and self.stronger:
            return Round(name, alphas, self.stronger)
        return Round(MAIN, (0.0, left[0]), self.attacks)

    def choice(self, table: pa.Table) -> float:
        """Return the finalist if it beats the base under the full suite, else 0."""
        if MAIN not in names_in(table):
            return 0.0
        return choose_alpha(summarize(table, split=HELD_OUT))

    def reason(self, table: pa.Table) -> str:
        """Tell when alphas were dropped, and how the final ended."""
        run, left = self._standing(table)
        used = self.stops[min(run, len(self.stops)) - 1]
        story = f"a race of {counted(self.alphas)} over {used:,} held-out images"
        if not left:
            screen = ", ".join(spec.name for spec in self.screen)
            return (
                f"{story} left none that beats the base model under {screen}, so alpha = 0 is "
                "chosen"
            )
        gain = summarize(table, split=HELD_OUT)[-1].gain
        final = (
            f"{story} left alpha = {left[0]:g}; under the full suite its worst-case gain is "
            f"{100 * gain.value:+.1f} points"
        )
        return final if self.choice(table) else f"{final}, so alpha = 0, the base model, is chosen"

    def _standing(self, table: pa.Table) -> tuple[int, tuple[float, ...]]:
        """How many races were run, and which alphas are still in, the best first."""
        names = sorted(name for name in names_in(table) if name.startswith("race-"))
        if not names:
            return 0, tuple(alpha for alpha in self.alphas if alpha)
        # The last one has other attacks, which cannot be pooled with the screen.
        pooled = names[-1:] if len(names) > len(self.stops) else names
        flags = _flags(table.filter(pc.is_in(table.column("round"), pa.array(pooled))))
        most = len(flags[0.0])  # who was dropped earlier has met fewer
        there = {alpha: each for alpha, each in flags.items() if len(each) == most}
        leader = max(there, key=lambda alpha: (there[alpha].sum(), -alpha))
        to_come = self.samples - most
        level = LEVEL / (len(self.stops) * max(len(self.alphas) - 1, 1))

        def is_in(alpha: float) -> bool:
            behind = _paired(there[alpha], there[leader])
            gain = _paired(there[alpha], there[0.0])
            worse = behind.value < 0 and behind.p / 2 < level
            return not worse and gain.gained - gain.lost + to_come > 0

        left = [alpha for alpha in there if alpha and is_in(alpha)]
        return len(names), tuple(sorted(left, key=lambda alpha: (-there[alpha].sum(), alpha)))


def _flags(table: pa.Table) -> dict[float, np.ndarray]:
    """Per alpha, whether each sample stands after the last attack, in the order of the samples."""
    order = table.column("order").to_numpy()
    last = table.filter(pa.array(order == order.max()))
    last = last.sort_by([("alpha", "ascending"), ("index", "ascending")])
    alphas, standing = (last.column(name).to_numpy() for name in ("alpha", "standing"))
    return {float(alpha): standing[alphas == alpha] for alpha in np.unique(alphas)}


def _paired(mine: np.ndarray, others: np.ndarray) -> Paired:
    return Paired(int((mine & ~others).sum()), int((others & ~mine).sum()), len(mine))
