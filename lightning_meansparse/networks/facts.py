"""What the networks have in common: facts about their images, and their initial weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import PretrainedCfg
from torch import nn

# As in the published classes (RobustBench, `architectures/dm_wide_resnet.py`).
_NORMALISATION = {
    "cifar10": {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2471, 0.2435, 0.2616)},
    "cifar100": {"mean": (0.5071, 0.4865, 0.4409), "std": (0.2673, 0.2564, 0.2762)},
}
_CLASSES = {"cifar10": 10, "cifar100": 100}


def cifar_cfgs(name: str, **layers: Any) -> dict[str, dict[str, Any] | PretrainedCfg]:
    """The `pretrained_cfg` that timm keeps of a network for 32x32 images, one for each data set.

    Args:
        name: Name of the architecture.
        **layers: `first_conv`, `classifier` and `pool_size`, as timm calls them.
    """
    return {
        f"{name}.{data}": {
            "num_classes": _CLASSES[data],
            "input_size": (3, 32, 32),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            **numbers,
            **layers,
        }
        for data, numbers in _NORMALISATION.items()
    }


def check_stages(**sizes: Sequence[int]) -> None:
    """Refuse what is no list of positive integers, or lists that are not one number per stage.

    Raises:
        ValueError: If so.
    """
    for name, numbers in sizes.items():
        listed = isinstance(numbers, Sequence) and not isinstance(numbers, str) and len(numbers) > 0
        if not listed or not all(type(number) is int and number > 0 for number in numbers):
            raise ValueError(f"{name} must be a list of positive integers, got {numbers!r}")
    if len({len(numbers) for numbers in sizes.values()}) > 1:
        shown = ", ".join(f"{name}={numbers!r}" for name, numbers in sizes.items())
        raise ValueError(f"one number per stage is needed in each of {shown}")


def initialise(model: nn.Module) -> None:
    """Random weights to train from: He's for convolutions; norms begin as the identity."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
