"""What rewritten code calls, and how it finds its operators."""

from __future__ import annotations

import operator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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
    return _called(name, walk, function, args, kwargs, acts_in_place(function, args, kwargs))


def _call_in_place(name: str, walk: Walk, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """`function(x)` as a statement of its own: what happens to `x` must happen to `x` itself."""
    return _called(name, walk, function, args, kwargs, True)


def _method(name: str, walk: Walk, owner: Any, attribute: str, /, *args: Any, **kwargs: Any) -> Any:
    """`owner.attribute(x)`; or `x.attribute()`, where the owner is the input."""
    if isinstance(owner, Tensor):
        return _of_tensor(name, walk, owner, attribute, args, kwargs, attribute.endswith("_"))
    return _call(name, walk, getattr(owner, attribute), *args, **kwargs)


def _method_in_place(
    name: str, walk: Walk, owner: Any, attribute: str, /, *args: Any, **kwargs: Any
) -> Any:
    """The same as a statement of its own."""
    if isinstance(owner, Tensor):
        return _of_tensor(name, walk, owner, attribute, args, kwargs, True)
    return _call_in_place(name, walk, getattr(owner, attribute), *args, **kwargs)


def _called(
    name: str, walk: Walk, function: Any, args: tuple[Any, ...], kwargs: Any, inplace: bool
) -> Any:
    operate = _operator(walk, name, "in")
    if operate is None:
        return function(*args, **kwargs)
    if args:
        clamped = clamps_in_place(function, args, kwargs)
        x = operate(args[0], inplace=inplace, clamped=clamped)
        return function(x, *args[1:], **kwargs)
    key = "input" if "input" in kwargs else next(iter(kwargs))
    return function(**{**kwargs, key: operate(kwargs[key], inplace=inplace)})


def clamps_in_place(function: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> bool:
    """Whether a call is sure to be a ReLU or a ReLU6 that overwrites its input."""
    known = type(function) in (nn.ReLU, nn.ReLU6) or function in (F.relu, F.relu6, torch.relu_)
    return known and acts_in_place(function, args, kwargs)


def _of_tensor(
    name: str,
    walk: Walk,
    x: Tensor,
    attribute: str,
    args: tuple[Any, ...],
    kwargs: Any,
    inplace: bool,
) -> Any:
    operate = _operator(walk, name, "in")
    x = x if operate is None else operate(x, inplace=inplace)
    return getattr(x, attribute)(*args, **kwargs)


def acts_in_place(function: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> bool:
    """Whether a call overwrites its input: as `nn.ReLU(inplace=True)` and `F.relu_` do."""
    if isinstance(function, partial):
        return acts_in_place(
            function.func, function.args + args, {**function.keywords, **(kwargs or {})}
        )
    return (
        getattr(function, "inplace", False) is True
        or (kwargs or {}).get("inplace") is True
        or any(argument is True for argument in args)
        or str(getattr(function, "__name__", "")).endswith("_")
    )


def _sum(name: str, walk: Walk, add: Any, left: Any, right: Any, /) -> Any:
    """`left + right`, the result through the operator."""
    operate = _operator(walk, name, "out") if is_whole_sum(left, right) else None
    total = add(left, right)
    return total if operate is None else operate(total, overwritten=True)


def _sum_in_place(name: str, walk: Walk, add: Any, left: Any, right: Any, /) -> Any:
    """`x.add_(y)` as a statement of its own."""
    operate = _operator(walk, name, "out") if is_whole_sum(left, right) else None
    total = add(left, right)
    return total if operate is None else operate(total, inplace=True)


def _bind(walk: Walk, function: Any, /, *first: Any) -> Any:
    """A function that goes on with the walk, or from where it began if the backward pass reruns it.

    Activation checkpointing calls it again then, when the walk has long come to its end.
    """
    owner, turns = walk
    begun: list[dict[str, int]] = []

    def run(*args: Any, **kwargs: Any) -> Any:
        again = bool(begun) and torch._C._current_graph_task_id() != -1
        if not begun:
            begun.append(dict(turns))
        now = (owner, dict(begun[0])) if again else walk
        return function(*first, *args, **kwargs, **{f"{REWRITTEN}walk": now})

    return run


RUNTIME: dict[str, Any] = {
    f"{REWRITTEN}{function.__name__.strip('_')}": function
    for function in (
        _call,
        _call_in_place,
        _method,
        _method_in_place,
        _sum,
        _sum_in_place,
        operator.add,
        operator.iadd,
        _bind,
    )
}
"""The functions, by the names under which rewritten code finds them."""
