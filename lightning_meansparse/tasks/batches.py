"""Images and labels of one batch, in whichever of the usual forms a loader gives them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_meansparse.surgery import IMAGE_KEYS

LABELS = ("label", "labels")


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """Take images `(N, C, H, W)` and labels `(N,)` out of a batch.

    Args:
        batch: A tuple or list `(images, labels, …)`, or a dict with `"image"`, `"images"` or
            `"pixel_values"` and `"label"` or `"labels"`.

    Raises:
        TypeError: If it is neither.

    Examples:
        >>> import torch
        >>> images, labels = images_and_labels([torch.rand(2, 1, 4, 4), torch.tensor([0, 1])])
        >>> images.shape, labels.shape
        (torch.Size([2, 1, 4, 4]), torch.Size([2]))
    """
    pair: list[Any] = []
    if isinstance(batch, Mapping):
        pair = [
            next((batch[key] for key in keys if key in batch), None)
            for keys in (IMAGE_KEYS, LABELS)
        ]
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        pair = list(batch[:2])
    if len(pair) == 2 and isinstance(pair[0], Tensor) and isinstance(pair[1], Tensor):
        return pair[0], pair[1]
    got = type(batch).__name__
    if isinstance(batch, Mapping):
        got += f" with keys {sorted(map(str, batch))}"
    raise TypeError(
        f"a batch must be (images, labels) or a dict with one of {', '.join(IMAGE_KEYS)} and one "
        f"of {', '.join(LABELS)}, all tensors; got {got}. ImageDataModule gives such batches."
    )
