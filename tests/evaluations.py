"""Evaluations by hand, as records read them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lightning_meansparse.records import MAIN, TEST, rows

KINDS = {"apgd-ce": "gradient", "square": "blackbox", "smooth": "adaptive"}
"""What evaluations run unless told otherwise."""

ALL_KINDS = {
    **KINDS,
    "transfer-base": "transfer",
    **dict.fromkeys(("fewer-steps", "more-steps", "large-eps"), "gradient"),
}


@dataclass
class FakeEvaluation:
    """The attributes of an evaluation that records reads."""

    attacks: tuple[str, ...]
    kinds: tuple[str, ...]
    labels: Any
    indices: Any
    clean: Any
    standing: Any
    attacked: Any
    margin: Any
    noise: Any
    zero_gradient: Any
    probabilities: Any
    forwards: Any
    backwards: Any
    seed: int = 0


def evaluation(
    survived: np.ndarray, *, start: int = 0, attacks: tuple[str, ...] = tuple(KINDS)
) -> FakeEvaluation:
    """``survived[i]``: how many steps (clean, attack 1, ...) sample i stands, 0 … A + 1."""
    survived = np.asarray(survived)
    n, steps = len(survived), np.arange(1, len(attacks) + 1)
    standing = survived[:, None] > steps
    attacked = survived[:, None] >= steps
    indices = start + np.arange(n)
    return FakeEvaluation(
        attacks=attacks,
        kinds=tuple(ALL_KINDS[name] for name in attacks),
        labels=torch.from_numpy(indices % 10),
        indices=torch.from_numpy(indices),
        clean=torch.from_numpy(survived > 0),
        standing=torch.from_numpy(standing),
        attacked=torch.from_numpy(attacked),
        margin=torch.from_numpy(np.sin(indices).astype(np.float32)),
        noise=torch.zeros(n),
        zero_gradient=torch.full((n,), 0.25),
        probabilities=torch.zeros(n, dtype=torch.bool),
        forwards=torch.from_numpy(attacked * 100),
        backwards=torch.from_numpy(attacked * 99),
    )


def table(
    survived: dict[float, np.ndarray],
    *,
    split: str = TEST,
    round: str = MAIN,
    attacks: tuple[str, ...] = tuple(KINDS),
) -> pa.Table:
    return pa.concat_tables(
        [
            rows(evaluation(values, attacks=attacks), alpha=alpha, split=split, round=round)
            for alpha, values in survived.items()
        ]
    )
