"""A small sparsified network and helpers, for the tests of adapters."""

import copy
import json
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_meansparse.adapter.files import CONFIG_NAME
from lightning_meansparse.sites import Site
from lightning_meansparse.surgery import (
    alphas,
    calibrate_,
    operators,
    restore_,
    sparsify_,
)

SITES = (Site("act1", "in", (4, 1, 1)), Site("act2", "in", (5, 1, 1)))


class Net(nn.Module):
    """Two convolutions and a BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.act1 = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.act2, self.head = nn.Conv2d(4, 5, 3), nn.GELU(), nn.Linear(5, 3)

    def forward(self, x):
        x = self.act1(self.bn(self.conv1(x)))
        return self.head(self.act2(self.conv2(x)).mean((2, 3)))


def exact():
    """A network whose weights are the same bits everywhere, and images that are."""
    net = Net().eval()

    def numbers(shape, top):
        return (torch.arange(shape.numel()) * 7 % top).view(shape)

    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.is_floating_point():
                eighths = (numbers(value.shape, 13) - 6) / 8
                value.copy_(eighths.abs() if "var" in name else eighths)
    return net, (torch.arange(16 * 64) * 5 % 17 / 16).view(16, 1, 8, 8)


class Wrapper(LightningModule):
    """A module around a network, with a metric-like child that has no parameters."""

    def __init__(self, net):
        super().__init__()
        self.loss = nn.CrossEntropyLoss()
        self.net = net

    def forward(self, x):
        return self.net(x)


def sparse(net=None, center="channel"):
    net = (net or Net()).eval()
    sparsify_(net, SITES, alpha=0.2, center=center)
    calibrate_(net, [torch.randn(16, 1, 8, 8)])
    return net


def base_of(net):
    twin = copy.deepcopy(net)
    restore_(twin)
    return twin


def assert_same(a, b):
    assert alphas(a) == alphas(b)
    for one, other in zip(operators(a).values(), operators(b).values(), strict=True):
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.var, other.var)
        assert torch.equal(one.alpha, other.alpha)
        assert one.center == other.center
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(a(x), b(x))


def edit(folder, change):
    """Rewrite a config after ``change`` was applied to it."""
    path = Path(folder) / CONFIG_NAME
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
