"""Examples of the same network at another alpha, tried on the network itself.

Imported only when the attack is built, since its base class is torchattacks'.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_meansparse.attacks.apgd import APGD
from lightning_meansparse.attacks.pgd import Outcome, Task
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

    def search(self, task: Task, outcome: Outcome) -> None:
        """Attack each image from its start point; both networks' forward passes are counted."""
        super().search(task, outcome)
        shared = 1 if self.loss == "dlr-targeted" else 0  # the forward that ranks the targets
        outcome.forwards += outcome.forwards - shared

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
