"""The inner attack of adversarial training: a few gradient steps up, as cheap as they can be.

It exists beside `attacks` because its aim differs: it must be quick and follow the model as it is
now, not find the worst case. Nothing measured with it is a robust accuracy to report.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_meansparse.attacks.ball import Ball
from lightning_meansparse.surgery import evaluating

Norm = Literal["Linf", "L2"]
Start = Literal["uniform", "near"]


def ascend(
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    eps: float,
    norm: Norm = "Linf",
    steps: int = 10,
    step_size: float,
    start: Start = "uniform",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Raise `loss` within the ball by projected gradient ascent [1].

    `x ← Π(x + s · d(∇ loss))`, with the gradient's sign (Linf) or direction (L2) as `d`.

    [1] Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, arXiv
        1706.06083, Sec. 2.1.

    Args:
        loss: Images `(N, C, H, W)` to a scalar, the *sum* over samples: a mean would shrink small
            gradients further.
        images: Clean images in [0, 1].
        eps: Radius of the ball, in pixel units.
        norm: Of the ball.
        steps: Number of steps; 0 gives the start points.
        step_size: Length of one step, in pixel units.
        start: `"uniform"` in the ball, or `"near"` the image (normal noise of 0.001, which TRADES
            needs as its loss has gradient zero at the image itself).
        generator: Source of the start noise; the global generator is not touched. None draws from
            a fresh one with a fixed seed.

    Returns:
        Adversarial images, detached, in the ball and in [0, 1].

    Examples:
        >>> images = torch.full((2, 1, 4, 4), 0.5)
        >>> raised = ascend(lambda x: x.sum(), images, eps=0.1, step_size=0.05, steps=5)
        >>> round(raised.max().item(), 4), round(raised.min().item(), 4)
        (0.6, 0.6)
    """
    with torch.inference_mode(False), torch.enable_grad():
        # A clone made here is a normal tensor even if `images` was made under inference mode.
        centre = images.detach().clone()
        ball = Ball(centre, eps, norm)
        points = ball.project(centre + _noise(centre, eps, norm, start, generator))
        for _ in range(steps):
            points.requires_grad_()
            (gradient,) = torch.autograd.grad(loss(points), points)
            points = ball.project(points.detach() + step_size * ball.direction(gradient))
        return points.detach()


def _noise(
    images: Tensor, eps: float, norm: Norm, start: Start, generator: torch.Generator | None
) -> Tensor:
    if generator is None:
        generator = seeded(0, device=images.device)
    if start == "near":
        return 0.001 * torch.randn(images.shape, generator=generator, device=images.device)
    if norm == "Linf":
        uniform = torch.rand(images.shape, generator=generator, device=images.device)
        return (2 * uniform - 1) * eps
    direction = torch.randn(images.shape, generator=generator, device=images.device)
    direction /= direction.flatten(1).norm(dim=1)[:, None, None, None]
    radius = torch.rand(len(images), generator=generator, device=images.device)
    # U^(1/d) makes the point uniform in the ball's volume.
    return eps * direction * (radius ** (1 / images[0].numel()))[:, None, None, None]


def seeded(*numbers: int, device: torch.device) -> torch.Generator:
    """Return a generator for this very place in a run: (seed, rank, epoch, batch, …).

    A resumed run therefore draws what the uninterrupted one would have drawn.
    """
    # Hashed, as consecutive seeds give correlated streams on some devices.
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "little") >> 1)


@contextmanager
def held(model: nn.Module) -> Iterator[None]:
    """Eval mode and frozen parameters while the inner attack runs; both restored after it.

    Crafting in eval mode leaves BatchNorm's running statistics alone, and costs no robustness [2].
    Freezing saves a tenth of the time.

    [2] Pang et al., Bag of Tricks for Adversarial Training, arXiv 2010.00467, Sec. 3.
    """
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        with evaluating(model):
            for parameter in trainable:
                parameter.requires_grad_(False)
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)
