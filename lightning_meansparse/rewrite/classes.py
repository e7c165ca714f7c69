"""A module's class, swapped for a subclass whose `forward` passes by operators."""

from __future__ import annotations

import copyreg
from functools import cache
from typing import Any

from torch import nn

from lightning_meansparse.rewrite.runtime import PREFIX, call_of
from lightning_meansparse.rewrite.writer import write_forward
from lightning_meansparse.sites.source import SUM, obstacle

_BASE = "_meansparse_base"
_NAMES = "_meansparse_names"


def check_call(owner: nn.Module, call: str, side: str) -> None:
    """Refuse a call that no operator can stand at.

    Args:
        owner: The module in whose code it stands.
        call: As in a site's name, `"relu[1]"`.
        side: `"in"` for the input of a call, `"out"` for a sum.

    Raises:
        ValueError: If so.
    """
    name = call.partition("[")[0]
    if (name == SUM) != (side == "out"):
        raise ValueError(
            f"{call}@{side}: an operator stands before a call (relu[0]@in) or behind a sum "
            f"({SUM}[0]@out)."
        )
    reason = obstacle(owner, name)
    if reason is not None:
        raise ValueError(f"{call}: {reason}.")
    rewritten(base_of(owner), frozenset({name}))


def route_(owner: nn.Module) -> None:
    """Let an owner's code pass by the operators that it holds for calls, in place.

    Raises:
        ValueError: If its code cannot be written anew, which `check_call` tells before.
    """
    held = {child: call for child in owner._modules if (call := call_of(child)) is not None}
    base = base_of(owner)
    owner.__class__ = rewritten(base, frozenset(name for name, _ in held.values()))
    if base.__module__.startswith("torch."):
        # torch's transformer layers run their Python code only if they see a hook somewhere inside.
        for child in held:
            hooked = owner._modules[child]
            if hooked is not None and not hooked._forward_pre_hooks:
                hooked.register_forward_pre_hook(_in_python)


def base_of(owner: nn.Module) -> type:
    """The class of a module as it was before `route_`."""
    base: type = vars(type(owner)).get(_BASE, type(owner))
    return base


@cache
def rewritten(base: type, names: frozenset[str]) -> type:
    """The subclass of `base` whose `forward` passes by operators at the calls of these names."""
    content: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
        _BASE: base,
        _NAMES: names,
        "forward": write_forward(base, names),
    }
    if issubclass(base, nn.Sequential):
        content |= {"__iter__": _iter_without_operators, "__len__": _len_without_operators}
    cls: type = type(base)(base.__name__, (base,), content)
    return cls


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Store the base and the names instead of the class, which no import finds."""
    cls = type(self)
    reduced: Any = super(cls, self).__reduce_ex__(protocol)
    rebuild, args, *rest = reduced
    if rebuild is not copyreg.__newobj__ or args != (cls,):  # type: ignore[attr-defined]
        raise TypeError(
            f"{cls.__name__} pickles itself in its own way, which would lose the operators in its "
            "code. Call restore_(model) before, and load the adapter afterwards."
        )
    return (_new, (vars(cls)[_BASE], vars(cls)[_NAMES]), *rest)


def _new(base: type, names: frozenset[str]) -> nn.Module:
    cls = rewritten(base, names)
    module: nn.Module = object.__new__(cls)
    return module


def _in_python(module: nn.Module, args: Any) -> None:
    """A hook that does nothing."""


def _iter_without_operators(self: nn.Sequential) -> Any:
    return iter([m for name, m in self._modules.items() if not name.startswith(PREFIX)])


def _len_without_operators(self: nn.Sequential) -> int:
    return sum(not name.startswith(PREFIX) for name in self._modules)
