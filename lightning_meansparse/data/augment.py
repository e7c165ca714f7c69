"""What varies training images; validation, test and calibration never see it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Augment = Callable[[Tensor], Tensor]


class CropFlip:
    """Pad with black by an eighth of the side, crop at random, mirror half of the images.

    The usual augmentation of CIFAR-sized images (4 pixels at 32x32). It is torchvision's RandomCrop
    and RandomHorizontalFlip with an own draw per image, for a whole batch in one indexing step: one
    call per image would take longer than a small network's forward.

    Shapes:
        `(N, C, H, W)` to the same.

    Examples:
        >>> CropFlip()(torch.rand(5, 3, 32, 32)).shape
        torch.Size([5, 3, 32, 32])
    """

    def __call__(self, images: Tensor) -> Tensor:
        """Return a varied copy of `images`; draws from torch's global generator."""
        n, _, height, width = images.shape
        down, right = round(height / 8), round(width / 8)
        padded = F.pad(images, (right, right, down, down))
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        top = torch.randint(windows.shape[2], (n,))
        left = torch.randint(windows.shape[3], (n,))
        cropped = windows[torch.arange(n), :, top, left]
        mirrored = torch.rand(n, 1, 1, 1) < 0.5
        return torch.where(mirrored, cropped.flip(-1), cropped)


class PerImage:
    """Apply a transform of one image `(C, H, W)` to each of a batch, and check what it gives.

    Args:
        transform: For instance any transform of `torchvision.transforms.v2`.
    """

    def __init__(self, transform: Augment) -> None:
        self.transform = transform

    def __call__(self, images: Tensor) -> Tensor:
        """Return the transformed images `(N, C, H', W')`.

        Raises:
            ValueError: If the transform leaves [0, 1], as Normalize does, or gives something else
                than an image with as many channels.
        """
        varied = [self.transform(image) for image in images]
        for image in varied:
            shape = tuple(getattr(image, "shape", ()))
            if shape[:-2] != tuple(images.shape[1:2]):
                raise ValueError(
                    f"augment={self.transform!r} must turn a float image {tuple(images.shape[1:])} "
                    f"into one with as many channels, got a {type(image).__name__} {shape}"
                )
        stacked = torch.stack(varied)
        low, high = (value.item() for value in stacked.aminmax())
        if not stacked.is_floating_point() or not (low >= 0 and high <= 1):
            raise ValueError(
                f"augment={self.transform!r} must keep pixels as floats in [0, 1], got "
                f"{stacked.dtype} in [{low:.3g}, {high:.3g}]; leave normalisation to the classifier"
            )
        return stacked


def resolve_augment(augment: bool | str | Augment) -> Augment | None:
    """Turn the `augment` argument into a function of a batch, or None for no augmentation.

    Args:
        augment: False; True for `CropFlip`; a callable on one image `(C, H, W)`; or the import path
            of one (a class is built without arguments).

    Raises:
        TypeError: If it is none of these.
        ValueError: If the path cannot be imported.
    """
    if augment is False:
        return None
    if augment is True:
        return CropFlip()
    transform: Any = _imported(augment) if isinstance(augment, str) else augment
    if not callable(transform):
        raise TypeError(
            "augment must be True, False, a callable on one image or its import path, "
            f"got {augment!r}"
        )
    return transform if isinstance(transform, CropFlip) else PerImage(transform)


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"augment={path!r} cannot be imported ({error}); give a path such as "
            "'torchvision.transforms.v2.RandAugment'"
        ) from error
    return found() if isinstance(found, type) else found
