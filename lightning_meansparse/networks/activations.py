"""Activations by name, with the one of the paper's table that neither torch nor timm has."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers.create_act import get_act_layer
from torch import Tensor, nn

Activation = str | Callable[[], nn.Module]


class PSSiLU(nn.Module):
    """SiLU with a learnable slope and a learnable shift [1, Sec. 4]: `x (σ(ax) − b) / (1 − b)`.

    With `a = |alpha|` and `b = |beta|`, both one number for all channels. At the initial values,
    `alpha` 1 and `beta` 1e-8, this is SiLU.

    [1] Dai, Mahloujifar, Mittal, Parameterizing Activation Functions for Adversarial Robustness,
        arXiv 2110.05626.

    Shapes:
        Any shape to the same shape.

    Examples:
        >>> x = torch.linspace(-3, 3, 7)
        >>> torch.allclose(PSSiLU()(x), nn.functional.silu(x))
        True
    """

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1))
        self.beta = nn.Parameter(torch.full((1,), 1e-8))

    def forward(self, x: Tensor) -> Tensor:
        """Return the activation of every value."""
        shift = self.beta.abs()
        return x * (torch.sigmoid(self.alpha.abs() * x) - shift) / (1 - shift)


def make_activation(act_layer: Activation) -> nn.Module:
    """Make one activation module.

    Args:
        act_layer: `"pssilu"`, a name that timm knows (`"relu"`, `"gelu"`, `"silu"`, `"elu"`, …), or
            a class or function that makes a module.

    Raises:
        ValueError: If there is no activation of that name.
        TypeError: If `act_layer` is of another kind, or makes something else than a module.

    Examples:
        >>> make_activation("elu")
        ELU(alpha=1.0)
    """
    if isinstance(act_layer, str):
        return PSSiLU() if act_layer.lower() == "pssilu" else _of_timm(act_layer)
    made = None
    if callable(act_layer) and not isinstance(act_layer, nn.Module):
        made = act_layer()
    if not isinstance(made, nn.Module):
        raise TypeError(
            "act_layer must be a name such as 'gelu', or a class or function that makes a new "
            f"module at every call, got {act_layer!r:.80}"
        )
    return made


def _of_timm(name: str) -> nn.Module:
    try:
        made: nn.Module = get_act_layer(name.lower())()
    except KeyError:
        raise ValueError(
            f"act_layer={name!r} is unknown: give 'relu', 'gelu', 'silu', 'elu', 'pssilu', another "
            "name of timm.layers.get_act_layer, or a class"
        ) from None
    return made
