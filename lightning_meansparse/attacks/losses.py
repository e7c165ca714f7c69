"""What attacks make larger: losses per sample, all ``(N,)``, above their value at the true class.

Croce & Hein, Reliable evaluation of adversarial robustness with an ensemble of diverse
parameter-free attacks, arXiv 2003.01690.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def cross_entropy(labels: Tensor) -> Callable[[Tensor], Tensor]:
    """Cross-entropy's order and direction without its saturation.

    ``log sum_{j != y} exp(z_j) - z_y``: cross-entropy is softplus of it, so both rise together and
    their gradients are parallel; but this one does not vanish in float32 when the model is sure of
    itself.
    """

    def loss(logits: Tensor) -> Tensor:
        column = labels[:, None]
        others = logits.scatter(1, column, -torch.inf)
        return others.logsumexp(dim=1) - logits.gather(1, column).squeeze(1)

    return loss


def margin_loss(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Best other logit (or the target's) minus the true one, ``(N,)``; positive when wrong."""
    true = logits.gather(1, labels[:, None]).squeeze(1)
    if targets is not None:
        return logits.gather(1, targets[:, None]).squeeze(1) - true
    return logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1) - true


def dlr_loss(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Difference of logits ratio, ``(N,)`` (Croce & Hein, Eq. 6; with ``targets`` Eq. 7).

    The margin over a spread of the largest logits, so that scaling the logits changes nothing. The
    targeted version needs the fourth largest logit: with three classes the third takes its place.
    With two classes every ratio is constant, and the margin itself is used.
    """
    margin = margin_loss(logits, labels, targets)
    classes = logits.shape[1]
    if classes == 2:
        return margin
    top = logits.topk(min(4, classes), dim=1).values
    low = top[:, 2] if targets is None else (top[:, 2] + top[:, -1]) / 2
    return margin / (top[:, 0] - low + 1e-12)
