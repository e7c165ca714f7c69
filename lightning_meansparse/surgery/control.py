"""The switches of a sparsified model: α per site, and which gradient flows back."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor, nn

from lightning_meansparse.layer import Backward, MeanSparse, check_alpha, check_backward
from lightning_meansparse.sites.record import match
from lightning_meansparse.surgery.insertion import operators, shorten


def set_alpha(model: nn.Module, alpha: float | Mapping[str, float]) -> None:
    """Set α, the half-width of the band in standard deviations, in place.

    Args:
        model: A model with operators.
        alpha: One number for every site, or ``{glob over site names: number}``. Sites that no glob
            matches keep theirs; where several match, the last one counts.

    Raises:
        RuntimeError: If the model has no operators.
        ValueError: If a number is negative or not finite, or a glob matches no site.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_meansparse import find_sites, set_alpha, sparsify_
        >>> from lightning_meansparse.surgery import alphas
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.GELU())
        >>> sparsify_(model, find_sites(model, torch.rand(1, 3, 8, 8)))
        >>> set_alpha(model, {"*": 0.1, "3@in": 0.3})
        >>> alphas(model)
        {'1@in': 0.1, '3@in': 0.3}
    """
    found = operators(model)
    if not found:
        raise RuntimeError(
            "model has no MeanSparse operators. Call sparsify_(model, sites) or load_adapter first."
        )
    rules = alpha if isinstance(alpha, Mapping) else {"*": alpha}
    chosen: dict[str, float] = {}
    for pattern, value in rules.items():
        check_alpha(value)
        names = match(pattern, found)
        if not names:
            close = difflib.get_close_matches(pattern, found, n=3, cutoff=0) or list(found)
            raise ValueError(
                f"alpha: no site matches {pattern!r}. Sites are named like {shorten(close)}."
            )
        chosen.update(dict.fromkeys(names, value))
    for name, value in chosen.items():
        found[name].alpha.fill_(value)


def alphas(model: nn.Module) -> dict[str, float]:
    """The current α of every site."""
    return {name: round(op.alpha.item(), 7) for name, op in operators(model).items()}


@contextmanager
def alpha_set(model: nn.Module, alpha: float | Mapping[str, float]) -> Iterator[None]:
    """Set α inside the ``with`` block only; at 0 the model is its base."""
    with _alphas_kept(model) as before:
        if before:
            set_alpha(model, alpha)
        yield


@contextmanager
def alpha_scaled(model: nn.Module, factor: float) -> Iterator[None]:
    """Multiply every site's α inside the ``with`` block only."""
    with _alphas_kept(model) as before:
        for op, old in before:  # not multiplied in place: operators may share one α
            op.alpha.copy_(factor * old)
        yield


@contextmanager
def _alphas_kept(model: nn.Module) -> Iterator[list[tuple[MeanSparse, Tensor]]]:
    before = [(op, op.alpha.clone()) for op in operators(model).values()]
    try:
        yield before
    finally:
        for op, old in before:
            op.alpha.copy_(old)


@contextmanager
def backward_rule(
    model: nn.Module, rule: Backward, *, temperature: float = 1 / 16
) -> Iterator[None]:
    """Use another gradient for every operator inside the ``with`` block.

    The forward pass stays the same bit for bit.

    Args:
        model: A model, with or without operators.
        rule: ``"exact"``, ``"identity"`` or ``"smooth"``, see
            `mean_sparse`.
        temperature: Softness of the ``"smooth"`` gate as a fraction of the half-width of the band.

    Raises:
        ValueError: If ``rule`` or ``temperature`` is out of range.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_meansparse import backward_rule, find_sites, sparsify_
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> sparsify_(model, find_sites(model, torch.rand(1, 3, 8, 8)), alpha=0.2)
        >>> with backward_rule(model, "smooth"):
        ...     model(torch.rand(1, 3, 8, 8)).sum().backward()
    """
    check_backward(rule, temperature)
    before = [(op, op.backward, op.temperature) for op in operators(model).values()]
    try:
        for op, _, _ in before:
            op.backward, op.temperature = rule, temperature
        yield
    finally:
        for op, old_rule, old_temperature in before:
            op.backward, op.temperature = old_rule, old_temperature
