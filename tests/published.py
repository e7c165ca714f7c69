"""Published networks by hand: the authors' operator, built into copies of our base networks.

A copy's `state_dict` has the keys of the published checkpoints, and its forward is written out
here, with the operators amid the code as the authors have them. Nothing of `surgery` is used.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional


class Operator(nn.Module):
    """The published operator, in eval mode, for channels on one axis."""

    def __init__(self, channels: int, axis: int = 1, *, extras: bool = False) -> None:
        super().__init__()
        self.axis = axis
        numbers = {
            "running_mean": 0.3 * torch.randn(channels),
            "running_var": torch.rand(channels) + 0.1,
            "threshold": 0.2 + 0.4 * torch.rand(()),
            "flag_update_statistics": torch.tensor(0),
            "batch_num": torch.tensor(98.0),
        }
        if extras:
            numbers |= {"momentum": torch.tensor(0.1), "epsilon": torch.tensor(1e-10)}
        for name, value in numbers.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        shape = [1] * x.ndim
        shape[self.axis] = -1
        mean = self.running_mean.view(shape)
        crop = self.threshold * torch.sqrt(self.running_var).view(shape)
        if self.threshold == 0:
            return x
        return torch.where(torch.abs(x - mean) < crop, mean * torch.ones_like(x), x)


class Normalised(nn.Sequential):
    """The wrapper of the published ImageNet models, whose keys begin with normalize. or model."""

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.normalize = nn.Module()
        self.normalize.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.normalize.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x - self.normalize.mean) / self.normalize.std)


def wide_resnet(base: nn.Module) -> nn.Module:
    """WideResNet and RaWideResNet for CIFAR."""
    net = copy.deepcopy(base)

    class Block(type(net.layer[0].block[0])):
        def forward(self, x: Tensor) -> Tensor:
            out = self.relu_0(self.meansparse_0(self.batchnorm_0(x)))
            if self.shortcut is not None:
                x = self.shortcut(out)
            out = self.conv_0(functional.pad(out, self.padding))
            out = self.conv_1(self.relu_1(self.meansparse_1(self.batchnorm_1(out))))
            if self.se is not None:
                out = self.se(out)
            return self.meansparse_2(x + out)

    class Net(type(net)):
        def forward(self, x: Tensor) -> Tensor:
            x = self.layer(self.init_conv(x))
            x = self.relu(self.meansparse_end(self.batchnorm(x)))
            return self.logits(functional.avg_pool2d(x, 8).view(len(x), -1))

    for group in net.layer:
        for block in group.block:
            block.__class__ = Block
            block.meansparse_0 = Operator(block.conv_0.in_channels)
            block.meansparse_1 = Operator(block.conv_0.out_channels)
            block.meansparse_2 = Operator(block.conv_1.out_channels)
    net.__class__ = Net
    net.meansparse_end = Operator(net.num_features)
    return net


def wide_resnet_activations(base: nn.Module) -> nn.Module:
    """The same with an operator and the activation in each activation's place."""
    net = copy.deepcopy(base)
    for group in net.layer:
        for block in group.block:
            block.relu_0 = nn.Sequential(Operator(block.conv_0.in_channels), block.relu_0)
            block.relu_1 = nn.Sequential(Operator(block.conv_0.out_channels), block.relu_1)
    net.relu = nn.Sequential(Operator(net.num_features), net.relu)
    return net


def ra_wide_resnet(base: nn.Module) -> nn.Module:
    """RaWideResNet for ImageNet, which normalises inside: its keys have normalization.mean."""
    net = copy.deepcopy(base)
    for layers in (
        net.stem.stem.stem,
        *(getattr(b.F, x) for s in net.stages for b in s for x in "ab"),
    ):
        layers[2] = nn.Sequential(Operator(layers[0].out_channels, extras=True), layers[2])
    net.normalization = nn.Module()
    net.normalization.register_buffer("mean", torch.tensor((0.485, 0.456, 0.406)))
    net.normalization.register_buffer("std", torch.tensor((0.229, 0.224, 0.225)))

    class Net(type(net)):
        def forward(self, x: Tensor) -> Tensor:
            mean, std = (value[None, :, None, None] for value in self.normalization.buffers())
            return super().forward(x.sub(mean).div(std))

    net.__class__ = Net
    return net


def convnext(base: nn.Module) -> nn.Module:
    """ConvNeXt of timm: before the activation, and after the drop path."""
    net = copy.deepcopy(base)
    for block in (block for stage in net.stages for block in stage.blocks):
        hidden, width = block.mlp.fc1.out_features, block.mlp.fc2.out_features
        block.mlp.act = nn.Sequential(Operator(hidden, -1, extras=True), block.mlp.act)
        block.drop_path = nn.Sequential(block.drop_path, Operator(width, extras=True))
    return Normalised(net, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def swin(base: nn.Module) -> nn.Module:
    """Swin of timm: in the MLP on both sides of its second layer, and after both sums."""
    net = copy.deepcopy(base)
    first = net.layers[0].blocks[0]

    class Mlp(type(first.mlp)):
        def forward(self, x: Tensor) -> Tensor:
            x = self.act(self.meansparse1(self.fc1(x)))
            return self.meansparse2(self.fc2(x))

    class Block(type(first)):
        def forward(self, x: Tensor) -> Tensor:
            shape = x.shape
            x = x + self._attn(self.norm1(x))
            x = self.meansparse1(x.reshape(shape[0], -1, shape[-1]))
            x = self.meansparse2(x + self.mlp(self.norm2(x)))
            return x.reshape(shape)

    for block in (block for stage in net.layers for block in stage.blocks):
        hidden, width = block.mlp.fc1.out_features, block.mlp.fc2.out_features
        block.__class__, block.mlp.__class__ = Block, Mlp
        block.mlp.meansparse1, block.mlp.meansparse2 = Operator(hidden, -1), Operator(width, -1)
        block.meansparse1, block.meansparse2 = Operator(width, -1), Operator(width, -1)
    return Normalised(net, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
