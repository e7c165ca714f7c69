"""The named attacks and suites, and how names become specifications."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from lightning_meansparse.attacks.library import spelled_out, usual_kind
from lightning_meansparse.attacks.spec import KINDS, AttackSpec

_OURS = "lightning_meansparse.attacks"


def change(spec: AttackSpec, name: str, **options: Any) -> AttackSpec:
    """The same attack under another name with other options."""
    return replace(spec, name=name, options={**spec.options, **options})


_CE = AttackSpec("apgd-ce", f"{_OURS}.apgd.APGD", {"steps": 100, "n_restarts": 1, "loss": "ce"})
_SMOOTH = replace(_CE, rule="smooth", temperature=1 / 16, kind="adaptive")
_IDENTITY = replace(_CE, rule="identity", kind="adaptive")
_TRANSFER = replace(_SMOOTH, attack=f"{_OURS}.transfer.Transfer", kind="transfer")
_NARROWING = replace(_SMOOTH, attack=f"{_OURS}.transfer.Narrowing")
_SQUARE = AttackSpec(
    "square",
    f"{_OURS}.square.Square",
    {"n_queries": 5000, "n_restarts": 1, "p_init": 0.8, "loss": "margin"},
    kind="blackbox",
)

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
            _CE,
            change(_CE, "apgd-dlr", loss="dlr"),
            change(_CE, "apgd-t", loss="dlr-targeted", n_targets=9),
            AttackSpec(
                "fab-t",
                f"{_OURS}.fab.FAB",
                {
                    "steps": 100,
                    "n_restarts": 1,
                    "n_targets": 9,
                    "alpha_max": 0.1,
                    "eta": 1.05,
                    "beta": 0.9,
                },
            ),
            _SQUARE,
            change(_SQUARE, "square-1000", n_queries=1000),
            change(_TRANSFER, "transfer-base", factor=0.0, steps=50),
            change(_TRANSFER, "transfer-below", factor=0.75, steps=50),
            change(_TRANSFER, "transfer-above", factor=1.25, steps=50),
            change(replace(_SMOOTH, start="base"), "adaptive-ce", steps=50),
            change(replace(_SMOOTH, temperature=1 / 32), "adaptive-ce-sharp"),
            change(_SMOOTH, "adaptive-dlr", loss="dlr"),
            change(replace(_SMOOTH, temperature=1 / 4), "adaptive-dlr-soft", loss="dlr", steps=50),
            change(_SMOOTH, "adaptive-t", loss="dlr-targeted", n_targets=3),
            change(_SMOOTH, "adaptive-close", loss="margin", n_restarts=10, close=0.1),
            change(_IDENTITY, "adaptive-ce-identity", steps=50),
            change(_IDENTITY, "adaptive-dlr-identity", loss="dlr", steps=50),
            change(
                _NARROWING,
                "adaptive-narrowing",
                factor=4.0,
                stages=16,
                stage_steps=10,
                n_restarts=5,
                close=0.25,
            ),
            change(
                _NARROWING,
                "adaptive-narrowing-margin",
                factor=2.0,
                stages=16,
                stage_steps=10,
                loss="margin",
                n_restarts=10,
                close=0.25,
            ),
        )
    }
)
"""Single attacks by name."""


def _named(*names: str) -> tuple[AttackSpec, ...]:
    return tuple(ATTACKS[name] for name in names)


_PARTS = {
    **{name: (spec,) for name, spec in ATTACKS.items()},
    "quick": _named("adaptive-ce"),
    "basic": _named("fgsm", "pgd", "apgd-ce", "square-1000", "adaptive-ce"),
    "standard": _named("apgd-ce", "apgd-t", "fab-t", "square"),
    "blackbox": _named("square"),
    "transfer": _named("transfer-base", "transfer-below", "transfer-above"),
    "adaptive": tuple(spec for spec in ATTACKS.values() if spec.kind == "adaptive"),
}
SUITES: Mapping[str, tuple[AttackSpec, ...]] = MappingProxyType(
    {**_PARTS, "full": (*_PARTS["standard"], *_PARTS["transfer"], *_PARTS["adaptive"])}
)
"""What ``resolve_attacks`` knows by name: every single attack, and

- ``quick``: one strong adaptive attack, seconds;
- ``basic``: FGSM, PGD-20, APGD-CE, Square with 1000 queries and the same adaptive attack;
- ``standard``: the definition of AutoAttack (Croce & Hein, 2020, Sec. 6): APGD-CE 100 steps, APGD-T
  and FAB-T 100 steps against 9 targets (all, when there are fewer), Square 5000 queries;
- ``blackbox``: outputs alone;
- ``transfer``: the path of an attack on the base model, and on the same network at 0.75 and 1.25
  times alpha;
- ``adaptive``: APGD on four losses, through the identity and through smooth gates of three widths,
  from random points and from the base model's examples, with nine restarts more for what then is
  close to falling; and APGD while the bands narrow to their own width, from four times it on the
  cross-entropy and from twice on the margin, again with restarts for what is close to falling;
- ``full``: all of them, the suite for a number that is published.
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
        >>> [spec.name for spec in resolve_attacks(["quick", "pgd"])]
        ['pgd', 'adaptive-ce']
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
            return (_from_mapping({"attack": entry}),)
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
    fields.setdefault("kind", usual_kind(attack))
    fields["options"] = fields.get("options") or {}
    return spelled_out(AttackSpec(**fields))
