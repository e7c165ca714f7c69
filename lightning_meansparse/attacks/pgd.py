"""FGSM and PGD as a ``torchattacks.Attack`` that takes start points and drops what has fallen.

Imported only when such an attack is built, since its base class is torchattacks'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_meansparse.attacks.ball import Ball
from lightning_meansparse.attacks.guard import stands
from lightning_meansparse.attacks.library import load_torchattacks
from lightning_meansparse.attacks.losses import cross_entropy

Loss = Callable[[Tensor], Tensor]
"""Logits ``(N, classes)`` to losses ``(N,)``."""

_Attack: Any = load_torchattacks().attack.Attack


@dataclass
class Outcome:
    """What an attack found, and what it spent.

    Attributes:
        examples: Per sample the first example that fooled the model, else the one with the highest
            loss, ``(N, C, H, W)``.
        fooled: Whether the attack believes it fooled the model, ``(N,)`` bool.
        forwards: Forward passes per sample, ``(N,)`` int64.
        backwards: Backward passes per sample, ``(N,)`` int64.
    """

    examples: Tensor
    fooled: Tensor
    forwards: Tensor
    backwards: Tensor

    @classmethod
    def empty(cls, images: Tensor) -> Outcome:
        """Nothing found, nothing spent."""
        count, device = images.shape[0], images.device
        return cls(
            images.clone(),
            torch.zeros(count, dtype=torch.bool, device=device),
            torch.zeros(count, dtype=torch.int64, device=device),
            torch.zeros(count, dtype=torch.int64, device=device),
        )

    def runs(self, count: int) -> Iterator[tuple[int, Tensor]]:
        """Up to ``count`` runs: their numbers, and the rows that still stand when each begins."""
        for run in range(count):
            rows = (~self.fooled).nonzero().squeeze(1)
            if len(rows) == 0:
                return
            yield run, rows


@dataclass
class Task:
    """What an attack is given, one row per sample.

    Attributes:
        images: Clean images in [0, 1], ``(N, C, H, W)``.
        labels: Class numbers, ``(N,)``.
        ball: What is within reach of them.
        indices: Sample numbers that noise belongs to, ``(N,)``, on the CPU.
        starts: Where to start, as ``images``; None leaves it to the attack.
    """

    images: Tensor
    labels: Tensor
    ball: Ball
    indices: Tensor
    starts: Tensor | None

    def select(self, rows: Tensor) -> Task:
        """Some of the samples, by position."""
        return Task(
            self.images[rows],
            self.labels[rows],
            self.ball.select(rows),
            self.indices[rows.cpu()],
            None if self.starts is None else self.starts[rows],
        )


class StartedAttack(_Attack):  # type: ignore[misc]
    """An attack with start points and sample numbers; a subclass writes `search`.

    ``counts`` are whole numbers of something (steps, queries, restarts), which become attributes.
    """

    def __init__(
        self, name: str, model: nn.Module, *, eps: float, norm: str, seed: int, **counts: int
    ) -> None:
        super().__init__(name, model)
        if norm not in ("Linf", "L2"):
            raise ValueError(f"norm must be 'Linf' or 'L2', got {norm!r}.")
        for count, value in counts.items():
            if value < 1:
                raise ValueError(f"{count} must be at least 1, got {value!r}.")
            setattr(self, count, value)
        self.eps = eps
        self.norm = norm
        self.seed = seed
        self.supported_mode = ["default"]

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial examples of ``images``, as every torchattacks class gives them."""
        return self.perturb_from(images, labels).examples

    def perturb_from(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        starts: Tensor | None = None,
        indices: Tensor | None = None,
    ) -> Outcome:
        """Attack each image from its start point.

        Args:
            images: Clean images in [0, 1], ``(N, C, H, W)``.
            labels: Class numbers, ``(N,)``.
            starts: Where to start, as ``images``; None starts at random.
            indices: Sample numbers that the noise belongs to, ``(N,)``; None counts them.

        Returns:
            What was found. Judge it by the model, not by ``fooled``.
        """
        indices = torch.arange(len(images)) if indices is None else indices.cpu()
        ball = Ball(images, self.eps, self.norm)
        outcome = Outcome.empty(images)
        self.search(Task(images, labels, ball, indices, starts), outcome)
        return outcome

    def search(self, task: Task, outcome: Outcome) -> None:
        """Look for examples, and write them and their cost into ``outcome``, which is empty."""
        raise NotImplementedError

    def gradient(self, images: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, its gradient, and which samples are still classified right."""
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.get_logits(images)
            values = loss(logits)
        if not values.requires_grad:
            raise RuntimeError(
                "the logits have no gradient with respect to the pixels: something in the "
                "classifier's forward detaches them (detach(), no_grad(), NumPy). Gradient "
                "attacks mean nothing there; use attacks='square'."
            )
        gradient = torch.autograd.grad(values.sum(), images)[0]
        return values.detach(), gradient, stands(logits.detach(), labels)

    @torch.no_grad()
    def judge(self, images: Tensor, labels: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """Loss, and which samples are still classified right, without a backward pass."""
        logits = self.get_logits(images)
        return loss(logits), stands(logits, labels)

    def likely_targets(
        self, images: Tensor, labels: Tensor, count: int, outcome: Outcome
    ) -> Tensor:
        """The wrong classes of the images, most likely first, at most ``count``: ``(N, T)``."""
        with torch.no_grad():
            logits: Tensor = self.get_logits(images)
        outcome.forwards += 1
        wrong = logits.scatter(1, labels[:, None], -torch.inf)
        count = min(count, logits.shape[1] - 1)
        return wrong.argsort(dim=1, descending=True, stable=True)[:, :count]


class PGD(StartedAttack):
    """Projected gradient descent (Madry et al., arXiv 1706.06083); one step is FGSM.

    Samples that the model gets wrong are left out of the following steps.

    Args:
        model: Pixels to logits.
        eps: Radius of the ball.
        norm: ``"Linf"`` (steps along the sign) or ``"L2"`` (along the normalised gradient).
        steps: Number of steps.
        step_size: Length of a step in units of ``eps``.
        random_start: Start at a random point of the ball instead of at the image.
        seed: Seed of the random start.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        norm: str = "Linf",
        steps: int = 20,
        step_size: float = 0.125,
        random_start: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__("PGD", model, eps=eps, norm=norm, seed=seed, steps=steps)
        self.step_size = step_size
        self.random_start = random_start

    def search(self, task: Task, outcome: Outcome) -> None:
        """Attack each image from its start point, by steps of one length."""
        labels, ball = task.labels, task.ball
        if task.starts is not None:
            points = ball.project(task.starts)
        elif self.random_start:
            points = ball.random(self.seed, task.indices)
        else:
            points = task.images.clone()
        rows = torch.arange(len(points), device=points.device)
        for step in range(self.steps + 1):
            outcome.forwards[rows] += 1
            if step == self.steps:
                _, standing = self.judge(points, labels, cross_entropy(labels))
            else:
                _, slope, standing = self.gradient(points, labels, cross_entropy(labels))
                outcome.backwards[rows] += 1
            outcome.examples[rows] = points
            outcome.fooled[rows] = ~standing
            if step == self.steps or not bool(standing.any()):
                break
            # The clean image itself is wrong only for samples nobody asks about; all others go on.
            rows, points, labels, slope = (
                tensor[standing] for tensor in (rows, points, labels, slope)
            )
            ball = ball.select(standing)
            points = ball.project(points + self.step_size * self.eps * ball.direction(slope))
