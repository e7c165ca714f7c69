"""Auto-PGD with start points, noise per sample and dropping of finished samples.

Croce & Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks, arXiv 2003.01690, Sec. 3, Algorithm 1. Imported only when such an attack is
built, since its base class is torchattacks'.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lightning_meansparse.attacks.ball import Ball
from lightning_meansparse.attacks.losses import cross_entropy, dlr_loss, margin_loss
from lightning_meansparse.attacks.pgd import Loss, Outcome, StartedAttack, Task

LOSSES = ("ce", "dlr", "dlr-targeted", "margin")


@dataclass
class _State:
    """Everything Algorithm 1 remembers, one row per sample that still stands."""

    rows: Tensor
    ball: Ball
    labels: Tensor
    targets: Tensor
    point: Tensor
    previous: Tensor
    best: Tensor
    slope: Tensor
    best_slope: Tensor
    loss: Tensor
    best_loss: Tensor
    best_loss_at_check: Tensor
    rises: Tensor
    step: Tensor
    halved_at_check: Tensor

    def select(self, keep: Tensor) -> _State:
        """The rows in ``keep``."""
        parts: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            parts[field.name] = value.select(keep) if isinstance(value, Ball) else value[keep]
        return _State(**parts)


class APGD(StartedAttack):
    """Auto-PGD: momentum steps whose size halves when the loss stops rising.

    Args:
        model: Pixels to logits.
        eps: Radius of the ball.
        norm: ``"Linf"`` or ``"L2"``.
        steps: Number of steps per run; each costs one forward and one backward pass per sample that
            still stands.
        n_restarts: Number of runs; the first begins at the given start points, if any, the others
            at random.
        close: Restarts after the first are for samples alone whose margin, on the best example of
            the first run, is below this share of the clean one: 1 leaves none out, 0.1 gives the
            effort to the few that may still fall.
        loss: ``"ce"`` (see `cross_entropy`), ``"dlr"``,
            ``"dlr-targeted"`` (one run per target class), or ``"margin"``.
        n_targets: Targets of ``"dlr-targeted"``: the most likely wrong classes of the clean image,
            at most classes − 1.
        rho: Fraction of steps that have to raise the loss.
        step_size: Length of the first steps in units of ``eps`` (the paper: 2).
        seed: Seed of the random starts.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        norm: str = "Linf",
        steps: int = 100,
        n_restarts: int = 1,
        close: float = 1.0,
        loss: str = "ce",
        n_targets: int = 9,
        rho: float = 0.75,
        step_size: float = 2.0,
        seed: int = 0,
    ) -> None:
        counts = {"steps": steps, "n_restarts": n_restarts, "n_targets": n_targets}
        super().__init__("APGD", model, eps=eps, norm=norm, seed=seed, **counts)
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}.")
        if not 0 < close <= 1:
            raise ValueError(f"close must be a share of the margin in (0, 1], got {close!r}.")
        self.close = close
        self.loss = loss
        self.rho = rho
        self.step_size = step_size

    def search(self, task: Task, outcome: Outcome) -> None:
        """Attack each image from its start point, by Algorithm 1 of the paper."""
        if self.loss == "dlr-targeted":
            targets = self.likely_targets(task.images, task.labels, self.n_targets, outcome)
        else:
            targets = task.labels[:, None]
        worth = torch.ones_like(outcome.fooled)
        for run, rows in outcome.runs(self.n_restarts * targets.shape[1]):
            if run == targets.shape[1] and self.close < 1:
                worth[rows] = self._close(task.select(rows), outcome.examples[rows])
                outcome.forwards[rows] += 2
            rows = rows[worth[rows]]
            if len(rows) == 0:
                break
            part = task.select(rows)
            if run == 0 and part.starts is not None:
                start = part.ball.project(part.starts)
            else:
                start = part.ball.random(self.seed, part.indices, run)
            target = targets[rows, run % targets.shape[1]]
            self.climb(rows, part.ball, part.labels, target, start, outcome)

    def _close(self, task: Task, examples: Tensor) -> Tensor:
        """Which samples their best examples so far have brought near to the decision boundary."""
        labels = task.labels
        clean, _ = self.judge(task.images, labels, lambda logits: margin_loss(logits, labels))
        found, _ = self.judge(examples, labels, lambda logits: margin_loss(logits, labels))
        return found > self.close * clean  # both negative where the sample stands

    def climb(
        self,
        rows: Tensor,
        ball: Ball,
        labels: Tensor,
        targets: Tensor,
        start: Tensor,
        outcome: Outcome,
    ) -> None:
        """One run of Algorithm 1 over ``rows``; writes what it finds into ``outcome``.

        Args:
            rows: Positions in ``outcome`` of what follows, which has one row for each of them.
            ball: What is within reach.
            labels: True classes.
            targets: Classes to become, for ``"dlr-targeted"``.
            start: Where to begin, inside the ball.
            outcome: Gets the examples that fool the model, the best points of the other samples,
                and the cost.
        """
        loss, slope, standing = self.gradient(start, labels, self._loss(labels, targets))
        outcome.forwards[rows] += 1
        outcome.backwards[rows] += 1
        state = _State(
            rows=rows,
            ball=ball,
            labels=labels,
            targets=targets,
            point=start,
            previous=start,
            best=start,
            slope=slope,
            best_slope=slope,
            loss=loss,
            best_loss=loss,
            best_loss_at_check=loss,
            rises=torch.zeros_like(loss),
            step=torch.full_like(loss, self.step_size * self.eps),
            halved_at_check=torch.ones_like(loss, dtype=torch.bool),
        )
        state = self._drop(state, standing, outcome)
        checks = checkpoints(self.steps)
        last_check = 0
        for number in range(1, self.steps + 1):
            if len(state.rows) == 0:
                return
            self._advance(state, first=number == 1)
            criterion = self._loss(state.labels, state.targets)
            outcome.forwards[state.rows] += 1
            if number < self.steps:
                loss, slope, standing = self.gradient(state.point, state.labels, criterion)
                outcome.backwards[state.rows] += 1
            else:
                loss, standing = self.judge(state.point, state.labels, criterion)
                slope = state.slope
            better = loss > state.best_loss
            state.rises += loss > state.loss
            state.loss, state.slope = loss, slope
            state.best = torch.where(_wide(better), state.point, state.best)
            state.best_slope = torch.where(_wide(better), slope, state.best_slope)
            state.best_loss = torch.where(better, loss, state.best_loss)
            state = self._drop(state, standing, outcome)
            if number in checks:
                self._check(state, number - last_check)
                last_check = number
        outcome.examples[state.rows] = state.best

    def _drop(self, state: _State, standing: Tensor, outcome: Outcome) -> _State:
        """Record the samples that have fallen, and go on with the others."""
        if bool(standing.all()):
            return state
        fallen = state.rows[~standing]
        outcome.examples[fallen] = state.point[~standing]
        outcome.fooled[fallen] = True
        return state.select(standing)

    def _advance(self, state: _State, *, first: bool) -> None:
        """One step with momentum (Algorithm 1, lines 7 and 8)."""
        step = _wide(state.step)
        target = state.ball.project(state.point + step * state.ball.direction(state.slope))
        if not first:
            momentum = 0.75 * (target - state.point) + 0.25 * (state.point - state.previous)
            target = state.ball.project(state.point + momentum)
        state.previous, state.point = state.point, target

    def _check(self, state: _State, length: int) -> None:
        """Halve the step and go back to the best point where the loss no longer rises."""
        stuck = ~state.halved_at_check & (state.best_loss_at_check >= state.best_loss)
        # The paper has < here; the authors' code, which made every published number, has <=.
        halve = (state.rises <= self.rho * length) | stuck
        state.step = torch.where(halve, state.step / 2, state.step)
        state.point = torch.where(_wide(halve), state.best, state.point)
        state.slope = torch.where(_wide(halve), state.best_slope, state.slope)
        state.halved_at_check, state.best_loss_at_check = halve, state.best_loss
        state.rises = torch.zeros_like(state.rises)

    def _loss(self, labels: Tensor, targets: Tensor) -> Loss:
        if self.loss == "ce":
            return cross_entropy(labels)
        if self.loss == "margin":
            return lambda logits: margin_loss(logits, labels)
        if self.loss == "dlr":
            return lambda logits: dlr_loss(logits, labels)
        return lambda logits: dlr_loss(logits, labels, targets)


def checkpoints(steps: int) -> frozenset[int]:
    """Step numbers after which the step size is reconsidered (Croce & Hein, Sec. 3.1).

    Examples:
        >>> sorted(checkpoints(100))
        [22, 41, 57, 70, 80, 87, 93, 99]
    """
    # In hundredths: the fractions 0.22, 0.19, 0.16, ... add up without rounding.
    found, position, length = set(), 22, 22
    while position <= 100:
        found.add(math.ceil(position * steps / 100))
        length = max(length - 3, 6)
        position += length
    return frozenset(found)


def _wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]
