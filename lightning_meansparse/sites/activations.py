"""What counts as an activation, by class or by function name; tables, no branches."""

from __future__ import annotations

from torch import nn


def names(text: str) -> frozenset[str]:
    """The words of a text, for tables of names."""
    return frozenset(text.split())


MODULES: tuple[type[nn.Module], ...] = tuple(
    getattr(nn, name)
    for name in sorted(
        names(
            """
            CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish
            PReLU RReLU ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink
            Threshold
            """
        )
    )
)
"""Classes of `torch.nn`. Softmax, attention and GLU join channels and are none."""

PACKAGES = ("timm.layers.activations", "transformers.activations")
"""Homes of activation classes, recognised by name so that neither package is imported."""

IDENTITIES = names("LinearActivation")
"""Classes in those homes that do nothing."""

FUNCTIONS = names(
    """
    celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid log_sigmoid mish
    prelu rrelu relu relu6 selu silu sigmoid expit softplus softshrink softsign tanh tanhshrink
    threshold log_sigmoid_forward _prelu_kernel rrelu_with_noise
    """
)
"""Functional activations: names in `torch`, in `torch.nn.functional` and of aten operations."""

EXTREMES = names("maximum minimum max min")
"""Functions of two tensors that are activations if one does not depend on the model's input."""

CLAMPS = names("clamp clip clamp_min")
"""Functions that are activations if their floor is one of `FLOORS`."""

FLOORS = (0, -1)
"""Where `ReLU` and `Hardtanh` bend; other floors guard against overflow or division by zero."""

BENDS = FUNCTIONS | names(
    "abs erf exp clamp clamp_min clamp_max maximum minimum gt ge lt le sign heaviside"
)
"""Operations that make an activation of what they meet again: `x * (1 + erf(x))`, `x * (x > 0)`."""

MEETINGS = names("mul div where masked_fill maximum minimum")
"""Operations in which the parts of an activation that is written out meet."""

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
"""Modules that own no place: their first or last child names it."""


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation by its class or its class's home."""
    kind = type(module)
    if kind.__name__ in IDENTITIES:
        return False
    return isinstance(module, MODULES) or kind.__module__.startswith(PACKAGES)


def is_operator(module: nn.Module) -> bool:
    """Whether a module is one of our operators, left there by an earlier `sparsify_`."""
    return type(module).__module__.startswith("lightning_meansparse.layer")
