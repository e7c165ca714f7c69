"""Class numbers for the labels of a data set, in the order in which a model gives its logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_meansparse.data.parts import Rows
from lightning_meansparse.data.pixels import Array


@dataclass(frozen=True)
class Classes:
    """The classes, numbered.

    Args:
        names: Name of every class.
        number: The class of every name that the data use.
        stored: The names in the data set's own order; None where it stores none.
    """

    names: tuple[str, ...]
    number: Mapping[str, int]
    stored: tuple[str, ...] | None

    def of(self, labels: Array, stored: tuple[str, ...] | None, where: str) -> Rows:
        """Check the labels of a split and return them as class numbers.

        Args:
            labels: Numbers or names, `(N,)`.
            stored: The names that the split itself stores.
            where: Which split, for errors.

        Raises:
            TypeError: If they are neither numbers nor names.
            ValueError: If they are negative, too large, or names that training does not have.
        """
        if labels.dtype.kind == "U":
            named = self._numbers(np.unique(labels).tolist(), where)
            return np.array([named[label] for label in labels.tolist()], np.int64)
        numbers = numbered(labels, where)
        count = len(self.names if stored is None else stored)
        if numbers.max() >= count:
            raise ValueError(
                f"labels of {where} go up to {numbers.max()}, but there are {count} classes"
            )
        if stored is None or stored == self.names:
            return numbers
        named = self._numbers(stored, where)
        return np.array([named[name] for name in stored], np.int64)[numbers]

    def _numbers(self, names: Sequence[str], where: str) -> dict[str, int]:
        if unknown := sorted(set(names) - set(self.number)):
            raise ValueError(f"labels of {where} have names that training does not: {unknown[:5]}")
        return {name: self.number[name] for name in names}


def classes_of(
    labels: Array,
    stored: Sequence[str] | None,
    *,
    given: Sequence[str] | None,
    model: Sequence[str] | None,
    where: str,
) -> Classes:
    """Find the classes of a data set.

    Args:
        labels: Of the training split, `(N,)`.
        stored: Names by class number in the data set's own order.
        given: Names by class number in the order that is wanted.
        model: The names of a model's logits.
        where: The training split, for errors.

    Raises:
        ValueError: If names are stored that are not among those given, or not the model's.
    """
    if labels.dtype.kind == "U":
        stored = np.unique(labels).tolist()
    own = None if stored is None else tuple(stored)
    if own is None:
        wanted = given or model
        if wanted is None:
            wanted = list(map(str, range(_count(numbered(labels, where)))))
        return Classes(tuple(wanted), {name: n for n, name in enumerate(wanted)}, None)
    if given is not None:
        if set(own) - set(given) or len(set(given)) < len(given):
            raise ValueError(f"class_names={given} are not those of the data set: {list(own)}")
        return Classes(tuple(given), {name: n for n, name in enumerate(given)}, own)
    if model is None or (numbers := _in_order_of(own, model)) is None:
        return Classes(own, {name: n for n, name in enumerate(own)}, own)
    return Classes(tuple(model), dict(zip(own, numbers, strict=True)), own)


def numbered(labels: Array, where: str) -> Rows:
    """Check labels that are numbers."""
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        kind = "lists" if labels.ndim > 1 else f"of type {labels.dtype}, perhaps with gaps"
        raise TypeError(f"labels of {where} must be class numbers or names, but they are {kind}")
    numbers = labels.astype(np.int64)
    if numbers.min() < 0:
        raise ValueError(
            f"{int((numbers < 0).sum())} of {len(numbers)} labels of {where} are negative: this "
            "split is not labelled; choose one that is"
        )
    return numbers


def _count(numbers: Rows) -> int:
    count = int(numbers.max()) + 1
    if count > max(1000, len(numbers)):
        raise ValueError(f"labels must be class numbers, got {count - 1}: number them 0, 1, 2, …")
    return count


def _in_order_of(own: Sequence[str], model: Sequence[str]) -> list[int] | None:
    """The model's number of each class; None if both have them in the same order.

    A model's label may hold several names, as ImageNet's do: "tench, Tinca tinca".
    """
    ours, theirs = [_names(name) for name in own], [_names(label) for label in model]
    if len(own) == len(model) and all(a & b for a, b in zip(ours, theirs, strict=True)):
        return None
    times = Counter(name for names in theirs for name in names)
    place = {name: n for n, names in enumerate(theirs) for name in names if times[name] == 1}
    found = [{place[name] for name in names if name in place} for names in ours]
    lost = [name for name, places in zip(own, found, strict=True) if len(places) != 1]
    numbers = [places.pop() for places in found if len(places) == 1]
    if lost or len(set(numbers)) < len(numbers):
        raise ValueError(
            f"the data set's classes {list(own[:5])}… ({len(own)}) are not the classifier's "
            f"{list(model[:5])}… ({len(model)}): {lost[:5] or 'several are one'}. Take the data "
            "that it was trained on; or, where they only are called otherwise, say that the order "
            "is the same by class_names= with the data set's own names"
        )
    return numbers


def _names(label: str) -> set[str]:
    """The names in a label, however they are written."""
    names = (label, *label.split(","))
    return {" ".join(name.casefold().replace("_", " ").split()) for name in names}
