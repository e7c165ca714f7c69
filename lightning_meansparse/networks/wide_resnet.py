"""WideResNet-D-W as used on the RobustBench leaderboard, and RaWideResNet for 32x32 images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.nn import functional
from torchvision.ops import SqueezeExcitation

from lightning_meansparse.networks.activations import Activation, make_activation
from lightning_meansparse.networks.facts import check_stages, cifar_cfgs, initialise

__all__ = ["WideResNet"]

_NAMES = (
    "wide_resnet28_10",
    "wide_resnet70_16",
    "wide_resnet82_8",
    "wide_resnet94_16",
    "ra_wide_resnet70_16",
)
_LAYERS = {"first_conv": "init_conv", "classifier": "logits", "pool_size": (8, 8)}
default_cfgs = generate_default_cfgs(
    {key: cfg for name in _NAMES for key, cfg in cifar_cfgs(name, **_LAYERS).items()}
)


class WideResNet(nn.Module):
    """A pre-activation ResNet, wide instead of deep [1], in the form of [2].

    A 3x3 convolution, three stages of blocks `norm -> activation -> conv3x3 -> norm -> activation
    -> conv3x3` of which the second and the third halve the resolution, norm, activation, the mean
    over space and one linear layer. Padding is that of TensorFlow's `SAME`. With `se_ratio` each
    block's result is weighted by squeeze-excitation before it is added: RaWideResNet [3].

    The residual sum of block `b` in stage `g` is its output, `layer.g.block.b`; the activations are
    `layer.g.block.b.relu_0`, `…relu_1` and, before the mean, `relu`, whatever they are.

    [1] Zagoruyko, Komodakis, Wide Residual Networks, arXiv 1605.07146.
    [2] Gowal et al., Uncovering the Limits of Adversarial Training against Norm-Bounded Adversarial
        Examples, arXiv 2010.03593.
    [3] Peng et al., Robust Principles, arXiv 2308.16258.

    Args:
        depths: Blocks in each stage; WideResNet-D has `(D - 4) / 6` in each of three.
        widths: Channels of each stage; WideResNet-D-W has `16 W, 32 W, 64 W`.
        stem_width: Channels of the first convolution.
        act_layer: Name of an activation, or what makes one.
        se_ratio: Channels of the squeeze, as a part of the block's; 0 for none.
        momentum: Of the norms' running statistics.
        num_classes: Number of logits.
        in_chans: Channels of the images.

    Shapes:
        normalised images `(N, in_chans, H, W)` to logits `(N, num_classes)`.

    Examples:
        >>> import torch
        >>> WideResNet(depths=(1, 1, 1), widths=(16, 32, 64))(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        depths: Sequence[int] = (4, 4, 4),
        widths: Sequence[int] = (160, 320, 640),
        stem_width: int = 16,
        *,
        act_layer: Activation = "silu",
        se_ratio: float = 0.0,
        momentum: float = 0.1,
        num_classes: int = 10,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        check_stages(depths=depths, widths=widths)
        self.num_classes, self.in_chans = num_classes, in_chans
        self.init_conv = nn.Conv2d(in_chans, stem_width, 3, padding=1, bias=False)
        self.layer = nn.Sequential()
        before = stem_width
        for index, (depth, width) in enumerate(zip(depths, widths, strict=True)):
            group = _Group()
            for block in range(depth):
                stride = 2 if index and not block else 1
                group.block.append(_Block(before, width, stride, act_layer, se_ratio, momentum))
                before = width
            self.layer.append(group)
        self.num_features = before
        self.batchnorm = nn.BatchNorm2d(before, momentum=momentum)
        self.relu = make_activation(act_layer)
        self.logits = nn.Linear(before, num_classes)
        initialise(self)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last feature map `(N, num_features, h, w)` of normalised images."""
        features: Tensor = self.relu(self.batchnorm(self.layer(self.init_conv(images))))
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `(N, num_classes)` of normalised images `(N, in_chans, H, W)`."""
        x = self.forward_features(images)
        logits: Tensor = self.logits(functional.avg_pool2d(x, x.shape[-2:]).flatten(1))
        return logits


class _Group(nn.Module):
    """A stage; the level that the names of the parameters have."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block(x)
        return out


class _Block(nn.Module):
    def __init__(
        self,
        before: int,
        width: int,
        stride: int,
        act_layer: Activation,
        se_ratio: float,
        momentum: float,
    ) -> None:
        super().__init__()
        self.batchnorm_0 = nn.BatchNorm2d(before, momentum=momentum)
        self.relu_0 = make_activation(act_layer)
        # `SAME` pads a stride of 2 on one side only, which Conv2d cannot: forward pads.
        self.padding = (0, 1, 0, 1) if stride == 2 else (1, 1, 1, 1)
        self.conv_0 = nn.Conv2d(before, width, 3, stride=stride, bias=False)
        self.batchnorm_1 = nn.BatchNorm2d(width, momentum=momentum)
        self.relu_1 = make_activation(act_layer)
        self.conv_1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.shortcut = None
        if stride != 1 or before != width:
            self.shortcut = nn.Conv2d(before, width, 1, stride=stride, bias=False)
        self.se = SqueezeExcitation(width, round(se_ratio * width)) if se_ratio else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu_0(self.batchnorm_0(x))
        # Where the shapes change, the shortcut begins after the first activation.
        residual = x if self.shortcut is None else self.shortcut(out)
        out = self.conv_0(functional.pad(out, self.padding))
        out = self.conv_1(self.relu_1(self.batchnorm_1(out)))
        if self.se is not None:
            out = self.se(out)
        total: Tensor = residual + out
        return total


def _build(name: str, pretrained: bool, options: dict[str, Any]) -> WideResNet:
    """Build from timm's options, in which `depth` and `width` mean WideResNet-D-W."""
    depth, width = options.pop("depth", None), options.pop("width", None)
    if depth is not None:
        if type(depth) is not int or depth < 10 or (depth - 4) % 6:
            raise ValueError(f"depth must be 10, 16, 22, 28, … (6 n + 4), got {depth!r}")
        options.setdefault("depths", ((depth - 4) // 6,) * 3)
    if width is not None:
        options.setdefault("widths", (16 * width, 32 * width, 64 * width))
    model: WideResNet = build_model_with_cfg(WideResNet, name, pretrained, **options)
    return model


@register_model
def wide_resnet28_10(pretrained: bool = False, **options: Any) -> WideResNet:
    """WideResNet-28-10."""
    return _build("wide_resnet28_10", pretrained, {"depth": 28, "width": 10} | options)


@register_model
def wide_resnet70_16(pretrained: bool = False, **options: Any) -> WideResNet:
    """WideResNet-70-16."""
    return _build("wide_resnet70_16", pretrained, {"depth": 70, "width": 16} | options)


@register_model
def wide_resnet82_8(pretrained: bool = False, **options: Any) -> WideResNet:
    """WideResNet-82-8."""
    return _build("wide_resnet82_8", pretrained, {"depth": 82, "width": 8} | options)


@register_model
def wide_resnet94_16(pretrained: bool = False, **options: Any) -> WideResNet:
    """WideResNet-94-16."""
    return _build("wide_resnet94_16", pretrained, {"depth": 94, "width": 16} | options)


@register_model
def ra_wide_resnet70_16(pretrained: bool = False, **options: Any) -> WideResNet:
    """RaWideResNet-70-16 for 32x32 images."""
    architecture = {
        "depths": (30, 31, 10),
        "widths": (216, 432, 864),
        "stem_width": 96,
        "se_ratio": 0.25,
        "momentum": 0.01,
    }
    return _build("ra_wide_resnet70_16", pretrained, architecture | options)
