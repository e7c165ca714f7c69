"""Loaders that do not wait for ever."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader

_T = TypeVar("_T", covariant=True)


class PatientLoader(DataLoader[_T]):
    """A loader that says what to do when its workers hang; how long it waits is its `timeout`."""

    def __iter__(self) -> Any:
        """Begin another pass."""
        return self._told(super().__iter__())

    def _told(self, batches: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from batches
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            raise TimeoutError(
                f"no worker has given a batch for {self.timeout:g} s: storage that does not "
                "answer, or an image that takes for ever to decode. Give a larger worker_timeout "
                "if they are only slow, or num_workers=0 to see where they hang."
            ) from error
