"""Attack suites and the evaluation that does not believe them.

``resolve_attacks`` turns names into `AttackSpec` s with every budget written out;
``evaluate`` runs them on a classifier in [0, 1] pixels, clips and re-scores every example, and
returns per-sample flags; ``CHECKS`` are attacks that show whether attacks work here at all.
torchattacks is imported when the first attack is built.
"""

from lightning_meansparse.attacks.checks import CHECKS, check_eps
from lightning_meansparse.attacks.evaluation import BaseExamples, Evaluation, evaluate
from lightning_meansparse.attacks.spec import AttackSpec, check_norm, parse_eps
from lightning_meansparse.attacks.suites import ATTACKS, SUITES, resolve_attacks

__all__ = [
    "ATTACKS",
    "CHECKS",
    "SUITES",
    "AttackSpec",
    "BaseExamples",
    "Evaluation",
    "check_eps",
    "check_norm",
    "evaluate",
    "parse_eps",
    "resolve_attacks",
]
