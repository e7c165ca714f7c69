"""Which axes of a tensor are channels, told by where the tensor came from.

Every input-dependent tensor carries a `Trace`: a small float tensor of *channel numbers* that is
broadcastable against it, with size 1 on every axis that is no channel axis. A layer that makes new
channels (convolution, matrix product) starts a fresh numbering; elementwise functions, norms and
pooling pass it on; whatever moves values around (view, permute, roll, cat, window partitions ...)
is run on the numbers themselves, and the axes along which they then vary are the channel axes.
Nothing is decided by comparing sizes, and an operation that is in no table leaves them undecided.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

Channels = Tensor | str | None
"""Channel numbers, or why they are undecided, or None for a raw input that no layer made."""

DISAGREEMENT = "joins tensors with different channel axes"
"""Part of the reason why channels are undecided behind such an operation."""


class Trace(NamedTuple):
    """Channel numbers of one tensor.

    Attributes:
        channels: The channels made by the last layer.
        carried: Channels of the layer before, where a matrix product only carried them along as
            rows (an MLP over tokens carries the embedding channels).
    """

    channels: Channels = None
    carried: Tensor | None = None


@dataclass
class Op:
    """One executed aten operation, with the traces and shapes of its inputs before it ran."""

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: list[Tensor]
    traces: dict[int, Trace] = field(default_factory=dict)
    shapes: dict[int, torch.Size] = field(default_factory=dict)

    def arg(self, *names: str) -> Any:
        """Value of an argument: of the first of these names that the operation's schema has."""
        schema = {argument.name: i for i, argument in enumerate(self.func._schema.arguments)}
        for name in names:
            if name in schema:
                i = schema[name]
                default = self.func._schema.arguments[i].default_value
                return self.args[i] if i < len(self.args) else self.kwargs.get(name, default)
        return None

    def trace(self, tensor: object) -> Trace | None:
        """Trace of an input, None when it does not depend on the model's input."""
        return self.traces.get(id(tensor))

    @property
    def tracked(self) -> list[Tensor]:
        """Input tensors that depend on the model's input, in order, each once."""
        seen = {id(t): t for t in tree_leaves((self.args, self.kwargs)) if id(t) in self.traces}
        return list(seen.values())


def numbering(ndim: int, axis: int, size: int) -> Tensor:
    """Fresh channel numbers along one axis."""
    shape = [1] * ndim
    shape[axis] = size
    return torch.arange(size, dtype=torch.float32).view(shape)


def compact(numbers: Tensor) -> Tensor:
    """Shrink every axis along which the numbers do not vary to size 1."""
    for dim, size in enumerate(numbers.shape):
        first = numbers.narrow(dim, 0, min(size, 1))
        if size > 1 and (
            numbers.stride(dim) == 0 or torch.equal(numbers, first.expand_as(numbers))
        ):
            numbers = first
    return numbers.clone(memory_format=torch.contiguous_format)


def axes(numbers: Tensor) -> frozenset[int]:
    """Channel axes, counted from the right."""
    return frozenset(d - numbers.ndim for d, size in enumerate(numbers.shape) if size > 1)


def fit(channels: Channels, shape: Sequence[int], name: str) -> Channels:
    """Channel numbers for a result with the same axes but perhaps other sizes."""
    if not isinstance(channels, Tensor):
        return channels
    if channels.ndim == len(shape):
        changed = [d for d, n in enumerate(channels.shape) if n not in (1, shape[d])]
        if not changed:
            return channels
        if len(changed) == 1 and len(axes(channels)) == 1:
            return numbering(len(shape), changed[0], shape[changed[0]])
    return f"{name} changed the channel axes"
