"""Small networks for the tests of sites, and what is found in them."""

from typing import Any

import torch
from torch import nn

from lightning_meansparse.sites import find_sites

IMAGES = torch.rand(2, 3, 8, 8)  # nets below have 8 channels: sizes cannot tell the axis


def found(model: nn.Module, example: Any = IMAGES, **options: Any) -> dict[str, tuple[int, ...]]:
    return {str(site): site.shape for site in find_sites(model, example, **options)}


def roles(model: nn.Module, example: Any = IMAGES, **options: Any) -> dict[str, str]:
    return {str(site): site.role for site in find_sites(model, example, **options)}


class Net(nn.Module):
    """A network from its parts and a function of (network, image features after a convolution)."""

    def __init__(self, code, **parts):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        for name, part in parts.items():
            setattr(self, name, part)
        self.code = code

    def forward(self, x):
        return self.code(self, self.stem(x))


class Wrapped(nn.Module):
    """A part with a class of its own, for names and owners."""

    def __init__(self, code, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.code = code

    def forward(self, *args, **kwargs):
        return self.code(self, *args, **kwargs)
