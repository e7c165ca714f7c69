"""What happens during a probe forward, one record per event."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lightning_meansparse.sites.dataflow import Value, Written
from lightning_meansparse.sites.spots import Spot


@dataclass(frozen=True)
class Turn:
    """A call or a sum in the code of a running module.

    Attributes:
        owner: Name of the module in whose code it stands.
        owner_class: Its class name.
        name: `relu[1]`, the second time in this run of the owner that its code calls `relu`.
        spot: Where in the code, or why that is unknown.
    """

    owner: str
    owner_class: str
    name: str
    spot: Spot | str


@dataclass(eq=False)
class Call:
    """One call of an activation whose input depends on the example."""

    time: int
    turn: Turn
    kind: str
    value: Value
    module: nn.Module | None = None
    first_input: bool = True
    bit: int = 0
    written: Written | None = None


@dataclass(eq=False)
class Place:
    """A tensor at a module's border."""

    time: int
    module: nn.Module
    side: str
    index: int | None
    value: Value


@dataclass(eq=False)
class Sum:
    """A residual sum, and the module border at which it leaves the module that made it."""

    time: int
    turn: Turn
    value: Value
    place: Place | None = None
    before_activation: bool = False


@dataclass(eq=False)
class Frame:
    """A running module.

    Attributes:
        module: The module.
        name: Its name in the model, None if the model does not hold it.
        start: When it was called.
        value: Value of its first input when it was called.
        shape: Shape of that input.
        mutes: It is an activation or an operator, whose inside is no place for a site.
        turn: Which call of its owner's code it is; None if the model does not hold it.
        active: Its own activation call.
        calls: Functional activation calls in its code.
        turns: How often its code has come to each name so far.
        ran: Modules that its code has called so far.
    """

    module: nn.Module
    name: str | None
    start: int
    value: Value | None
    shape: torch.Size | None
    mutes: bool
    turn: Turn | None = None
    active: Call | None = None
    calls: list[Call] = field(default_factory=list)
    turns: Counter[str] = field(default_factory=Counter)
    ran: set[nn.Module] = field(default_factory=set)

    @property
    def kind(self) -> str:
        """Class name of the module."""
        return type(self.module).__name__

    @property
    def short(self) -> str:
        """What the owner's code calls it."""
        return self.name.rpartition(".")[2] if self.name else self.kind


def tensors_in(output: object) -> Iterator[Tensor]:
    """All tensors in a model's output: a tensor, sequence, mapping or Hugging Face output."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_in(value)
    elif hasattr(output, "__dataclass_fields__"):
        yield from tensors_in(vars(output))
