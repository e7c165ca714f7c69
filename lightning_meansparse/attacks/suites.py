"""Attack specifications: which attack, with which budget, in which order.

A specification is data. Everything that decides how strong an attack is (steps, restarts, targets,
queries, backward rule, temperature, start) is written out in it, so that a result can quote it; no
default of another library is relied on by any attack that has a name here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
_OURS = "lightning_meansparse.attacks"


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

    Raises:
        ValueError: Names the accepted spelling.
    """
    if norm in NORMS:
        return
    close = [name for name in NORMS if str(norm).lower() == name.lower()]
    hint = f" Write {close[0]!r}: the spelling matters." if close else ""
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


def _apgd(name: str, **changes: Any) -> AttackSpec:
    options: dict[str, Any] = {"steps": 100, "n_restarts": 1, "loss": "ce"}
    options |= changes.pop("options", {})
    return AttackSpec(name, f"{_OURS}.apgd.APGD", options, **changes)


ATTACKS: Mapping[str, AttackSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            AttackSpec(
                "fgsm", f"{_OURS}.pgd.PGD", {"steps": 1, "step_size": 1.0, "random_start": False}
            ),
            AttackSpec(
                "pgd", f"{_OURS}.pgd.PGD", {"steps": 20, "step_size": 0.125, "random_start": True}
            ),
            _apgd("apgd-ce"),
            _apgd("apgd-dlr", options={"loss": "dlr"}),
            _apgd("apgd-t", options={"loss": "dlr-targeted", "n_targets": 9}),
            AttackSpec(
                "fab-t",
                "torchattacks.FAB",
                {
                    "steps": 100,
                    "n_restarts": 1,
                    "multi_targeted": True,
                    "alpha_max": 0.1,
                    "eta": 1.05,
                    "beta": 0.9,
                },
            ),
            AttackSpec(
                "square",
                f"{_OURS}.square.Square",
                {"n_queries": 1000, "n_restarts": 1, "p_init": 0.8, "loss": "margin"},
                kind="blackbox",
            ),
            _apgd(
                "adaptive",
                options={"steps": 50},
                rule="smooth",
                temperature=1 / 16,
                start="base",
                kind="adaptive",
            ),
        )
    }
)
"""Single attacks by name."""


def _square(n_queries: int) -> AttackSpec:
    square = ATTACKS["square"]
    return replace(square, options={**square.options, "n_queries": n_queries})


SUITES: Mapping[str, tuple[AttackSpec, ...]] = MappingProxyType(
    {
        **{name: (spec,) for name, spec in ATTACKS.items()},
        "quick": (ATTACKS["adaptive"],),
        "basic": tuple(ATTACKS[n] for n in ("fgsm", "pgd", "apgd-ce", "square", "adaptive")),
        "standard": (ATTACKS["apgd-ce"], ATTACKS["apgd-t"], ATTACKS["fab-t"], _square(5000)),
    }
)
"""What ``resolve_attacks`` knows by name: every single attack, and

- ``quick``: one strong adaptive attack, seconds;
- ``basic``: FGSM, PGD-20, APGD-CE, Square (1000 queries) and the adaptive attack;
- ``standard``: the definition of AutoAttack (Croce & Hein, 2020, Sec. 6): APGD-CE 100 steps, APGD-T
  and FAB-T 100 steps against 9 targets (all, when there are fewer), Square 5000 queries.
"""


def resolve_attacks(
    attacks: str | AttackSpec | Mapping[str, Any] | Sequence[str | AttackSpec | Mapping[str, Any]],
) -> tuple[AttackSpec, ...]:
    """Turn names, class paths, dictionaries and specifications into one ordered suite.

    Args:
        attacks: A name out of `SUITES`, a class path (``"torchattacks.PGDL2"``), a dictionary
            with the fields of `AttackSpec` (``name`` may be left out), a specification, or a
            sequence of these. A dictionary whose ``attack`` is a known name changes that attack:
            ``{"attack": "square", "options": {"n_queries": 5000}}``.

    Returns:
        The specifications, each once, ordered by kind: gradient, blackbox, transfer, adaptive.

    Raises:
        TypeError: If an entry is of another type.
        ValueError: If a name is unknown, a name stands for two different attacks, or none is given.

    Examples:
        >>> [spec.name for spec in resolve_attacks(["adaptive", "pgd"])]
        ['pgd', 'adaptive']
    """
    entries = [attacks] if isinstance(attacks, (str, AttackSpec, Mapping)) else list(attacks)
    chosen: dict[str, AttackSpec] = {}
    for entry in entries:
        for spec in _resolve(entry):
            if chosen.setdefault(spec.name, spec) != spec:
                raise ValueError(
                    f"attacks holds two different attacks named {spec.name!r}; give one of them "
                    "another name: {'attack': ..., 'name': ...}."
                )
    if not chosen:
        raise ValueError("attacks is empty; name at least one, e.g. attacks='quick'.")
    return tuple(sorted(chosen.values(), key=lambda spec: KINDS.index(spec.kind)))


def _resolve(entry: Any) -> tuple[AttackSpec, ...]:
    if isinstance(entry, AttackSpec):
        return (entry,)
    if isinstance(entry, str):
        if entry in SUITES:
            return SUITES[entry]
        if "." in entry and "/" not in entry:
            return (AttackSpec(entry.rpartition(".")[2].lower(), entry),)
        raise ValueError(
            f"attacks: {entry!r} is not known; known are {', '.join(SUITES)}, or a class path "
            "such as 'torchattacks.PGDL2'."
        )
    if isinstance(entry, Mapping):
        return (_from_mapping(entry),)
    raise TypeError(
        f"attacks must hold names, dictionaries or AttackSpec objects, got {type(entry).__name__}."
    )


def _from_mapping(entry: Mapping[str, Any]) -> AttackSpec:
    fields = dict(entry)
    known = set(AttackSpec.__dataclass_fields__)
    if unknown := sorted(set(fields) - known):
        raise ValueError(
            f"attacks: a dictionary has unknown keys {', '.join(map(repr, unknown))}; known are "
            f"{', '.join(sorted(known))}. Arguments of the attack's class go into 'options'."
        )
    attack = fields.get("attack", fields.get("name"))
    if isinstance(attack, str) and attack in ATTACKS:
        template = ATTACKS[attack]
        fields["options"] = {**template.options, **(fields.get("options") or {})}
        if fields.get("rule", "smooth") != "smooth":
            fields.setdefault("temperature", None)
        return replace(template, **{**fields, "attack": template.attack})
    if not isinstance(attack, str) or "." not in attack:
        raise ValueError(
            f"attacks: a dictionary needs 'attack', one of {', '.join(ATTACKS)} or a class path "
            f"such as 'torchattacks.PGDL2'; got {attack!r}."
        )
    fields.setdefault("name", attack.rpartition(".")[2].lower())
    fields["options"] = fields.get("options") or {}
    return AttackSpec(**fields)
