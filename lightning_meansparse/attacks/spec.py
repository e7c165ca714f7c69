"""Attack specifications: which attack, with which budget, seen through which gradient.

A specification is data. Everything that decides how strong an attack is (steps, restarts, targets,
queries, backward rule, temperature, start) is written out in it, so that a result can quote it; no
default of another library is relied on by any attack that has a name here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args

from lightning_meansparse.layer import Backward

Kind = Literal["gradient", "blackbox", "transfer", "adaptive"]
Start = Literal["random", "base"]

NORMS = ("Linf", "L2")
KINDS: tuple[str, ...] = get_args(Kind)
"""In the order in which a suite runs them."""

_BUDGETS = ("steps", "step_size", "alpha", "n_restarts", "n_targets", "n_queries")
_RESERVED_NAMES = ("clean", "worst", "apparent")


def parse_eps(eps: float | str, norm: str = "") -> float:
    """Radius of the perturbation ball from a number or a fraction.

    Args:
        eps: A positive number in pixel units (images span [0, 1]), or text such as ``"8/255"``.
        norm: With ``"Linf"``, more than the whole range of a pixel is refused: it was meant
            otherwise.

    Raises:
        TypeError: If ``eps`` is neither a number nor text.
        ValueError: If it cannot be read, or is not positive and finite.

    Examples:
        >>> parse_eps("8/255") == 8 / 255
        True
    """
    if isinstance(eps, bool) or not isinstance(eps, (int, float, str)):
        raise TypeError(
            f"eps must be a number or text such as '8/255', got {type(eps).__name__} {eps!r}."
        )
    try:
        if isinstance(eps, str):
            top, slash, bottom = eps.partition("/")
            # Not Fraction("8/255"): "0.5/255" and "1e-1" shall be readable, too.
            value = float(top) / (float(bottom) if slash else 1.0)
        else:
            value = float(eps)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(
            f"eps must be a number or a fraction such as 0.03 or '8/255', got {eps!r}."
        ) from error
    if not 0 < value < float("inf"):
        raise ValueError(
            f"eps must be positive and finite, got {eps!r}; images are in [0, 1], so a usual value "
            "is '8/255' for Linf or 0.5 for L2."
        )
    if norm == "Linf" and value > 1:
        raise ValueError(
            f"eps={eps!r} is more than the whole range of a pixel, which is [0, 1]; did you mean "
            f"'{value:g}/255'?"
        )
    return value


def check_norm(norm: str) -> None:
    """Refuse every norm but the two names, case-exact.

    L1 is not among them, because no attack of torchattacks 3.5.1 is sound there: FAB's projection
    is broken, and EADL1 goes more than twice as far as it has to, even on a linear model (a test
    measures it).

    Raises:
        ValueError: Names the accepted spelling.
    """
    if norm in NORMS:
        return
    close = [name for name in NORMS if str(norm).lower() == name.lower()]
    hint = f" Write {close[0]!r}: the spelling matters." if close else ""
    if norm == "L1":
        hint = " Under L1 no attack of torchattacks is sound, so there is no number to believe."
    raise ValueError(f"norm must be one of 'Linf', 'L2', got {norm!r}.{hint}")


@dataclass(frozen=True)
class AttackSpec:
    """One attack with its whole budget.

    Attributes:
        name: Short name, as in ``robust_acc/<name>``; no spaces or slashes.
        attack: Class path of a ``torchattacks.Attack``: ``"torchattacks.PGDL2"``, one of ours, or
            yours.
        options: Keyword arguments for the class, budgets spelled out. ``eps``, ``norm``, ``seed``
            and the number of classes are given at evaluation.
        rule: Backward rule of the operators while the attack runs; the forward is always exact.
        temperature: Width of the smooth gate as a fraction of the band; None with other rules.
        start: ``"random"`` inside the ball, or ``"base"``: the adversarial example of the same
            model at alpha 0. Only attacks that take start points can use ``"base"``.
        kind: ``"gradient"`` (exact gradient, gives the apparent robustness), ``"blackbox"``,
            ``"transfer"`` or ``"adaptive"`` (knows the operator).

    Raises:
        ValueError: If a field does not make sense.

    Examples:
        >>> AttackSpec("pgd-l2", "torchattacks.PGDL2", {"alpha": 0.1, "steps": 20}).kind
        'gradient'
    """

    name: str
    attack: str
    options: Mapping[str, Any] = field(default_factory=dict)
    rule: Backward = "exact"
    temperature: float | None = None
    start: Start = "random"
    kind: Kind = "gradient"

    def __post_init__(self) -> None:
        """Check every field."""
        if not self.name or any(c.isspace() or c == "/" for c in self.name):
            raise ValueError(
                f"name of an attack must be text without spaces or slashes, got {self.name!r}; it "
                "becomes part of metric names such as 'robust_acc/pgd'."
            )
        if self.name in _RESERVED_NAMES:
            raise ValueError(
                f"name {self.name!r} is reserved for results; call the attack otherwise."
            )
        if "." not in self.attack:
            raise ValueError(
                f"attack must be a class path such as 'torchattacks.PGD', got {self.attack!r}."
            )
        for argument, value, known in (
            ("rule", self.rule, get_args(Backward)),
            ("start", self.start, get_args(Start)),
            ("kind", self.kind, KINDS),
        ):
            if value not in known:
                raise ValueError(
                    f"{argument} of attack {self.name!r} must be one of {', '.join(known)}, got "
                    f"{value!r}."
                )
        if (self.rule == "smooth") != (self.temperature is not None):
            raise ValueError(
                f"temperature of attack {self.name!r} belongs to rule='smooth' and only there (a "
                f"fraction of the band, e.g. 1/16); got rule={self.rule!r}, "
                f"temperature={self.temperature!r}."
            )
        if self.kind == "gradient" and self.rule != "exact":
            raise ValueError(
                f"attack {self.name!r} changes the backward pass (rule={self.rule!r}), so its "
                "kind is 'adaptive', not 'gradient'."
            )
        for given in ("eps", "norm", "seed", "model"):
            if given in self.options:
                raise ValueError(
                    f"options of attack {self.name!r} must not hold {given!r}: it is given once "
                    "for all attacks of an evaluation."
                )
        for option in _BUDGETS:
            budget = self.options.get(option)
            if isinstance(budget, (int, float)) and not budget > 0:
                raise ValueError(
                    f"option {option!r} of attack {self.name!r} must be above 0, got {budget!r}: "
                    "the attack would do nothing, and everything would look robust."
                )
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle and deepcopy through the constructor (a mapping proxy knows neither)."""
        return _rebuild, (self.as_dict(),)

    def as_dict(self) -> dict[str, Any]:
        """Plain, JSON-ready fields; ``AttackSpec(**spec.as_dict()) == spec``."""
        return {
            "name": self.name,
            "attack": self.attack,
            "options": dict(self.options),
            "rule": self.rule,
            "temperature": self.temperature,
            "start": self.start,
            "kind": self.kind,
        }


def _rebuild(fields: dict[str, Any]) -> AttackSpec:
    return AttackSpec(**fields)
