"""Rounds, and plans that say which comes next: functions of the records, without a state.

So a sweep that was killed goes on by asking its plan again, and whoever holds the records can
replay it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from lightning_meansparse.attacks import AttackSpec


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
        known = names_in(table)
        return next((each for each in self.rounds if each.name not in known), None)


def names_in(table: pa.Table) -> set[str]:
    """Names of the rounds of a table."""
    return set(pc.unique(table.column("round")).to_pylist())


def counted(alphas: Sequence[float]) -> str:
    """How many alphas beside the base, in words."""
    n = sum(alpha > 0 for alpha in alphas)
    return "1 alpha" if n == 1 else f"{n} alphas"
