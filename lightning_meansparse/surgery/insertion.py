"""Operators into a model and out of it again.

An operator is a child of the module it belongs to, and a module-level hook calls it:
``act.meansparse_in`` on the input of ``act``, ``block.meansparse_out`` on the output of ``block``.
Where the site is a call in a module's code, the code calls it: ``block.meansparse_in__relu_1``, see
`lightning_meansparse.rewrite`. The module keeps its class (or becomes a subclass of it) and its
``state_dict`` keys, and since hook and code find the operator through the module, ``deepcopy``,
``pickle`` and ``.to()`` need no bookkeeping.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn

from lightning_meansparse.layer import Center, MeanSparse, check_alpha, check_center
from lightning_meansparse.rewrite import (
    PREFIX,
    acts_in_place,
    base_of,
    call_of,
    check_call,
    child_of,
    clamps_in_place,
    route_,
)
from lightning_meansparse.sites import Site

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)

AFTER_INSERTION: list[Callable[[nn.Module], None]] = []
"""Called with a model that has just got operators, by rooms that know another library's models."""


def sparsify_(
    model: nn.Module, sites: Iterable[Site], *, alpha: float = 0.0, center: Center = "channel"
) -> None:
    """Put a MeanSparse operator at every site, in place.

    The operators start without statistics, so outputs are bit-equal to the base model's until
    `calibrate_` has run and α is above 0. Everything that can fail is checked before the
    model is touched.

    Args:
        model: The network; its class and ``state_dict`` keys stay as they are.
        sites: Where, from `find_sites` on this same module.
        alpha: Half-width of the band in standard deviations, for every site; see `set_alpha`.
        center: The reference of the operators, see `MeanSparse`.

    Raises:
        ValueError: If there are no sites, a site does not exist in ``model`` or is taken, or an
            option is out of range.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_meansparse import find_sites, sparsify_
        >>> from lightning_meansparse.surgery import alphas
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> sparsify_(model, find_sites(model, torch.rand(1, 3, 8, 8)), alpha=0.2)
        >>> alphas(model)
        {'1@in': 0.2}
    """
    check_alpha(alpha)
    check_center(center)
    sites = tuple(sites)
    if not sites:
        raise ValueError(
            "sites is empty: nothing to sparsify. Use find_sites(model, example) to get them."
        )
    owners = [_owner(model, site) for site in sites]
    taken = [
        str(site) for site, owner in zip(sites, owners, strict=True) if hasattr(owner, _child(site))
    ]
    if taken or len(set(map(str, sites))) < len(sites):
        raise ValueError(
            "sites must be free and named once; already sparsified or repeated: "
            f"{shorten(taken or list(map(str, sites)))}. "
            "Call restore_(model) first to start anew, or set_alpha(model, ...) to change alpha."
        )
    # A sweep may insert inside Lightning's inference mode; tensors born there could never take part
    # in a backward pass.
    with torch.inference_mode(False):
        for site, owner in zip(sites, owners, strict=True):
            zeros = torch.zeros(site.shape, device=_device(model, site.module))
            _attach(owner, site, MeanSparse(zeros, zeros, alpha, center=center))
    for tell in AFTER_INSERTION:
        tell(model)


def restore_(model: nn.Module) -> None:
    """Take every operator out again: the exact inverse of `sparsify_`, in place.

    Afterwards the model has the modules, hooks and outputs it had before. A model without operators
    is left alone.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_meansparse import find_sites, restore_, sparsify_
        >>> from lightning_meansparse.surgery import alphas
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> sparsify_(model, find_sites(model, torch.rand(1, 3, 8, 8)), alpha=0.2)
        >>> restore_(model)
        >>> alphas(model)
        {}
    """
    for module in list(model.modules()):
        for child in [name for name in module._modules if name.startswith(PREFIX)]:
            del module._modules[child]
        if base_of(module) is not type(module):
            module.__class__ = base_of(module)
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key in [
                key
                for key, hook in hooks.items()
                if getattr(hook, "func", None) in (_on_input, _on_output)
            ]:
                del hooks[key]


def operators(model: nn.Module) -> dict[str, MeanSparse]:
    """Every operator under its site's name, relative to ``model``, in the order of the module tree.

    An operator that somebody built into a network by hand goes by its module path.
    """
    return {
        _site_name(path): op for path, op in model.named_modules() if isinstance(op, MeanSparse)
    }


def shorten(names: Sequence[str], limit: int = 8) -> str:
    """The first few names of a list, for an error message."""
    return ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")


def _on_input(module: nn.Module, args: tuple[Any, ...], *, child: str) -> tuple[Any, ...]:
    operate: Any = module._modules[child]
    x = operate(args[0], inplace=acts_in_place(module), clamped=clamps_in_place(module))
    return (x, *args[1:])


def _on_output(
    module: nn.Module, args: tuple[Any, ...], output: Any, *, child: str, index: int | None
) -> Any:
    operator: Any = module._modules[child]
    if index is None:
        return operator(output, overwritten=True)
    changed = (*output[:index], operator(output[index], overwritten=True), *output[index + 1 :])
    return type(output)(*changed) if hasattr(output, "_fields") else type(output)(changed)


def _attach(owner: nn.Module, site: Site, operator: MeanSparse) -> None:
    child = _child(site)
    operator.train(owner.training)
    owner.add_module(child, operator)
    if site.call is not None:
        route_(owner)
    elif site.side == "in":
        owner.register_forward_pre_hook(partial(_on_input, child=child))
    else:
        owner.register_forward_hook(partial(_on_output, child=child, index=site.index))


def _owner(model: nn.Module, site: Site) -> nn.Module:
    """The module that a site belongs to, or an error that says why it cannot carry an operator."""
    try:
        owner = model.get_submodule(site.module)
    except AttributeError:
        close = difflib.get_close_matches(
            site.module, [name for name, _ in model.named_modules()], n=3
        )
        raise ValueError(
            f"site {site}: the model has no module {site.module!r}"
            + (f", but it has {shorten(close)}." if close else ".")
            + " Pass the module that find_sites was called on."
        ) from None
    if site.call is not None:
        try:
            check_call(owner, site.call, site.side)
        except ValueError as error:
            raise ValueError(f"site {site}: {error}") from None
    elif isinstance(owner, _CONTAINERS):
        raise ValueError(
            f"site {site}: {type(owner).__name__} would run the operator as one more layer. "
            "Name its first or last child."
        )
    return owner


def _child(site: Site) -> str:
    if site.call is not None:
        name, _, turn = site.call.rstrip("]").partition("[")
        return child_of(name, int(turn), site.side)
    return f"{PREFIX}{site.side}" + ("" if site.index is None else f"_{site.index}")


def _site_name(path: str) -> str:
    owner, _, child = path.rpartition(".")
    if not child.startswith(PREFIX):
        return path
    side, _, index = child.removeprefix(PREFIX).partition("_")
    call = call_of(child)
    if call is not None:
        return f"{owner}::{call[0]}[{call[1]}]@{side}"
    return f"{owner}@{side}" + (f"[{index}]" if index else "")


def _device(model: nn.Module, path: str) -> torch.device:
    """Device of the nearest tensor up the tree.

    An activation has none of its own, and a model may span devices.
    """
    names = path.split(".") if path else []
    for depth in range(len(names), -1, -1):
        module = model.get_submodule(".".join(names[:depth]))
        tensor = next(chain(module.parameters(), module.buffers()), None)
        if tensor is not None:
            return tensor.device
    return torch.device("cpu")
