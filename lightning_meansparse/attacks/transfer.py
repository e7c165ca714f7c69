"""The way leads over the same network at other alphas; every point is tried on the network itself.

Imported only when the attack is built, since its base class is torchattacks'.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_meansparse.attacks.apgd import APGD
from lightning_meansparse.attacks.ball import Ball
from lightning_meansparse.attacks.pgd import Outcome
from lightning_meansparse.surgery.control import alpha_scaled


class Transfer(APGD):
    """APGD on a neighbour: the same network with every alpha multiplied by ``factor``.

    With ``factor`` 0 the neighbour is the base model. Its loss decides where to go and which point
    is best; every point on the way is tried on the network itself. That is at least as strong as
    trying the last one: an attack on the neighbour alone would stop where the neighbour is fooled,
    right at its own decision boundary.

    Args:
        model: Pixels to logits, with operators or without.
        factor: What alpha is multiplied by.
        eps: As for `APGD`, like all that follow.
        norm: ...
        steps: ...
        n_restarts: ...
        loss: ...
        n_targets: ...
        seed: ...
    """

    def __init__(
        self,
        model: nn.Module,
        factor: float = 0.0,
        eps: float = 8 / 255,
        norm: str = "Linf",
        steps: int = 100,
        n_restarts: int = 1,
        loss: str = "ce",
        n_targets: int = 9,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            eps=eps,
            norm=norm,
            steps=steps,
            n_restarts=n_restarts,
            loss=loss,
            n_targets=n_targets,
            seed=seed,
        )
        if factor < 0:
            raise ValueError(f"factor must be at least 0, got {factor!r}.")
        self.factor = factor

    def climb(
        self,
        rows: Tensor,
        ball: Ball,
        labels: Tensor,
        targets: Tensor,
        start: Tensor,
        outcome: Outcome,
    ) -> None:
        """One run up the neighbour's loss; both networks' forward passes are counted."""
        before = outcome.forwards.clone()
        super().climb(rows, ball, labels, targets, start, outcome)
        outcome.forwards += outcome.forwards - before

    def gradient(self, images: Tensor, labels: Tensor, loss: Any) -> tuple[Tensor, Tensor, Tensor]:
        """The neighbour's loss and gradient, and which samples the network still gets right."""
        with alpha_scaled(self.model, self.factor):
            values, slope, _ = super().gradient(images, labels, loss)
        return values, slope, super().judge(images, labels, loss)[1]

    def judge(self, images: Tensor, labels: Tensor, loss: Any) -> tuple[Tensor, Tensor]:
        """The neighbour's loss, and which samples the network still gets right."""
        with alpha_scaled(self.model, self.factor):
            values, _ = super().judge(images, labels, loss)
        return values, super().judge(images, labels, loss)[1]


class Narrowing(APGD):
    """APGD while the bands narrow to their own width, each stage from where the last one ended.

    Inside a ball of the usual size the network's own loss has many hills, and a run from a random
    point ends on one of them. Under wide bands, which let little through, the loss is plain and
    examples are easily found; then the bands narrow by equal ratios, and the example is mended
    before it is lost. This is continuation, as optimisation knows it, along alpha.

    The last stage is a run of `APGD` on the network itself. At alpha 0 all stages are.

    Args:
        model: Pixels to logits, with operators or without.
        factor: What alpha is multiplied by in the first stage, at least 1.
        stages: Number of stages before the last.
        stage_steps: Steps in each of them.
        eps: As for `APGD`, like all that follow.
        norm: ...
        steps: Steps of the last stage.
        n_restarts: ...
        close: ...
        loss: ...
        n_targets: ...
        seed: ...
    """

    def __init__(
        self,
        model: nn.Module,
        factor: float = 4.0,
        stages: int = 16,
        stage_steps: int = 10,
        eps: float = 8 / 255,
        norm: str = "Linf",
        steps: int = 100,
        n_restarts: int = 1,
        close: float = 1.0,
        loss: str = "ce",
        n_targets: int = 9,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model,
            eps=eps,
            norm=norm,
            steps=steps,
            n_restarts=n_restarts,
            close=close,
            loss=loss,
            n_targets=n_targets,
            seed=seed,
        )
        if factor < 1:
            raise ValueError(f"factor must be at least 1: bands narrow, got {factor!r}.")
        if stages < 1:
            raise ValueError(f"stages must be at least 1, got {stages!r}.")
        self.factors = [factor ** (1 - stage / stages) for stage in range(stages)]
        self.wider = Transfer(model, eps=eps, norm=norm, steps=stage_steps, loss=loss, seed=seed)

    def climb(
        self,
        rows: Tensor,
        ball: Ball,
        labels: Tensor,
        targets: Tensor,
        start: Tensor,
        outcome: Outcome,
    ) -> None:
        """One run through all stages; what falls in one is left out of those that follow."""
        for factor in self.factors:
            self.wider.factor = factor
            self.wider.climb(rows, ball, labels, targets, start, outcome)
            left = ~outcome.fooled[rows]
            rows, labels, targets = rows[left], labels[left], targets[left]
            ball, start = ball.select(left), outcome.examples[rows]
            if len(rows) == 0:
                return
        super().climb(rows, ball, labels, targets, start, outcome)
