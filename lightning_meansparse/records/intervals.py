"""Two value objects that carry their own uncertainty: a share and a paired difference.

Written with the standard library alone; the tests compare them with SciPy and published values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

_Z95 = NormalDist().inv_cdf(0.975)


@dataclass(frozen=True)
class Proportion:
    """A share ``k / n`` with its Wilson score 95 % interval [1].

    Unlike the usual ``p ± 2 SE`` the interval never leaves [0, 1] and is right at 0 % and 100 %.

    [1] Wilson, Probable Inference, JASA 22 (1927).

    Examples:
        >>> share = Proportion(81, 263)
        >>> f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]"
        '0.308 [0.255, 0.366]'
    """

    k: int
    n: int

    def __post_init__(self) -> None:
        """Raises ValueError unless ``0 <= k <= n``."""
        if not 0 <= self.k <= self.n:
            raise ValueError(f"Proportion needs 0 <= k <= n. Got k={self.k}, n={self.n}.")

    @property
    def value(self) -> float:
        """The share, a fraction; NaN when n = 0."""
        return self.k / self.n if self.n else math.nan

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval."""
        return 0.0 if self.k == 0 else self._centre - self._half_width

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval."""
        return 1.0 if self.k == self.n else self._centre + self._half_width

    @property
    def _centre(self) -> float:
        return (self.k + _Z95**2 / 2) / (self.n + _Z95**2)

    @property
    def _half_width(self) -> float:
        spread = self.k * (self.n - self.k) / self.n + _Z95**2 / 4
        return _Z95 * math.sqrt(spread) / (self.n + _Z95**2)


@dataclass(frozen=True)
class Paired:
    """A difference of two accuracies on the same ``n`` samples.

    Only samples on which the two models disagree carry information: ``gained`` stand with the
    operator and fall without, ``lost`` the other way round.

    [1] McNemar, Psychometrika 12 (1947), as the exact binomial test.
    [2] Bonett & Price, Adjusted Wald interval for a difference of binomial proportions based on
        paired data, J. Educ. Behav. Stat. 37 (2012).
    [3] Miettinen, The matched pairs design in the case of all-or-none responses, Biometrics 24
        (1968): the sample size.

    Examples:
        >>> change = Paired(gained=0, lost=12, n=300)
        >>> f"{100 * change.value:+.2f} ± {100 * change.se:.2f}, p = {change.p:.5f}"
        '-4.00 ± 1.13, p = 0.00049'
    """

    gained: int
    lost: int
    n: int

    def __post_init__(self) -> None:
        """Raises ValueError unless the counts fit into n."""
        if self.gained < 0 or self.lost < 0 or self.gained + self.lost > self.n:
            raise ValueError(
                "Paired needs gained, lost >= 0 and gained + lost <= n. "
                f"Got gained={self.gained}, lost={self.lost}, n={self.n}."
            )

    @property
    def value(self) -> float:
        """The difference, a fraction; NaN when n = 0."""
        return (self.gained - self.lost) / self.n if self.n else math.nan

    @property
    def se(self) -> float:
        """Standard error of the mean per-sample difference (n - 1 in the variance)."""
        if self.n < 2:
            return math.nan
        difference = self.gained - self.lost
        squares = self.gained + self.lost - difference**2 / self.n
        return math.sqrt(max(squares, 0.0) / (self.n * (self.n - 1)))

    @property
    def low(self) -> float:
        """Lower end of the 95 % interval [2], which stays honest when nothing changed."""
        return max(-1.0, self._centre - self._half_width)

    @property
    def high(self) -> float:
        """Upper end of the 95 % interval [2]."""
        return min(1.0, self._centre + self._half_width)

    @property
    def _centre(self) -> float:
        return (self.gained - self.lost) / (self.n + 2)

    @property
    def _half_width(self) -> float:
        moved = (self.gained + self.lost + 2) / (self.n + 2)
        return _Z95 * math.sqrt((moved - self._centre**2) / (self.n + 2))

    @property
    def p(self) -> float:
        """Two-sided exact McNemar p-value [1]: ``gained`` against a fair coin."""
        few, all_ = min(self.gained, self.lost), self.gained + self.lost
        # P(X <= few): the largest term by lgamma, the smaller ones by their ratio to it.
        term = math.exp(
            math.lgamma(all_ + 1)
            - math.lgamma(few + 1)
            - math.lgamma(all_ - few + 1)
            - all_ * math.log(2)
        )
        tail = term
        for k in range(few, 0, -1):
            term *= k / (all_ - k + 1)
            tail += term
        return min(1.0, 2 * tail)

    def needed(self, *, power: float = 0.8) -> int | None:
        """Samples needed to tell the difference seen here from none (two-sided 5 %) [3].

        Args:
            power: probability of telling it, if it is real and as large as seen here.

        Returns:
            The number of samples, or None when no difference was seen: no n can measure zero.

        Raises:
            ValueError: ``power`` is not between 0 and 1.
        """
        if not 0 < power < 1:
            raise ValueError(f"power must lie between 0 and 1. Got {power}.")
        if self.gained == self.lost:
            return None
        moved, difference = (self.gained + self.lost) / self.n, self.value
        reach = _Z95 * math.sqrt(moved) + NormalDist().inv_cdf(power) * math.sqrt(
            moved - difference**2
        )
        return math.ceil((reach / difference) ** 2)
