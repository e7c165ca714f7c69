"""The networks of the paper's CIFAR tables and of the published checkpoints, in timm's registry.

After `import lightning_meansparse.networks`, `timm.create_model` makes them by name, and
`load_classifier("timm/NAME", pretrained=False)` does so without that import. They take normalised
images, as timm's models do: the normalisation stands in `pretrained_cfg`, and a `Classifier`
applies it. Names of parameters and buffers are those of the published checkpoints. Every activation
is a module of its own, called once, and every residual sum goes into an activation or out of a
block, so that hooks reach all of these places.

| Name | Architecture | Tags |
|---|---|---|
| `resnet18_cifar` | ResNet-18 for 32x32 images | `cifar10`, `cifar100` |
| `wide_resnet28_10`, `70_16`, `82_8`, `94_16` | WideResNet-D-W, pre-activation | the same |
| `ra_wide_resnet70_16` | RaWideResNet-70-16 for 32x32 images | the same |
| `ra_wide_resnet101_2` | RaWideResNet-101-2 for ImageNet | `imagenet` |

The first tag is the default; a tag sets the normalisation and the number of classes. Further
arguments of `timm.create_model` change the architecture: `act_layer` all of them, `depth` and
`width` the WideResNets, `depths`, `widths` and `stem_width` the RaWideResNets, `depths` and `width`
the ResNet.

Examples:
    >>> import timm, torch
    >>> import lightning_meansparse.networks
    >>> net = timm.create_model("wide_resnet70_16.cifar100", depth=10, width=1)
    >>> net(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 100])
"""

from __future__ import annotations

from lightning_meansparse.networks.activations import PSSiLU
from lightning_meansparse.networks.cifar_resnet import CifarResNet
from lightning_meansparse.networks.ra_wide_resnet import RaWideResNet
from lightning_meansparse.networks.wide_resnet import WideResNet

__all__ = ["CifarResNet", "PSSiLU", "RaWideResNet", "WideResNet"]
