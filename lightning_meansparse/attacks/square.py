"""Square attack: random search without gradients, with random numbers that belong to a sample.

Andriushchenko et al., Square Attack: a query-efficient black-box adversarial attack via random
search, arXiv 1912.00049, Algorithms 1 to 3. torchattacks draws one square for all samples of a
batch, does not say what a sample cost, mixes up the channels' lengths under L2, and takes few image
sizes there. Imported only when the attack is built, since its base class is torchattacks'.
"""

from __future__ import annotations

import math
from bisect import bisect_left

import torch
from torch import Tensor, nn

from lightning_meansparse.attacks.ball import Ball, lengths, sample_seed
from lightning_meansparse.attacks.losses import cross_entropy, margin_loss
from lightning_meansparse.attacks.pgd import Loss, Outcome, StartedAttack, Task

_HALVED_AFTER = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)
_Index = tuple[Tensor, Tensor, Tensor, Tensor]


class Square(StartedAttack):
    """Square attack: recolour one random square at a time, and keep what raises the loss.

    Args:
        model: Pixels to logits.
        eps: Radius of the ball.
        norm: ``"Linf"`` or ``"L2"``.
        n_queries: Squares tried per run, each for one forward pass of a sample that still stands.
        n_restarts: Number of runs; the first begins at the given start points, if any.
        p_init: Share of the image that the first squares cover; see `share`.
        loss: ``"margin"`` or ``"ce"``.
        seed: Seed of everything drawn.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        norm: str = "Linf",
        n_queries: int = 5000,
        n_restarts: int = 1,
        p_init: float = 0.8,
        loss: str = "margin",
        seed: int = 0,
    ) -> None:
        counts = {"n_queries": n_queries, "n_restarts": n_restarts}
        super().__init__("Square", model, eps=eps, norm=norm, seed=seed, **counts)
        if loss not in ("margin", "ce"):
            raise ValueError(f"loss must be 'margin' or 'ce', got {loss!r}.")
        if not 0 < p_init <= 1:
            raise ValueError(f"p_init must be a share of the image in (0, 1], got {p_init!r}.")
        self.p_init = p_init
        self.loss = loss

    def search(self, task: Task, outcome: Outcome) -> None:
        """Attack each image from its start point, or from stripes (Linf) or tiles (L2)."""
        for run, rows in outcome.runs(self.n_restarts):
            part = task.select(rows)
            first, later = self._draw(part.ball, part.indices, run)
            if run == 0 and part.starts is not None:
                points = part.ball.project(part.starts)
            else:
                make = _stripes if self.norm == "Linf" else _tiles
                points = make(part.ball, first)
            self._run(rows, part.ball, part.labels, points, later, outcome)

    def _draw(self, ball: Ball, indices: Tensor, run: int) -> tuple[Tensor, Tensor]:
        """Numbers in [0, 1): for the first point ``(N, ...)``, and per query ``(N, queries, k)``.

        They depend on the seed, the sample's index and the run alone.
        """
        _, channels, height, width = ball.center.shape
        # A square takes two numbers for its place and a sign per channel; under L2 there is a
        # second window, and the pattern lies one way or the other.
        if self.norm == "Linf":
            first, each = channels * width, 2 + channels
        else:
            side = _tile_side(height, width)
            first, each = (height // side) * (width // side) * (1 + channels), 5 + channels
        drawn = (torch.empty(len(indices), first), torch.empty(len(indices), self.n_queries, each))
        generator = torch.Generator()
        for place, index in enumerate(indices.tolist()):
            generator.manual_seed(sample_seed(self.seed, index, run))
            for numbers in drawn:
                numbers[place].uniform_(generator=generator)
        return drawn[0].to(ball.center.device), drawn[1].to(ball.center.device)

    def _run(
        self,
        rows: Tensor,
        ball: Ball,
        labels: Tensor,
        points: Tensor,
        draws: Tensor,
        outcome: Outcome,
    ) -> None:
        """One run over ``rows``; writes what it finds into ``outcome``."""
        propose = _square if self.norm == "Linf" else _moved_mass
        best, standing = self.judge(points, labels, self._loss(labels))
        outcome.forwards[rows] += 1
        outcome.fooled[rows] = ~standing
        alive = torch.arange(len(rows), device=rows.device)
        for query in range(self.n_queries):
            if not bool(standing.all()):
                alive, ball, labels = alive[standing], ball.select(standing), labels[standing]
            if len(alive) == 0:
                break
            old = points[alive]
            new = propose(ball, old, share(self.p_init, query), draws[alive, query])
            loss, standing = self.judge(new, labels, self._loss(labels))
            outcome.forwards[rows[alive]] += 1
            outcome.fooled[rows[alive]] = ~standing
            better = (loss > best[alive]) | ~standing
            points[alive] = torch.where(better[:, None, None, None], new, old)
            best[alive] = torch.where(better, loss, best[alive])
        outcome.examples[rows] = points

    def _loss(self, labels: Tensor) -> Loss:
        if self.loss == "ce":
            return cross_entropy(labels)
        return lambda logits: margin_loss(logits, labels)


def share(p_init: float, query: int) -> float:
    """Share of the image that a square covers, on the paper's schedule for 10,000 queries.

    As in AutoAttack it is not rescaled to other numbers of queries.

    Examples:
        >>> [share(0.8, query) for query in (0, 10, 11, 5000)]
        [0.8, 0.8, 0.4, 0.00625]
    """
    return p_init * 0.5 ** bisect_left(_HALVED_AFTER, query)


def _stripes(ball: Ball, draws: Tensor) -> Tensor:
    """Vertical stripes of +eps and -eps per channel."""
    count, channels, _, width = ball.center.shape
    return ball.project(ball.center + ball.eps * _signs(draws).view(count, channels, 1, width))


def _square(ball: Ball, points: Tensor, share: float, draws: Tensor) -> Tensor:
    """``points`` with one square of each moved to one of the two ends, channel by channel."""
    _, _, height, width = points.shape
    side = min(max(round(math.sqrt(share * height * width)), 1), height, width)
    points = points.clone()
    window = _window(points, side, draws[:, :2])
    points[window] += 2 * ball.eps * _signs(draws[:, 2:])[:, :, None, None]
    return ball.project(points)


def _tiles(ball: Ball, draws: Tensor) -> Tensor:
    """A grid of patterns, five along the shorter side, with random signs."""
    count, channels, height, width = ball.center.shape
    side = _tile_side(height, width)
    down, across = height // side, width // side
    numbers = draws.view(count, 1 + channels, down, across)
    patterns = _patterns(side, numbers[:, 0]) * _signs(numbers[:, 1:, :, :, None, None])
    grid = patterns.permute(0, 1, 2, 4, 3, 5).reshape(count, channels, down * side, across * side)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    delta = torch.zeros_like(ball.center)
    delta[:, :, top : top + down * side, left : left + across * side] = grid
    return _on_surface(ball, delta)


def _moved_mass(ball: Ball, points: Tensor, share: float, draws: Tensor) -> Tensor:
    """``points`` with the perturbation of one window moved into another (Algorithm 3)."""
    _, channels, height, width = points.shape
    side = max(round(math.sqrt(share * height * width)), 3)
    side = min(side + (side + 1) % 2, height, width)
    delta = points - ball.center
    into, out_of = (_window(points, side, draws[:, first : first + 2]) for first in (0, 2))
    rest = delta.clone()
    rest[into] = 0
    rest[out_of] = 0
    unused = (ball.eps**2 - lengths(delta).square()).clamp_min(0) / channels
    budget = (unused + (delta - rest).square().sum(dim=(2, 3), keepdim=True)).sqrt()
    pattern = _patterns(side, draws[:, 4]) * _signs(draws[:, 5:])[:, :, None, None]
    rest[into] = budget * _unit(pattern + _unit(delta[into]))
    return _on_surface(ball, rest)


def _patterns(side: int, draws: Tensor) -> Tensor:
    """Per number the pattern of unit length, upright or lying: ``(N, 1, ..., side, side)``."""
    pattern = _unit(torch.cat([_bump(side // 2, side), -_bump(side - side // 2, side)]))
    pattern = pattern.to(draws.device)
    lying = (draws < 0.5).unsqueeze(1)[..., None, None]
    return torch.where(lying, pattern.T, pattern)


def _bump(height: int, width: int) -> Tensor:
    """Concentric squares of unit length: the k-th adds 1/k^2."""
    down = (torch.arange(height) - height // 2).abs()
    across = (torch.arange(width) - width // 2).abs()
    steps = torch.arange(1, max(height, width) // 2 + 2)
    heights = steps.double().pow(-2).flip(0).cumsum(0).flip(0)
    return _unit(heights[torch.maximum(down[:, None], across)].float())


def _window(points: Tensor, side: int, draws: Tensor) -> _Index:
    """Index of one square per sample, anywhere in the image; the value is (N, C, side, side)."""
    count, channels, height, width = points.shape
    steps = torch.arange(side, device=points.device)
    # Every place; the authors' code never draws the last one of each axis.
    top = (draws[:, 0] * (height - side + 1)).long()[:, None] + steps
    left = (draws[:, 1] * (width - side + 1)).long()[:, None] + steps
    sample = torch.arange(count, device=points.device)[:, None, None, None]
    channel = torch.arange(channels, device=points.device)[:, None, None]
    return sample, channel, top[:, None, :, None], left[:, None, None, :]


def _tile_side(height: int, width: int) -> int:
    return max(min(height, width) // 5, 1)


def _signs(draws: Tensor) -> Tensor:
    return torch.where(draws < 0.5, -1.0, 1.0)


def _unit(values: Tensor) -> Tensor:
    """Scaled to length one over the last two axes."""
    return values / (1e-12 + values.square().sum(dim=(-2, -1), keepdim=True).sqrt())


def _on_surface(ball: Ball, delta: Tensor) -> Tensor:
    """``center + delta`` stretched to length eps, then clipped to [0, 1]."""
    return (ball.center + ball.eps * delta / lengths(delta).clamp_min(1e-12)).clamp(0, 1)
