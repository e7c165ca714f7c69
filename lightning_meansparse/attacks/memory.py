"""Batches that fit the memory of the device, found out by trying."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

_log = logging.getLogger(__name__)

_T = TypeVar("_T")


_AT_ONCE = 256

_IN_CACHES = 64
"""What a CPU works on at a time: of 256 images the tensors leave its caches."""


class Batches:
    """Parts of so many samples; of half as many from where the memory has run out.

    Noise belongs to samples, so what is found does not depend on the parts (but for attacks of
    other libraries, which draw per batch).

    Args:
        size: Samples per part; None for as many as suit the device.
        device: Where they are worked on.

    Attributes:
        size: The same, as far as the memory goes.

    Examples:
        >>> parts = Batches(2, torch.device("cpu")).of(torch.arange(5), lambda rows: rows.tolist())
        >>> [found for _, found in parts]
        [[0, 1], [2, 3], [4]]
    """

    def __init__(self, size: int | None, device: torch.device) -> None:
        if size is None:
            size = _IN_CACHES if device.type == "cpu" else _AT_ONCE
        self.size = size

    def of(self, rows: Tensor, work: Callable[[Tensor], _T]) -> Iterator[tuple[Tensor, _T]]:
        """Yield parts of ``rows`` with what ``work`` made of them.

        Args:
            rows: Numbers of samples, ``(n,)``.
            work: May be given a sample again, in a smaller part, after it ran out of memory.

        Raises:
            RuntimeError: If a single sample is too much.
        """
        while len(rows):
            part = rows[: self.size]
            done = self._tried(work, part)
            if done is not None:
                yield part, done[0]
                rows = rows[len(part) :]

    def _tried(self, work: Callable[[Tensor], _T], part: Tensor) -> tuple[_T] | None:
        try:
            return (work(part),)
        except torch.OutOfMemoryError as error:
            if len(part) == 1:
                raise RuntimeError(
                    "the memory of the device does not hold an attack on a single image: free some "
                    f"of it, or take a device with more ({error})"
                ) from error
        # Not inside `except`, where the traceback holds on to every tensor of the failed attempt.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.size = (len(part) + 1) // 2
        _log.warning(
            "out of memory with %d images at once: going on with %d, to the same result",
            len(part),
            self.size,
        )
        return None
