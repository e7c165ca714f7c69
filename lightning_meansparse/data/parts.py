"""Which rows of a split are used for what: one seeded order with stratified prefixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Rows = npt.NDArray[np.int64]

_T = TypeVar("_T")


def stratified_order(labels: Rows, seed: int) -> Rows:
    """Order all rows so that every prefix, and so every remainder, holds each class in proportion.

    Systematic sampling: the k-th of the n rows of a class, shuffled, gets the key `(k + u) / n`
    with one random `u` in [0, 1) per class, and the rows are sorted by key. Of the keys below t
    each class then has `t n`, give or take one row. A smaller subset is part of a larger one.

    Args:
        labels: Class of each row, `(N,)`.
        seed: Same labels and seed, same order, on any machine.

    Returns:
        A permutation of `0 … N - 1`.

    Examples:
        >>> labels = np.repeat([0, 1], [8, 4])
        >>> order = stratified_order(labels, seed=0)
        >>> np.bincount(labels[order[:6]]).tolist()
        [4, 2]
    """
    # A bare Philox, not default_rng: its stream is fixed, so data parts survive a NumPy update.
    generator = np.random.Generator(np.random.Philox(seed))
    keys = np.empty(len(labels))
    for value in np.unique(labels):
        rows = np.flatnonzero(labels == value)
        shuffled = np.argsort(generator.random(len(rows)), kind="stable")
        keys[rows[shuffled]] = (np.arange(len(rows)) + generator.random()) / len(rows)
    return np.argsort(keys, kind="stable").astype(np.int64)


def held_out_count(holdout: int | float, available: int) -> int:
    """Turn `holdout`, a fraction or a count, into a number of images.

    Args:
        holdout: A float in [0, 1) is a share of `available`, rounded; an int is a count.
        available: Images in the training split.

    Raises:
        TypeError: If `holdout` is no number.
        ValueError: If it leaves no training image, or is negative.
    """
    if isinstance(holdout, bool) or not isinstance(holdout, int | float):
        raise TypeError(f"holdout must be a share (float) or a count (int), got {holdout!r}")
    if isinstance(holdout, float) and not 0 <= holdout < 1:
        raise ValueError(
            f"holdout={holdout} as a share must be in [0, 1); write an int for a count of images"
        )
    count = round(holdout * available) if isinstance(holdout, float) else holdout
    if not 0 <= count < available:
        raise ValueError(
            f"holdout={holdout} must leave at least one of the {available} images of the training "
            "split for training"
        )
    return count


def limited(rows: Rows, limit: int | None, *, name: str, where: str) -> Rows:
    """Return the first `limit` rows (all for None); a limit that cannot be met is an error.

    Raises:
        ValueError: If `limit` is not in 1 … len(rows).
    """
    if limit is None:
        return rows
    if not 1 <= limit <= len(rows):
        raise ValueError(f"{name}={limit}, but {where} has {len(rows)} images; give 1 to that many")
    return rows[:limit]


def split_of(splits: Mapping[str, _T], name: str, argument: str) -> _T:
    """Return one split, or say which there are.

    Raises:
        ValueError: Naming the argument that asked for it.
    """
    if name not in splits:
        raise ValueError(
            f"{argument}={name!r} is no split of the data set, which has: {', '.join(splits)}"
        )
    return splits[name]
