"""ResNet-18 for 32x32 images, with any activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional

from lightning_meansparse.networks.activations import Activation, make_activation
from lightning_meansparse.networks.facts import check_stages, cifar_cfgs, initialise

__all__ = ["CifarResNet"]

default_cfgs = generate_default_cfgs(
    cifar_cfgs("resnet18_cifar", first_conv="conv1", classifier="linear", pool_size=(4, 4))
)


class CifarResNet(nn.Module):
    """A post-activation ResNet whose stem keeps the resolution [1, Sec. 4.2].

    A 3x3 convolution, norm and activation, then stages of basic blocks with `width`, `2 width`,
    `4 width`, … channels, all but the first of which halve the resolution; the mean over space and
    one linear layer. Residual sums go into the activations `layerN.M.act2`.

    [1] He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, arXiv 1512.03385.

    Args:
        depths: Blocks in each stage.
        width: Channels of the first stage.
        act_layer: Name of an activation, or what makes one.
        num_classes: Number of logits.
        in_chans: Channels of the images.

    Shapes:
        normalised images `(N, in_chans, H, W)` to logits `(N, num_classes)`.

    Examples:
        >>> import torch
        >>> net = CifarResNet(depths=(1, 1), width=8, act_layer="pssilu")
        >>> net(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        *,
        act_layer: Activation = "relu",
        num_classes: int = 10,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        check_stages(depths=depths)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.stages = [f"layer{index + 1}" for index in range(len(depths))]
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = make_activation(act_layer)
        before = width
        for index, (name, depth) in enumerate(zip(self.stages, depths, strict=True)):
            here = width * 2**index
            blocks = []
            for block in range(depth):
                stride = 2 if index and not block else 1
                blocks.append(_BasicBlock(before, here, stride, act_layer))
                before = here
            self.add_module(name, nn.Sequential(*blocks))
        self.num_features = before
        self.linear = nn.Linear(before, num_classes)
        initialise(self)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last feature map `(N, num_features, h, w)` of normalised images."""
        x: Tensor = self.act1(self.bn1(self.conv1(images)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `(N, num_classes)` of normalised images `(N, in_chans, H, W)`."""
        x = self.forward_features(images)
        logits: Tensor = self.linear(functional.avg_pool2d(x, x.shape[-2:]).flatten(1))
        return logits


class _BasicBlock(nn.Module):
    def __init__(self, before: int, width: int, stride: int, act_layer: Activation) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = make_activation(act_layer)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or before != width:
            self.shortcut.append(nn.Conv2d(before, width, 1, stride=stride, bias=False))
            self.shortcut.append(nn.BatchNorm2d(width))
        self.act2 = make_activation(act_layer)

    def forward(self, x: Tensor) -> Tensor:
        out = self.act1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out)) + self.shortcut(x)
        result: Tensor = self.act2(out)
        return result


@register_model
def resnet18_cifar(pretrained: bool = False, **options: Any) -> CifarResNet:
    """ResNet-18 for 32x32 images."""
    model: CifarResNet = build_model_with_cfg(CifarResNet, "resnet18_cifar", pretrained, **options)
    return model
