"""Checks of the evaluation itself: attacks whose outcome is known when attacks work at all.

Each runs alone, on a few images, so that its flags do not depend on any other attack. What they say
is judged by `lightning_meansparse.records.flags`. The ideas are those of Carlini et al., On
Evaluating Adversarial Robustness, arXiv 1902.06705, Sec. 5.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from lightning_meansparse.attacks.spec import AttackSpec
from lightning_meansparse.attacks.suites import ATTACKS, change

CHECKS: Mapping[str, AttackSpec] = MappingProxyType(
    {
        "fewer-steps": change(ATTACKS["pgd"], "fewer-steps", steps=10, step_size=0.25),
        "more-steps": change(ATTACKS["pgd"], "more-steps", steps=100, step_size=0.025),
        "large-eps": change(ATTACKS["apgd-ce"], "large-eps", steps=50),
    }
)
"""By name: ten PGD steps, a hundred shorter ones (both 2.5 radii long, both through the exact
gradient), and APGD in a ball that holds every image, where nothing can stand."""


def check_eps(name: str, eps: float, norm: str, shape: Sequence[int]) -> float:
    """Radius of a check.

    Args:
        name: One of `CHECKS`.
        eps: Radius of the evaluation.
        norm: ``"Linf"`` or ``"L2"``.
        shape: Of one image, ``(C, H, W)``.

    Examples:
        >>> check_eps("large-eps", 0.5, "L2", (3, 32, 32))
        55.42562584220407
    """
    if name != "large-eps":
        return eps
    return 1.0 if norm == "Linf" else math.sqrt(math.prod(shape))
