"""The ways to choose alpha, by name: grid, racing, a budget of clean accuracy, appearance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import pyarrow as pa

from lightning_meansparse.records import (
    HELD_OUT,
    MAIN,
    AlphaSummary,
    Paired,
    choose_alpha,
    rounds,
    summarize,
)
from lightning_meansparse.tasks.racing import Racing
from lightning_meansparse.tasks.rounds import Fixed, Round, Selection, counted

if TYPE_CHECKING:
    from lightning_meansparse.attacks import AttackSpec

Select = Literal["grid", "racing", "clean_budget", "apparent_robustness"]


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
                f"none of {counted(self.alphas)} beats the base model in the worst case on the "
                f"{images}, so alpha = 0, the base model, is chosen"
            )
        gain = next(s.gain for s in summaries if s.alpha == chosen)
        return (
            f"of {counted(self.alphas)}, alpha = {chosen:g} has the largest worst-case gain on the "
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
            f"alpha = {chosen:g} is the largest of {len(cost)} looked at ({_list(cost)}) that "
            f"costs at most {budget} ({100 * change.value:+.1f} on {change.n:,} held-out images); "
            "nobody asked about its robustness"
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


def check_attacks(
    select: str,
    *,
    alphas: tuple[float, ...],
    attacks: Sequence[AttackSpec],
    screen: Sequence[AttackSpec],
) -> None:
    """Refuse to choose by appearance under the name of a worst case.

    Raises:
        ValueError: If what decides in `"grid"` or `"racing"` follows the exact gradient alone.
    """
    suites = {"grid": {"attacks": attacks}, "racing": {"attacks": attacks, "screen": screen}}
    for name, suite in suites.get(select, {}).items() if len(alphas) > 1 else ():
        if all(spec.kind == "gradient" for spec in suite):
            raise ValueError(
                f"{name} must hold an attack that does not follow the exact gradient, which the "
                f"operator blocks, got {[spec.name for spec in suite]}: by these alone alpha would "
                "be chosen by apparent robustness. Add 'adaptive' (the default 'full' has it), or "
                "say so with select='apparent_robustness'."
            )


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


def _list(alphas: Iterable[float]) -> str:
    return ", ".join(f"{alpha:g}" for alpha in sorted(alphas))
