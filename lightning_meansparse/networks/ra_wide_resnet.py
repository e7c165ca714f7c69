"""RaWideResNet-101-2 for ImageNet."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

from lightning_meansparse.networks.activations import Activation, make_activation
from lightning_meansparse.networks.facts import check_stages, initialise

__all__ = ["RaWideResNet"]

default_cfgs = generate_default_cfgs(
    {
        "ra_wide_resnet101_2.imagenet": {
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stem.stem.stem.0",
            "classifier": "fc",
        }
    }
)


class RaWideResNet(nn.Module):
    """A wide bottleneck ResNet built by the robust principles of [1].

    The published checkpoint also has the normalisation (`normalization.mean` and `.std`), which is
    not this network's business: loading it leaves that off if it is ImageNet's, else fails.

    A 7x7 convolution of stride 2, norm and ReLU; stages of bottleneck blocks, each of which halves
    the resolution; the mean over space and one linear layer. In a block, the first convolution has
    no norm after it, and squeeze-excitation stands before the last. Residual sums go into the
    activations `…last_activation`.

    [1] Peng et al., Robust Principles: Architectural Design Principles for Adversarially Robust
        CNNs, arXiv 2308.16258.

    Args:
        depths: Blocks in each stage.
        widths: Channels of each stage.
        stem_width: Channels of the first convolution.
        bottleneck: Channels inside a block, as a part of the stage's.
        group_widths: Channels of each group of the 3x3 convolutions, per stage.
        se_ratio: Channels of the squeeze, as a part of the block's input.
        act_layer: Name of the blocks' activation, or what makes one.
        num_classes: Number of logits.
        in_chans: Channels of the images.

    Shapes:
        normalised images `(N, in_chans, H, W)` to logits `(N, num_classes)`.

    Examples:
        >>> import torch
        >>> net = RaWideResNet((1, 1), (32, 64), 16, group_widths=(8, 16), num_classes=5)
        >>> net(torch.rand(2, 3, 64, 64)).shape
        torch.Size([2, 5])
    """

    def __init__(
        self,
        depths: Sequence[int] = (7, 11, 18, 1),
        widths: Sequence[int] = (512, 1024, 2016, 4032),
        stem_width: int = 96,
        *,
        bottleneck: float = 0.25,
        group_widths: Sequence[int] = (64, 128, 252, 504),
        se_ratio: float = 0.25,
        act_layer: Activation = "silu",
        num_classes: int = 1000,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        check_stages(depths=depths, widths=widths, group_widths=group_widths)
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, widths[-1]
        self.stem = _Stem(in_chans, stem_width)
        self.stages = nn.Sequential()
        before = stem_width
        for index, (depth, width, group_width) in enumerate(
            zip(depths, widths, group_widths, strict=True), start=1
        ):
            stage = nn.Sequential()
            for block in range(depth):
                inner = round(width * bottleneck)
                layers = _Block(
                    before, inner, width, 1 if block else 2, group_width, se_ratio, act_layer
                )
                stage.add_module(f"stage{index}-block{block}", layers)
                before = width
            self.stages.add_module(f"stage{index}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(before, num_classes)
        self.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
            _without_normalisation
        )
        initialise(self)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last feature map `(N, num_features, h, w)` of normalised images."""
        features: Tensor = self.stages(self.stem(images))
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `(N, num_classes)` of normalised images `(N, in_chans, H, W)`."""
        logits: Tensor = self.fc(self.avgpool(self.forward_features(images)).flatten(1))
        return logits


class _Stem(nn.Module):
    """Convolution, norm and ReLU, at the depth that the names of the parameters have."""

    def __init__(self, in_chans: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential()
        self.stem.add_module("stem", _layers(in_chans, width, 7, stride=2, act_layer="relu"))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.stem(x)
        return out


class _Block(nn.Module):
    def __init__(
        self,
        before: int,
        inner: int,
        width: int,
        stride: int,
        group_width: int,
        se_ratio: float,
        act_layer: Activation,
    ) -> None:
        super().__init__()
        self.proj = None
        if stride != 1 or before != width:
            self.proj = _layers(before, width, 1, stride=stride)
        groups = inner // group_width
        parts: list[tuple[str, nn.Module]] = [
            ("a", _layers(before, inner, 1, norm=False, act_layer=act_layer)),
            ("b", _layers(inner, inner, 3, stride=stride, groups=groups, act_layer=act_layer)),
            ("se", SqueezeExcitation(inner, round(se_ratio * before))),
            ("c", _layers(inner, width, 1)),
        ]
        self.F = nn.Sequential(OrderedDict(parts))
        self.last_activation = make_activation(act_layer)

    def forward(self, x: Tensor) -> Tensor:
        total = (x if self.proj is None else self.proj(x)) + self.F(x)
        out: Tensor = self.last_activation(total)
        return out


def _layers(
    before: int,
    width: int,
    kernel: int,
    *,
    stride: int = 1,
    groups: int = 1,
    norm: bool = True,
    act_layer: Activation | None = None,
) -> nn.Sequential:
    """Convolution, norm and perhaps an activation; the names count all three."""
    conv = nn.Conv2d(
        before, width, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False
    )
    layers = nn.Sequential(conv, nn.BatchNorm2d(width) if norm else nn.Identity())
    if act_layer is not None:
        layers.append(make_activation(act_layer))
    return layers


def _without_normalisation(
    module: nn.Module, state: dict[str, Any], prefix: str, *report: Any
) -> None:
    for name, numbers in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        found = state.pop(f"{prefix}normalization.{name}", None)
        if found is not None and found.tolist() != torch.tensor(numbers).tolist():
            report[-1].append(f"{prefix}normalization.{name} is {found.tolist()}, not {numbers}")


@register_model
def ra_wide_resnet101_2(pretrained: bool = False, **options: Any) -> RaWideResNet:
    """RaWideResNet-101-2 for ImageNet."""
    name = "ra_wide_resnet101_2"
    model: RaWideResNet = build_model_with_cfg(RaWideResNet, name, pretrained, **options)
    return model
