"""The ball around each image: exact projection in float32, and noise that belongs to a sample."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 2**64 - 1


@dataclass
class Ball:
    """All images within ``eps`` of ``center`` whose pixels are in [0, 1].

    Args:
        center: The clean images, ``(N, C, H, W)``, float32.
        eps: Radius in pixel units.
        norm: ``"Linf"`` or ``"L2"``.
    """

    center: Tensor
    eps: float
    norm: str

    def __post_init__(self) -> None:
        """Precompute the box of the Linf ball."""
        if self.norm == "Linf":
            exact = self.center.double()
            self.low = _round_inside(exact - self.eps, upper=False).clamp_(0, 1)
            self.high = _round_inside(exact + self.eps, upper=True).clamp_(0, 1)

    def select(self, keep: Tensor) -> Ball:
        """The balls of some of the samples.

        Args:
            keep: Mask or positions along the first axis.
        """
        part = object.__new__(Ball)
        part.center, part.eps, part.norm = self.center[keep], self.eps, self.norm
        if self.norm == "Linf":
            part.low, part.high = self.low[keep], self.high[keep]
        return part

    def project(self, images: Tensor) -> Tensor:
        """The nearest points of the ball (under L2: scaled into the ball, then clipped to [0, 1]).

        Under Linf the result is exact: no pixel is further than ``eps`` from its centre in real
        arithmetic, since the bounds are computed in float64 and rounded towards the centre.
        """
        if self.norm == "Linf":
            return torch.minimum(torch.maximum(images, self.low), self.high)
        delta = images - self.center
        length = lengths(delta)
        scale = torch.where(length > self.eps, self.eps / length.clamp_min(1e-30), 1)
        return (self.center + delta * scale).clamp_(0, 1)

    def clip(self, images: Tensor) -> Tensor:
        """Make any tensor a legal example: finite, in [0, 1], and in the ball to the last bit.

        Under L2 the length is measured in float64, and what is too long is shortened and rounded
        towards the centre.
        """
        legal = torch.where(images.isfinite(), images, self.center)
        legal = self.project(legal.to(self.center.dtype))
        if self.norm == "L2":
            center = self.center.double()
            delta = legal.double() - center
            length = lengths(delta)
            bound = center + delta * (self.eps * (1 - 1e-12) / length)
            below, above = (_round_inside(bound, upper=upper) for upper in (True, False))
            shortened = torch.where(delta > 0, below, above)
            legal = torch.where(length > self.eps, shortened, legal)
        return legal

    def direction(self, gradient: Tensor) -> Tensor:
        """Steepest ascent: the sign (Linf) or the normalised gradient (L2); NaN counts as 0."""
        gradient = torch.nan_to_num(gradient, nan=0.0)
        if self.norm == "Linf":
            return gradient.sign()
        # Scaled first: the square of a small gradient underflows.
        gradient = gradient / gradient.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-38)
        return gradient / lengths(gradient).clamp_min(1e-12)

    def random(self, seed: int, indices: Tensor, run: int = 0) -> Tensor:
        """One random point per sample, on the surface of its ball before clipping to [0, 1].

        The noise of a sample depends on nothing but ``seed``, its index and ``run``: not on the
        batch it is in, its place there, or the device.

        Args:
            seed: Seed of the evaluation.
            indices: Sample numbers, ``(N,)``.
            run: Number of the restart.
        """
        generator = torch.Generator()
        shape = self.center.shape[1:]
        noise = torch.empty(len(indices), *shape)
        for row, index in zip(noise, indices.tolist(), strict=True):
            generator.manual_seed(sample_seed(seed, index, run))
            if self.norm == "Linf":
                row.uniform_(-1, 1, generator=generator)
            else:
                row.normal_(generator=generator)
        if self.norm == "Linf":
            noise /= noise.abs().amax(dim=(1, 2, 3), keepdim=True).clamp_min(1e-12)
        else:
            noise /= lengths(noise).clamp_min(1e-12)
        return self.project(self.center + self.eps * noise.to(self.center.device))


def lengths(delta: Tensor) -> Tensor:
    """Euclidean length per sample, ``(N, 1, 1, 1)``."""
    return delta.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()


def sample_seed(seed: int, *numbers: int) -> int:
    """Mix numbers into one seed, so that neighbours share nothing (the finaliser of SplitMix64)."""
    state = seed & _MASK
    for number in numbers:
        state = (state + 0x9E3779B97F4A7C15 * ((number & _MASK) + 1)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1  # torch takes int64


def _round_inside(bound: Tensor, *, upper: bool) -> Tensor:
    """The float32 number at or inside a float64 bound."""
    rounded = bound.float()
    outside = rounded.double() > bound if upper else rounded.double() < bound
    inward = torch.full_like(rounded, -torch.inf if upper else torch.inf)
    return torch.where(outside, torch.nextafter(rounded, inward), rounded)
