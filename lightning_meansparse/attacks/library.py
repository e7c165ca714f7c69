"""The door to torchattacks: imported when the first attack is built, and then only from here."""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
from dataclasses import replace
from typing import Any

from torch import nn

from lightning_meansparse.attacks.spec import AttackSpec, Kind

_BOTH = frozenset({"APGD", "FAB", "Square", "AutoAttack"})
_LINF = frozenset(
    [
        "FGSM",
        "BIM",
        "RFGSM",
        "PGD",
        "EOTPGD",
        "FFGSM",
        "TPGD",
        "MIFGSM",
        "UPGD",
        "DIFGSM",
        "TIFGSM",
        "Jitter",
        "NIFGSM",
        "PGDRS",
        "SINIFGSM",
        "VMIFGSM",
        "VNIFGSM",
        "SPSA",
        "PIFGSM",
        "PIFGSMPP",
    ]
)
_BLACKBOX = frozenset(["Square", "SPSA"])
_L2 = frozenset(["CW", "PGDL2", "PGDRSL2", "DeepFool", "EADEN"])

_GIVEN = frozenset({"eps", "norm", "seed", "n_classes", "resc_schedule", "verbose"})
"""Arguments of a constructor that `build_attack` decides, or that decide nothing."""

MAX_TARGETS = 9
"""Targets of a targeted attack per sample, as in AutoAttack; fewer when there are fewer classes."""


def load_torchattacks() -> Any:
    """Import torchattacks.

    Raises:
        ImportError: Names the extra that brings it.
    """
    try:
        return importlib.import_module("torchattacks")
    except ImportError as error:
        raise ImportError(
            f"attacks need torchattacks and scipy ({error}). Install them with: "
            'pip install "lightning_meansparse[attacks]"'
        ) from error


def attack_class(spec: AttackSpec) -> type:
    """The class behind ``spec.attack``.

    Raises:
        ImportError: If torchattacks, or the module named in the path, cannot be imported.
        ValueError: If the module has no such class, or it is no ``torchattacks.Attack``.
    """
    library = load_torchattacks()
    module_name, _, class_name = spec.attack.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(
            f"attack {spec.name!r}: cannot import {module_name!r} of {spec.attack!r} ({error})."
        ) from error
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, library.attack.Attack)):
        raise ValueError(
            f"attack {spec.name!r}: {spec.attack!r} must be a class derived from "
            f"torchattacks.Attack, got {found!r}."
        )
    return found


def usual_kind(attack: str) -> Kind:
    """What kind of attack a class path names, as far as the library's names tell."""
    module, _, name = attack.rpartition(".")
    ours_or_unknown = module.partition(".")[0] != "torchattacks"
    return "gradient" if ours_or_unknown or name not in _BLACKBOX else "blackbox"


def spelled_out(spec: AttackSpec) -> AttackSpec:
    """The same attack with its class's own defaults written out, so that a result can quote them.

    Raises:
        ImportError: As `attack_class`.
        ValueError: As `attack_class`.
    """
    parameters = inspect.signature(attack_class(spec)).parameters.values()
    options = {
        parameter.name: parameter.default
        for parameter in parameters
        if parameter.name not in _GIVEN and isinstance(parameter.default, (bool, int, float, str))
    }
    return replace(spec, options=options | dict(spec.options))


def check_attack(spec: AttackSpec, norm: str) -> None:
    """Refuse, before anything runs, an attack that is wrong or unsound under a norm.

    Raises:
        ImportError: As `attack_class`.
        ValueError: If the class does not take an option, or is not sound under ``norm``.
    """
    cls = attack_class(spec)
    accepted = inspect.signature(cls).parameters
    if unknown := sorted(set(spec.options) - set(accepted)):
        raise ValueError(
            f"attack {spec.name!r}: {cls.__name__} takes no {', '.join(map(repr, unknown))}; it "
            f"takes {', '.join(name for name in accepted if name != 'model')}."
        )
    if spec.start == "base" and not hasattr(cls, "perturb_from"):
        raise ValueError(
            f"attack {spec.name!r}: {cls.__name__} cannot start from given points (start='base'); "
            "lightning_meansparse.attacks.apgd.APGD can."
        )
    if cls.__module__.partition(".")[0] != "torchattacks":
        return
    name = cls.__name__
    sound = [n for n, names in (("Linf", _LINF | _BOTH), ("L2", _L2 | _BOTH)) if name in names]
    if name == "APGDT":
        sound, hint = ["Linf"], " Its L2 steps mix up samples; 'apgd-t' is sound under both norms."
    elif name in ("AutoAttack", "MultiAttack"):
        sound, hint = [], " It hides its budgets; attacks='standard' spells them out."
    else:
        hint = " 'pgd', 'apgd-ce', 'apgd-t', 'fab-t', 'square' and 'adaptive-ce' take both norms."
    if norm not in sound:
        raise ValueError(
            f"attack {spec.name!r}: torchattacks.{name} is not sound under norm={norm!r}"
            f"{' (but is under ' + sound[0] + ')' if sound else ''}.{hint}"
        )


def build_attack(
    spec: AttackSpec, model: nn.Module, *, eps: float, norm: str, seed: int, num_classes: int
) -> Any:
    """Construct the attack on ``model`` with everything that its constructor asks for.

    Args:
        spec: What to build.
        model: Pixels to logits.
        eps: Radius of the ball.
        norm: ``"Linf"`` or ``"L2"``.
        seed: Seed of its random numbers.
        num_classes: Number of logits; targeted attacks get at most ``MAX_TARGETS`` + 1 of it.

    Returns:
        A ``torchattacks.Attack``.
    """
    cls = attack_class(spec)
    offered = {
        "eps": eps,
        "norm": norm,
        "seed": seed,
        # torchattacks derives the number of targets from it: 10 crashes on fewer classes, 1000
        # means 999 targets.
        "n_classes": min(MAX_TARGETS + 1, num_classes),
        # Off: AutoAttack's schedule is for 10,000 queries whatever the number asked for.
        "resc_schedule": False,
        "verbose": False,
    }
    accepted = inspect.signature(cls).parameters
    arguments = {key: value for key, value in offered.items() if key in accepted} | dict(
        spec.options
    )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints instead of warning
        return cls(model, **arguments)
