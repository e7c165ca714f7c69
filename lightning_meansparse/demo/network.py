"""The small network that the demo checkpoint holds: four times convolution, norm, GELU."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

__all__ = ["ConvNet"]


class ConvNet(nn.Module):
    """A small convolutional classifier with four activation sites.

    Four stages `conv 3x3 -> BatchNorm -> GELU` with `width`, `2 width`, `2 width`, `4 width`
    channels, of which all but the third halve the resolution; then the mean over space and one
    linear layer. At the default width this is 131,178 parameters and 3.9 M multiply-adds for a
    28x28 image: halving at the very first layer is what makes adversarial training (a dozen passes
    per step) affordable on two CPU cores.

    Args:
        in_chans: Channels of the input images.
        num_classes: Number of logits.
        width: Channels of the first stage.

    Shapes:
        images `(N, in_chans, H, W)`, any `H` and `W`, to logits `(N, num_classes)`.

    Raises:
        ValueError: If a size is smaller than one.

    Examples:
        >>> import torch
        >>> from lightning_meansparse.demo import ConvNet
        >>> ConvNet()(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
        >>> sum(parameter.numel() for parameter in ConvNet().parameters())
        131178
    """

    def __init__(self, in_chans: int = 1, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()
        for name, value in (("in_chans", in_chans), ("num_classes", num_classes), ("width", width)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.width = width
        self.stage1 = _stage(in_chans, width, stride=2)
        self.stage2 = _stage(width, 2 * width, stride=2)
        self.stage3 = _stage(2 * width, 2 * width, stride=1)
        self.stage4 = _stage(2 * width, 4 * width, stride=2)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `(N, num_classes)` of `images` `(N, in_chans, H, W)`."""
        features = self.stage4(self.stage3(self.stage2(self.stage1(images))))
        logits: Tensor = self.head(features.mean(dim=(2, 3)))
        return logits


def _stage(in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    """Convolution, norm and activation, under the names that the site names show."""
    # The norm brings its own shift, so a bias of the convolution would do nothing.
    conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
    layers: list[tuple[str, nn.Module]] = [
        ("conv", conv),
        ("norm", nn.BatchNorm2d(out_channels)),
        ("act", nn.GELU()),
    ]
    return nn.Sequential(OrderedDict(layers))
