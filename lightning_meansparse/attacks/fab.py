"""Fast adaptive boundary attack, targeted: walks along the decision boundary towards the image.

Croce & Hein, Minimally distorted adversarial examples with a fast adaptive boundary attack, arXiv
1907.02044, Algorithm 1; with the projections of torchattacks. Imported only when the attack is
built, since its base class is torchattacks'.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from lightning_meansparse.attacks.losses import margin_loss
from lightning_meansparse.attacks.pgd import Loss, Outcome, StartedAttack, Task

_library: Any = importlib.import_module("torchattacks.attacks.fab")


class FAB(StartedAttack):
    """FAB-T: one run per target class, which ends for a sample inside the ball.

    torchattacks' class walks on after that, cannot say what a sample cost, and draws random starts
    per batch.

    Args:
        model: Pixels to logits.
        eps: Radius of the ball.
        norm: ``"Linf"`` or ``"L2"``.
        steps: Steps per run; each costs two forward passes and one backward pass per sample that
            still stands.
        n_restarts: Runs per target; the first begins at the given start points, if any, or at the
            image, the others at random within half the radius.
        n_targets: The most likely wrong classes of the clean image, at most classes - 1.
        alpha_max: Largest weight of the step that starts at the image.
        eta: How far steps go beyond the linearised boundary.
        beta: How much of the way an adversarial point keeps when it goes back towards the image.
        seed: Seed of the random starts.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        norm: str = "Linf",
        steps: int = 100,
        n_restarts: int = 1,
        n_targets: int = 9,
        alpha_max: float = 0.1,
        eta: float = 1.05,
        beta: float = 0.9,
        seed: int = 0,
    ) -> None:
        counts = {"steps": steps, "n_restarts": n_restarts, "n_targets": n_targets}
        super().__init__("FAB", model, eps=eps, norm=norm, seed=seed, **counts)
        self.alpha_max = alpha_max
        self.eta = eta
        self.beta = beta

    def search(self, task: Task, outcome: Outcome) -> None:
        """Look for an example in the ball; without one the image itself is left."""
        targets = self.likely_targets(task.images, task.labels, self.n_targets, outcome)
        for run, rows in outcome.runs(self.n_restarts * targets.shape[1]):
            part = task.select(rows)
            if run >= targets.shape[1]:
                start = (part.images + part.ball.random(self.seed, part.indices, run)) / 2
            else:
                start = part.images if part.starts is None else part.starts
            target = targets[rows, run % targets.shape[1]]
            self._run(rows, part.images, part.labels, target, start, outcome)

    def _run(
        self,
        rows: Tensor,
        center: Tensor,
        labels: Tensor,
        targets: Tensor,
        point: Tensor,
        outcome: Outcome,
    ) -> None:
        """One run over ``rows``; writes what it finds into ``outcome``."""
        for _ in range(self.steps):
            if len(rows) == 0:
                return
            toward = _toward(labels, targets)
            margin, slope, _ = self.gradient(point, labels, toward)
            point = self._step(center, point, margin, slope)
            _, standing = self.judge(point, labels, toward)
            outcome.forwards[rows] += 2
            outcome.backwards[rows] += 1
            # Further away it does not count, as in the authors' code. Some of these examples would
            # do on the surface of the ball; that is where APGD looks.
            fallen = ~standing & (_length(point - center, self.norm) <= self.eps)
            outcome.examples[rows[fallen]] = point[fallen]
            outcome.fooled[rows[fallen]] = True
            back = center + self.beta * (point - center)
            point = torch.where(standing[:, None, None, None], point, back)
            if bool(fallen.any()):
                rows, center, labels, targets, point = (
                    tensor[~fallen] for tensor in (rows, center, labels, targets, point)
                )

    def _step(self, center: Tensor, point: Tensor, margin: Tensor, slope: Tensor) -> Tensor:
        """Beyond the linearised boundary, between the nearest places to the point and the image."""
        project = _library.projection_linf if self.norm == "Linf" else _library.projection_l2
        normal = slope.flatten(1)
        offset = (normal * point.flatten(1)).sum(dim=1) - margin
        both = torch.cat([point, center])
        moves: Tensor = project(both.flatten(1), normal.repeat(2, 1), offset.repeat(2))
        moves = moves.view_as(both)
        from_point, from_center = moves.chunk(2)
        near, far = _length(moves, self.norm).clamp_min(1e-8).chunk(2)
        weight = (near / (near + far)).clamp_max(self.alpha_max)[:, None, None, None]
        return torch.lerp(
            point + self.eta * from_point, center + self.eta * from_center, weight
        ).clamp(0, 1)


def _toward(labels: Tensor, targets: Tensor) -> Loss:
    return lambda logits: margin_loss(logits, labels, targets)


def _length(delta: Tensor, norm: str) -> Tensor:
    """Length per sample, ``(N,)``."""
    flat = delta.flatten(1)
    return flat.abs().amax(dim=1) if norm == "Linf" else flat.square().sum(dim=1).sqrt()
