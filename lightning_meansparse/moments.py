"""Mean and variance of every channel over a whole data set, however it was split.

What is summed, in float64, are the distances from a value of the data, and their squares: one pass,
no digits lost where the mean is large against σ, and exactly 0 where all values of a channel are
the same. What several processes have seen is merged by the rule of Chan, Golub and LeVeque (1979,
Eq. 2.1), so batches of any size, in any order, on any number of ranks, give the moments of the
pooled data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
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
        self._origin = torch.zeros(self.shape, dtype=torch.float64, device=_float64_device(device))
        # Sums of distances from the origin, of values or of the means of batches, and of their
        # squares or of the batches' unbiased variances.
        self._distance = torch.zeros_like(self._origin)
        self._spread = torch.zeros_like(self._origin)

    @property
    def mean(self) -> Tensor:
        """Mean per channel, float64, of shape ``shape``; zeros before the first update."""
        return self._origin + self._distance / max(self.count, 1)

    @property
    def var(self) -> Tensor:
        """Variance per channel, float64, of shape ``shape``; zeros before the first update."""
        return self._deviations() / max(self.count, 1)

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
        count = x.numel() // math.prod(self.shape)
        if self.statistics == "official" and count < 2:
            raise ValueError(
                'statistics="official" needs at least 2 values per channel in every batch, '
                'got 1: use a larger batch size, or statistics="pooled".'
            )
        x = x.detach().to(self._origin.device)
        axes = [axis for axis, size in enumerate(aligned) if size == 1]
        if self.count == 0:
            first = x
            for axis in axes:
                first = first.narrow(axis, 0, 1)
            # A copy: an activation may be about to overwrite x.
            self._origin = first.to(torch.float64, copy=True).reshape(self.shape)
        sums = [self._sums(part, axes) for part in (self._parts(x) if pad else (x,))]
        distance, spread = (reduce(torch.add, parts) for parts in zip(*sums, strict=True))
        if self.statistics == "official":
            distance = distance / count
            spread = (spread - distance.square() * count).clamp_(min=0) / (count - 1)
            count = 1
        self.count += count
        self._distance = self._distance + distance
        self._spread = self._spread + spread

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
        self._merge(other.count, other.mean, other._deviations())

    def reduce(self) -> None:
        """Merge over all ranks of the default process group, in rank order.

        Every rank ends with the same numbers. Without an initialised process group nothing
        happens. Every rank must call it.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        deviations = self._deviations()
        packed = torch.cat(
            [deviations.new_tensor([self.count]), self.mean.flatten(), deviations.flatten()]
        )
        ranks = [torch.empty_like(packed) for _ in range(dist.get_world_size())]
        dist.all_gather(ranks, packed)
        self.count = 0
        channels = math.prod(self.shape)
        for rank in ranks:
            count, mean, spread = torch.split(rank, [1, channels, channels])
            self._merge(int(count.item()), mean.view(self.shape), spread.view(self.shape))

    def _deviations(self) -> Tensor:
        """Squares of the distances from the mean, summed; or the sum of the batches' variances."""
        if self.statistics == "official":
            return self._spread
        return (self._spread - self._distance.square() / max(self.count, 1)).clamp_(min=0)

    def _merge(self, count: int, mean: Tensor, deviations: Tensor) -> None:
        if count == 0:
            return
        mean, deviations = mean.to(self._origin.device), deviations.to(self._origin.device)
        if self.count:
            total = self.count + count
            delta = mean - self.mean
            deviations = self._deviations() + deviations
            if self.statistics == "pooled":
                deviations = deviations + delta.square() * (self.count * (count / total))
            mean = self.mean + delta * (count / total)
            count = total
        self.count, self._origin, self._spread = count, mean, deviations
        self._distance = torch.zeros_like(mean)

    def _sums(self, x: Tensor, axes: list[int]) -> tuple[Tensor, Tensor]:
        """Distances from the origin and their squares, summed over axes."""
        distance = x.to(torch.float64, copy=True).sub_(self._origin)
        total = _total(distance, axes).reshape(self.shape)
        return total, _total(distance.square_(), axes).reshape(self.shape)

    def _parts(self, x: Tensor) -> Sequence[Tensor]:
        chunk = _CHUNK if x.is_cpu else 64 * _CHUNK
        return torch.split(x, max(1, chunk * x.shape[0] // x.numel()))


def _total(x: Tensor, axes: list[int]) -> Tensor:
    """The sum over axes, which stay as 1; where channels are the last axis in memory, a product."""
    kept = [axis for axis in range(x.dim()) if axis not in axes]
    rows = x.movedim(kept[0], -1) if len(kept) == 1 else x
    if len(kept) != 1 or not rows.is_contiguous():
        return x.sum(axes) if axes else x.clone()
    rows = rows.view(-1, rows.shape[-1])
    return rows.new_ones(1, len(rows)) @ rows


def _float64_device(device: torch.device | str | None) -> torch.device:
    """The device itself, or the CPU where it has no float64 (Apple's MPS)."""
    chosen = torch.device(device if device is not None else "cpu")
    return torch.device("cpu") if chosen.type == "mps" else chosen
