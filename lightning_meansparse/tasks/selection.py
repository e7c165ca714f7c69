"""Ways to choose alpha: each says, from the records so far, what to measure next, and the choice.

A strategy is a function of the records. It keeps no state, so a sweep that was killed goes on by
asking it again, and whoever holds the records can replay how alpha was chosen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_meansparse.records import (
    HELD_OUT,
    MAIN,
    AlphaSummary,
    Paired,
    choose_alpha,
    rounds,
    summarize,
)

if TYPE_CHECKING:
    from lightning_meansparse.attacks import AttackSpec

Select = Literal["grid", "racing", "clean_budget", "apparent_robustness"]

FIRST = 32
"""Racing decides nothing on fewer samples than this."""

LEVEL = 0.05
"""Of racing's tests, all of them together."""


@dataclass(frozen=True)
class Round:
    """One comparable measurement: the same attacks on the same samples at every alpha.

    Attributes:
        name: As in the records.
        alphas: Ascending, the base's 0 first.
        attacks: In the order in which they run; none for the clean accuracy alone.
        start: The first sample, counted over all ranks in the order of the data.
        stop: The sample to stop before; None for the last.
        eps: Radius of the ball; None for that of the sweep.
    """

    name: str
    alphas: tuple[float, ...]
    attacks: tuple[AttackSpec, ...]
    start: int = 0
    stop: int | None = None
    eps: float | None = None


class Plan(Protocol):
    """Says which round comes next."""

    def next(self, table: pa.Table) -> Round | None:
        """Return the next round, given the rows of all before it; None when all is measured."""


class Selection(Plan, Protocol):
    """A plan for the held-out samples that ends with a choice."""

    def choice(self, table: pa.Table) -> float:
        """Return the alpha to use, given the rows of all rounds."""

    def reason(self, table: pa.Table) -> str:
        """Return how it was chosen, in plain words, without a full stop."""


@dataclass(frozen=True)
class Fixed:
    """Rounds that are known beforehand.

    Examples:
        >>> from lightning_meansparse.records import SCHEMA
        >>> Fixed((Round("main", (0.0, 0.2), ()),)).next(SCHEMA.empty_table()).alphas
        (0.0, 0.2)
    """

    rounds: tuple[Round, ...]

    def next(self, table: pa.Table) -> Round | None:
        """Return the first round without rows."""
        known = _names(table)
        return next((each for each in self.rounds if each.name not in known), None)


@dataclass(frozen=True)
class Grid:
    """Everything: all attacks at all alphas on all samples, and the largest worst-case gain."""

    alphas: tuple[float, ...]
    attacks: tuple[AttackSpec, ...]

    def next(self, table: pa.Table) -> Round | None:
        """Return the one round, once."""
        return Fixed((Round(MAIN, self.alphas, self.attacks),)).next(table)

    def choice(self, table: pa.Table) -> float:
        """Return the alpha with the largest worst-case gain; 0 unless one beats the base."""
        return choose_alpha(summarize(table, split=HELD_OUT))

    def reason(self, table: pa.Table) -> str:
        """Name the gain, or say that there is none."""
        summaries = summarize(table, split=HELD_OUT)
        chosen = choose_alpha(summaries)
        images = f"{summaries[0].n:,} held-out images"
        if not chosen:
            return (
                f"none of {_count(self.alphas)} beats the base model in the worst case on the "
                f"{images}, so alpha = 0, the base model, is chosen"
            )
        gain = next(s.gain for s in summaries if s.alpha == chosen)
        return (
            f"of {_count(self.alphas)}, alpha = {chosen:g} has the largest worst-case gain on the "
            f"{images}, {100 * gain.value:+.1f} points"
        )


@dataclass(frozen=True)
class Apparent(Grid):
    """A grid that believes the gradient: the choice that masked gradients make look best."""

    def choice(self, table: pa.Table) -> float:
        """Return the alpha with the largest accuracy under exact-gradient attacks alone."""
        return max(summarize(table, split=HELD_OUT), key=lambda s: (_apparent(s), -s.alpha)).alpha

    def reason(self, table: pa.Table) -> str:
        """Say what the choice is worth."""
        chosen = self.choice(table)
        summary = next(s for s in summarize(table, split=HELD_OUT) if s.alpha == chosen)
        return (
            f"alpha = {chosen:g} was chosen by apparent robustness, {_apparent(summary):.1%} under "
            "attacks that follow the exact gradient, which the operator blocks; in the worst case "
            f"it has {summary.worst.value:.1%}, the base model {summary.base.value:.1%}"
        )


@dataclass(frozen=True)
class Racing:
    """Cheap attacks on few samples first; the full suite for base and finalist only [1].

    Rounds `race-1`, `race-2`, … run the `screen` on an eighth, a quarter, a half and all of the
    samples (never fewer than 32 at first), each on the new samples alone. After a round an alpha is
    out when, on all samples so far, it

    - stands on fewer than the leader, which may be the base, by an exact one-sided McNemar test at
      5 % divided by the number of rounds and of alphas (Bonferroni: the chance that the best alpha
      is ever dropped by bad luck stays below 5 %), or
    - cannot beat the base any more, whatever the samples to come would show.

    When the samples are used up the second rule leaves only alphas with a gain. The best of them is
    the finalist and meets the base in the round `main`; it is chosen if it gains there too. Without
    a finalist there is no such round, and 0 is chosen.

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

    def next(self, table: pa.Table) -> Round | None:
        """Return the next race, the final, or None."""
        run, left = self._standing(table)
        if run < len(self.stops) and left:
            start, stop = (0, *self.stops)[run : run + 2]
            return Round(f"race-{run + 1}", (0.0, *left), self.screen, start, stop)
        if not left or MAIN in _names(table):
            return None
        return Round(MAIN, (0.0, left[0]), self.attacks)

    def choice(self, table: pa.Table) -> float:
        """Return the finalist if it beats the base under the full suite, else 0."""
        if MAIN not in _names(table):
            return 0.0
        return choose_alpha(summarize(table, split=HELD_OUT))

    def reason(self, table: pa.Table) -> str:
        """Tell when alphas were dropped, and how the final ended."""
        run, left = self._standing(table)
        used = self.stops[run - 1]
        story = f"a race of {_count(self.alphas)} over {used:,} held-out images"
        if not left:
            return f"{story} left none that beats the base model, so alpha = 0 is chosen"
        gain = summarize(table, split=HELD_OUT)[-1].gain
        final = (
            f"{story} left alpha = {left[0]:g}; under the full suite its worst-case gain is "
            f"{100 * gain.value:+.1f} points"
        )
        return final if self.choice(table) else f"{final}, so alpha = 0, the base model, is chosen"

    def _standing(self, table: pa.Table) -> tuple[int, tuple[float, ...]]:
        """How many races were run, and which alphas are still in, the best first."""
        names = sorted(name for name in _names(table) if name.startswith("race-"))
        if not names:
            return 0, tuple(alpha for alpha in self.alphas if alpha)
        flags = _flags(table.filter(pc.is_in(table.column("round"), pa.array(names))))
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


@dataclass(frozen=True)
class CleanBudget:
    """The largest alpha that costs no more clean accuracy than allowed, by bisection.

    Each round `clean-1`, `clean-2`, … measures one alpha and the base without an attack, so of n
    alphas about log2(n) are looked at. That clean accuracy falls as alpha grows is assumed, not
    checked: where it does not, the choice keeps to the budget but need not be the largest.

    Attributes:
        alphas: Ascending, with 0.
        budget: How much of the samples may be lost against the base, a fraction.
    """

    alphas: tuple[float, ...]
    budget: float

    def next(self, table: pa.Table) -> Round | None:
        """Return a round for the alpha in the middle of what is undecided."""
        cost = _clean_cost(table)
        _, asked = self._search(cost)
        return None if asked is None else Round(f"clean-{len(cost) + 1}", (0.0, asked), ())

    def choice(self, table: pa.Table) -> float:
        """Return the largest alpha measured within the budget."""
        return self._search(_clean_cost(table))[0]

    def reason(self, table: pa.Table) -> str:
        """Name the cost of the choice."""
        cost, chosen = _clean_cost(table), self.choice(table)
        budget = f"{100 * self.budget:g} points of clean accuracy"
        if not chosen:
            return (
                f"every alpha looked at ({_list(cost)}) costs more than {budget}, so alpha = 0, "
                "the base model, is chosen"
            )
        change = cost[chosen]
        return (
            f"alpha = {chosen:g} is the largest of {_count(self.alphas)} that costs at most "
            f"{budget} ({100 * change.value:+.1f} on {change.n:,} held-out images); nobody asked "
            "about its robustness"
        )

    def _search(self, cost: dict[float, Paired]) -> tuple[float, float | None]:
        """The largest alpha known to be within the budget, and the one to ask about."""
        within, beyond = 0, len(self.alphas)
        while beyond - within > 1:
            middle = (within + beyond) // 2
            change = cost.get(self.alphas[middle])
            if change is None:
                return self.alphas[within], self.alphas[middle]
            # A hair more than the budget: 0.01 x 300 is 3.0000000000000004.
            if change.lost - change.gained <= self.budget * change.n + 1e-9:
                within = middle
            else:
                beyond = middle
        return self.alphas[within], None


def strategy(
    select: Select,
    *,
    alphas: tuple[float, ...],
    attacks: tuple[AttackSpec, ...],
    screen: tuple[AttackSpec, ...],
    clean_budget: float,
    samples: int,
) -> Selection:
    """Return the strategy of that name; of the base model alone there is nothing to choose."""
    if select == "racing" and len(alphas) > 1:
        return Racing(alphas, attacks, screen, samples)
    if select == "clean_budget" and len(alphas) > 1:
        return CleanBudget(alphas, clean_budget)
    return (Apparent if select == "apparent_robustness" else Grid)(alphas, attacks)


def check_select(select: str, *, attacks: Sequence[AttackSpec], clean_budget: float) -> None:
    """Refuse what no strategy can work with.

    Raises:
        ValueError: If the name is unknown, the budget no fraction, or `"apparent_robustness"` is
            asked of attacks without one that follows the exact gradient.
    """
    if select not in get_args(Select):
        raise ValueError(
            f"select must be one of {', '.join(map(repr, get_args(Select)))}, got {select!r}"
        )
    if not 0 <= clean_budget < 1:
        raise ValueError(
            f"clean_budget must be a fraction in [0, 1), such as 0.01 for one point of accuracy, "
            f"got {clean_budget!r}"
        )
    if select == "apparent_robustness" and not any(a.kind == "gradient" for a in attacks):
        raise ValueError(
            "select='apparent_robustness' needs an attack of kind 'gradient', such as 'pgd', got "
            f"{[spec.name for spec in attacks]}"
        )


def _names(table: pa.Table) -> set[str]:
    return set(pc.unique(table.column("round")).to_pylist())


def _flags(table: pa.Table) -> dict[float, np.ndarray]:
    """Per alpha, whether each sample stands after the last attack, in the order of the samples."""
    order = table.column("order").to_numpy()
    last = table.filter(pa.array(order == order.max()))
    last = last.sort_by([("alpha", "ascending"), ("index", "ascending")])
    alphas, standing = (last.column(name).to_numpy() for name in ("alpha", "standing"))
    return {float(alpha): standing[alphas == alpha] for alpha in np.unique(alphas)}


def _paired(mine: np.ndarray, others: np.ndarray) -> Paired:
    return Paired(int((mine & ~others).sum()), int((others & ~mine).sum()), len(mine))


def _clean_cost(table: pa.Table) -> dict[float, Paired]:
    """The change of clean accuracy at every alpha that a `clean-` round measured."""
    cost: dict[float, Paired] = {}
    for name in rounds(table, HELD_OUT):
        _, *others = summarize(table, split=HELD_OUT, round=name)
        cost |= {other.alpha: other.gain for other in others}
    return cost


def _apparent(summary: AlphaSummary) -> float:
    if summary.apparent is None:
        raise ValueError("no attack of kind 'gradient' was run, so nothing is apparent")
    return summary.apparent.value


def _count(alphas: Sequence[float]) -> str:
    n = sum(alpha > 0 for alpha in alphas)
    return "1 alpha" if n == 1 else f"{n} alphas"


def _list(alphas: Iterable[float]) -> str:
    return ", ".join(f"{alpha:g}" for alpha in sorted(alphas))
