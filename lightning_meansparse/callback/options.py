"""What a callback can be asked for, checked when it is made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import get_args

from lightning_meansparse.layer import check_alpha, check_center
from lightning_meansparse.moments import Statistics
from lightning_meansparse.sites import Site
from lightning_meansparse.sites.record import match

Where = str | Sequence[str] | Callable[[Site], bool]


def check_options(
    alpha: float | Mapping[str, float],
    center: str,
    statistics: str,
    max_batches: int | None,
    dataloader: object,
) -> None:
    """Raise unless a calibration can be done with these; see `MeanSparseCallback`.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If ``dataloader`` can be read only once.
    """
    if isinstance(alpha, Mapping) and not alpha:
        raise ValueError("alpha must be a number or {glob: number}, got {}: nothing to set.")
    for value in alpha.values() if isinstance(alpha, Mapping) else (alpha,):
        check_alpha(value)
    check_center(center)
    if statistics not in get_args(Statistics):
        raise ValueError(f"statistics must be one of {get_args(Statistics)}, got {statistics!r}.")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be None or at least 1, got {max_batches}.")
    if isinstance(dataloader, Iterator):
        raise TypeError(
            f"dataloader: a {type(dataloader).__name__} can be read only once, and calibration "
            "may have to run again. Pass a DataLoader, a list of batches, or a function."
        )


def check_globs(alpha: float | Mapping[str, float], sites: Iterable[Site]) -> None:
    """Raise a ``ValueError`` if a glob that α is given for means no site."""
    names = [str(site) for site in sites]
    for glob in alpha if isinstance(alpha, Mapping) else ():
        if not match(glob, names):
            raise ValueError(f"alpha: {glob!r} matches none of {', '.join(names)}.")
