"""The images of one part of a split, in order, by number."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from lightning_meansparse.data.augment import Augment
from lightning_meansparse.data.parts import Rows
from lightning_meansparse.data.pixels import CodedPixels, Pixels, in_memory, to_unit

Part = Literal["train", "holdout", "test"]
_HASHED = 1024  # images per part that the fingerprint looks at when they are not in memory


class ImagePart(Dataset[tuple[Tensor, int]]):
    """One part of a data set: item i is `(image float32 (C, H, W) in [0, 1], label)`.

    Args:
        pixels: Images of the split, all or those in use.
        places: Where in `pixels` the images are, in order, `(n,)`.
        rows: Which rows of the split they are, in order, `(n,)`.
        labels: Their labels, `(n,)`.
        augment: Varies a batch `(n, C, H, W)`; None for none.
    """

    def __init__(
        self,
        pixels: Pixels,
        places: Rows,
        rows: Rows,
        labels: Rows,
        *,
        augment: Augment | None = None,
    ) -> None:
        self.pixels = pixels
        self.places = places
        self.rows = rows
        self.labels = labels
        self.augment = augment

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return one image and its label."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Tensor, int]]:
        """Return several items; a DataLoader asks for a whole batch with this, read in one step."""
        images = to_unit(self.pixels.read(self.places[indices]))
        if self.augment is not None:
            images = self.augment(images)
        return list(zip(images.unbind(), self.labels[indices].tolist(), strict=True))


def parts_of(
    pixels: Pixels, labels: Rows, rows: Mapping[Part, Rows], memory: int
) -> dict[Part, ImagePart]:
    """Make parts of one split, decoded into memory when they take at most so many bytes."""
    used = np.concatenate(list(rows.values()))
    pixels, places = in_memory(pixels, used, memory)
    ends = np.cumsum([len(part) for part in rows.values()])
    return {
        name: ImagePart(pixels, places[end - len(part) : end], part, labels[part])
        for (name, part), end in zip(rows.items(), ends, strict=True)
    }


def channels_of(parts: Mapping[Part, Any]) -> int:
    """Channels of the images, whose shape must be one in all parts."""
    first = {name: next(iter(part), None) for name, part in parts.items()}
    shapes = {name: item[0].shape for name, item in first.items() if item is not None}
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise ValueError(
            f"images differ in shape between splits ({found}); give size= or channels="
        )
    if "train" not in shapes:
        raise ValueError("the training part has no images")
    channels: int = shapes["train"][0]
    return channels


def fingerprint_of(parts: Mapping[Part, ImagePart]) -> str:
    """Hash labels and pixels, 12 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=6)
    for name, part in parts.items():
        digest.update(f"{name} {len(part)} ".encode() + part.labels.tobytes())
        seen = part.places[:_HASHED] if isinstance(part.pixels, CodedPixels) else part.places
        images = part.pixels.read(seen) if len(seen) else np.empty(0)
        digest.update(f"{images.shape} {images.dtype} ".encode() + images.tobytes())
    return digest.hexdigest()
