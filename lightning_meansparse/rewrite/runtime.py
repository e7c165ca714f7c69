"""What rewritten code calls, and how it finds its operators."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

from torch import Tensor, nn

from lightning_meansparse.sites.source import REWRITTEN, is_whole_sum

PREFIX = "meansparse_"
"""How the names of operators begin among their owner's children."""

Walk = tuple[nn.Module, dict[str, int]]
"""The owner whose forward is running, and how often its code has come to each name."""


def child_of(name: str, turn: int, side: str) -> str:
    """Name of the operator for one turn of a name, among its owner's children."""
    return f"{PREFIX}{side}__{name}_{turn}"


def call_of(child: str) -> tuple[str, int] | None:
    """The name and turn of `child_of`; None for an operator that a hook calls."""
    _, _, call = child.partition("__") if child.startswith(PREFIX) else ("", "", "")
    name, _, turn = call.rpartition("_")
    return (name, int(turn)) if name else None


def _operator(walk: Walk, name: str, side: str) -> Any:
    """The operator of a name's next turn, None if there is none."""
    owner, turns = walk
    turn = turns.get(name, 0)
    turns[name] = turn + 1
    return owner._modules.get(child_of(name, turn, side))


def _call(name: str, walk: Walk, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`function(x)`, its input through the operator."""
    operate = _operator(walk, name, "in")
    if operate is None:
        return function(*args, **kwargs)
    if args:
        return function(operate(args[0]), *args[1:], **kwargs)
    key = "input" if "input" in kwargs else next(iter(kwargs))
    return function(**{**kwargs, key: operate(kwargs[key])})


def _call_in_place(name: str, walk: Walk, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`function(x)` as a statement of its own: what happens to `x` must happen to `x` itself."""
    operate = _operator(walk, name, "in")
    if operate is not None:
        x = args[0] if args else kwargs["input"]
        x.copy_(operate(x))
    return function(*args, **kwargs)


def _receive(name: str, walk: Walk, receiver: Any, /) -> Any:
    """The `x` of `x.relu()`."""
    operate = _operator(walk, name, "in") if isinstance(receiver, Tensor) else None
    return receiver if operate is None else operate(receiver)


def _receive_in_place(name: str, walk: Walk, receiver: Any, /) -> Any:
    """The `x` of `x.relu_()` as a statement of its own."""
    operate = _operator(walk, name, "in") if isinstance(receiver, Tensor) else None
    return receiver if operate is None else receiver.copy_(operate(receiver))


def _sum(name: str, walk: Walk, add: Any, left: Any, right: Any, /) -> Any:
    """`left + right`, the result through the operator."""
    operate = _operator(walk, name, "out") if is_whole_sum(left, right) else None
    total = add(left, right)
    return total if operate is None else operate(total)


def _sum_in_place(name: str, walk: Walk, add: Any, left: Any, right: Any, /) -> Any:
    """`x.add_(y)` as a statement of its own."""
    operate = _operator(walk, name, "out") if is_whole_sum(left, right) else None
    total = add(left, right)
    return total if operate is None else total.copy_(operate(total))


RUNTIME: dict[str, Any] = {
    f"{REWRITTEN}{function.__name__.strip('_')}": function
    for function in (
        _call,
        _call_in_place,
        _receive,
        _receive_in_place,
        _sum,
        _sum_in_place,
        operator.add,
        operator.iadd,
        partial,
    )
}
"""The functions, by the names under which rewritten code finds them."""
