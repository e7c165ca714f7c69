"""Mean and variance of every channel over a whole data set, however it was split.

Moments are kept as (count, mean, M2) in float64 and merged by the rule of Chan, Golub and LeVeque
(1979, Eq. 2.1), so batches of any size, in any order, on any number of ranks, give the variance of
the pooled data. Sums of squares would lose all digits where the mean is large against σ, so what
is summed are distances from a value of the data: one vectorised pass, and exactly 0 where all
values of a channel are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.distributed as dist
from torch import Tensor

Statistics = Literal["pooled", "official"]

# Float64 copies are made of this many values at a time, so that they fit a cache. A GPU would only
# wait for many small steps: there it is 64 times as many, 128 MiB, whatever the size of a batch.
_CHUNK = 2**18


class ChannelMoments:
    """Running count, mean and variance per channel.

    Args:
        shape: Shape of the statistics, broadcastable to the data: ``(C, 1, 1)`` for NCHW, ``(C,)``
            for channels last. Every axis of the data that is missing or 1 here is averaged over.
        statistics: ``"pooled"``: mean and (population) variance of all values. ``"official"``: the
            authors' rule, the equal-weight average over batches of batch means and of unbiased
            batch variances (``utils_sparse.py``); it depends on the batch size and is here for
            parity with their checkpoints.
        device: Where the statistics are kept; the device of the data is best.

    Raises:
        ValueError: If ``shape`` is not made of positive integers or ``statistics`` is unknown.

    Examples:
        >>> moments = ChannelMoments((2,))
        >>> moments.update(torch.tensor([[1.0, 10.0], [3.0, 10.0]]))
        >>> moments.update(torch.tensor([[5.0, 10.0]]))
        >>> moments.count, moments.mean.tolist(), [round(v, 4) for v in moments.var.tolist()]
        (3, [3.0, 10.0], [2.6667, 0.0])
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        statistics: Statistics = "pooled",
        device: torch.device | str | None = None,
    ) -> None:
        if statistics not in get_args(Statistics):
            raise ValueError(
                f"statistics must be one of {get_args(Statistics)}, got {statistics!r}."
            )
        if any(size < 1 for size in shape):
            raise ValueError(
                f"shape must be positive integers such as (64, 1, 1), got {tuple(shape)!r}."
            )
        self.shape = tuple(shape)
        self.statistics: Statistics = statistics
        self.count = 0  # values per channel ("pooled") or batches ("official")
        self.mean = torch.zeros(self.shape, dtype=torch.float64, device=_float64_device(device))
        # The sum of squared deviations ("pooled") or of the batches' unbiased variances
        # ("official").
        self._spread = torch.zeros_like(self.mean)

    @property
    def var(self) -> Tensor:
        """Variance per channel, float64, of shape ``shape``; zeros before the first update."""
        return self._spread / max(self.count, 1)

    def update(self, x: Tensor) -> None:
        """Add one batch.

        Args:
            x: Floating-point tensor to which ``shape`` broadcasts; an empty batch changes nothing.

        Raises:
            ValueError: If ``x`` does not have the channels of ``shape``, or a batch has a single
                value per channel under ``"official"`` statistics (its unbiased variance is
                undefined).
        """
        pad = x.dim() - len(self.shape)
        aligned = (1,) * pad + self.shape
        if pad < 0 or any(
            size not in (1, given) for size, given in zip(aligned, x.shape, strict=True)
        ):
            raise ValueError(
                f"x must broadcast with statistics of shape {self.shape}, got {tuple(x.shape)}."
            )
        if x.numel() == 0:
            return
        axes = [axis for axis, size in enumerate(aligned) if size == 1]
        x = x.detach().to(self.mean.device)
        batch = ChannelMoments(self.shape, device=self.mean.device)
        chunk = _CHUNK if x.device.type == "cpu" else 64 * _CHUNK
        rows = max(1, chunk * x.shape[0] // x.numel())
        for part in torch.split(x, rows) if pad else (x,):
            batch._merge(*_block(part, axes, self.shape))
        if self.statistics == "official":
            if batch.count < 2:
                raise ValueError(
                    'statistics="official" needs at least 2 values per channel in every batch, '
                    'got 1: use a larger batch size, or statistics="pooled".'
                )
            self._merge(1, batch.mean, batch._spread / (batch.count - 1))
        else:
            self._merge(batch.count, batch.mean, batch._spread)

    def merge(self, other: ChannelMoments) -> None:
        """Add everything that ``other`` has seen.

        Raises:
            ValueError: If shapes or the kind of statistics differ.
        """
        if (self.shape, self.statistics) != (other.shape, other.statistics):
            raise ValueError(
                f"cannot merge moments of shape {other.shape} ({other.statistics}) into "
                f"{self.shape} ({self.statistics})."
            )
        self._merge(
            other.count, other.mean.to(self.mean.device), other._spread.to(self.mean.device)
        )

    def reduce(self) -> None:
        """Merge over all ranks of the default process group, in rank order.

        Every rank ends with the same numbers. Without an initialised process group nothing
        happens. Every rank must call it.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        packed = torch.cat(
            [self.mean.new_tensor([self.count]), self.mean.flatten(), self._spread.flatten()]
        )
        ranks = [torch.empty_like(packed) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, packed)
        self.count, self.mean, self._spread = (
            0,
            torch.zeros_like(self.mean),
            torch.zeros_like(self.mean),
        )
        channels = math.prod(self.shape)
        for rank in ranks:
            count, mean, spread = torch.split(rank, [1, channels, channels])
            self._merge(int(count.item()), mean.view(self.shape), spread.view(self.shape))

    def _merge(self, count: int, mean: Tensor, spread: Tensor) -> None:
        if count == 0:
            return
        total = self.count + count
        delta = mean - self.mean
        self.mean = self.mean + delta * (count / total)
        self._spread = self._spread + spread
        if self.statistics == "pooled":
            self._spread = self._spread + delta.square() * (self.count * (count / total))
        self.count = total


def _block(x: Tensor, axes: list[int], shape: tuple[int, ...]) -> tuple[int, Tensor, Tensor]:
    """Count, mean and sum of squared deviations of some rows, in float64."""
    if not axes:
        return 1, x.double().reshape(shape), x.new_zeros(shape, dtype=torch.float64)
    count = x.numel() // math.prod(shape)
    origin = x
    for axis in axes:
        origin = origin.narrow(axis, 0, 1)
    origin = origin.double()
    distance = x.to(torch.float64, copy=True).sub_(origin)
    total = distance.sum(axes, keepdim=True)
    spread = distance.square_().sum(axes, keepdim=True) - total.square() / count
    return count, (origin + total / count).view(shape), spread.clamp_(min=0).view(shape)


def _float64_device(device: torch.device | str | None) -> torch.device:
    """The device itself, or the CPU where it has no float64 (Apple's MPS)."""
    chosen = torch.device(device if device is not None else "cpu")
    return torch.device("cpu") if chosen.type == "mps" else chosen
