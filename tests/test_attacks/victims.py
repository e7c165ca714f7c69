"""What the tests of the attacks share: budgets, and a model whose robustness is known."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_meansparse.surgery import alphas, operators

EPS = 0.05
N = 80
APGD = "lightning_meansparse.attacks.apgd.APGD"
SHORT = [
    "fgsm",
    {"attack": "pgd", "options": {"steps": 10}},
    {"attack": "apgd-ce", "options": {"steps": 20}},
    {"attack": "square", "options": {"n_queries": 30}},
    {"attack": "adaptive-ce", "options": {"steps": 20}},
]
FAB = {"attack": "fab-t", "options": {"steps": 2}}
THEIRS = {"attack": "torchattacks.PGD", "name": "their-pgd", "options": {"steps": 2}}
QUICK = ["fgsm", THEIRS, SHORT[3], FAB, {"attack": "adaptive-ce", "options": {"steps": 2}}]


class Linear(nn.Module):
    """Logits linear in the pixels; ``scale`` makes them as large as one likes."""

    def __init__(self, classes: int, size: int = 12, scale: float = 1.0) -> None:
        super().__init__()
        self.head = nn.Linear(size * size, classes)
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        return self.scale * self.head(images.flatten(1))


def own_labels(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(images).argmax(1)


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything about a model and its surroundings that an attack could change."""
    return {
        "modes": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad for p in model.parameters()],
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "dtypes": [t.dtype for t in (*model.parameters(), *model.buffers())],
        "hooks": [len(m._forward_hooks) for m in model.modules()],
        "rules": [(op.backward, op.temperature) for op in operators(model).values()],
        "alphas": alphas(model),
        "torch": torch.get_rng_state(),
        "numpy": np.random.get_state()[1].copy(),
        "python": random.getstate(),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
    }


def same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, np.ndarray):
        return bool((one == two).all())
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    return bool(one == two)
