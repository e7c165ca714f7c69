"""Images of one size as one array, in memory or decoded when asked for.

Pixels are kept as they are stored (uint8, uint16 or float32) and become float32 in [0, 1] batch by
batch: a quarter of the memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torchvision.transforms.v2 import functional as V

from lightning_meansparse.data.parts import Rows

Array = npt.NDArray[Any]
Size = tuple[int, int]
Coded = Mapping[str, Any] | None
CHUNK = 1024


class Pixels(Protocol):
    """Images by row: `read(rows)` gives them as `(n, C, H, W)`, as stored."""

    def __len__(self) -> int:
        """Return the number of images."""

    def read(self, rows: Rows) -> Array:
        """Return the images at `rows` as an array `(n, C, H, W)` of uint8, uint16 or float32."""


Fit = Callable[[Array], Array]
"""Images `(N, C, H, W)` to images of one wanted size, such as `resized`."""


@dataclass(frozen=True)
class StoredPixels:
    """Images in memory.

    Args:
        array: `(N, C, H, W)`, uint8, uint16 or float32.
        fit: Brings them to size when they are read; None keeps them.
    """

    array: Array
    fit: Fit | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.array)

    def read(self, rows: Rows) -> Array:
        """Return the images at `rows`."""
        taken = np.take(self.array, rows, axis=0)
        return taken if self.fit is None else self.fit(taken)


@dataclass(frozen=True)
class Decoder:
    """From an image as data sets store it to an array.

    Args:
        open: Decodes a mapping such as `{"bytes": …, "path": …}` with Pillow.
        channels: Convert every image to 1, 3 or 4 channels; None keeps what is stored.
        fit: Brings images to size; None keeps what is stored.
    """

    open: Callable[[Mapping[str, Any]], Image.Image]
    channels: int | None
    fit: Fit | None

    def __call__(self, coded: Coded, where: str) -> Array:
        """Return one image `(C, H, W)`; `where` names it for errors."""
        array = decoded(self.opened(coded, where), self.channels, where=where)
        return array if self.fit is None else self.fit(array[None])[0]

    def opened(self, coded: Coded, where: str) -> Image.Image:
        """Decode an image; whatever Pillow says of broken files becomes an error that names it."""
        try:
            if coded is None:
                raise OSError("there is none")
            image = self.open(coded)
            image.load()
            return image
        except Exception as error:  # of many kinds: OSError, SyntaxError, struct.error, …
            path = None if coded is None else coded.get("path")
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if isinstance(error, UnidentifiedImageError):  # which shows an address in memory
                reason = "it is no image of a kind that Pillow knows"
            raise CorruptImageError(
                f"{where}{f' ({path})' if path else ''} cannot be decoded: {reason}. Repair it or "
                "remove it, or leave such images out by skip_corrupt=True"
            ) from error


@dataclass(frozen=True)
class CodedPixels:
    """Images that are decoded when asked for.

    Args:
        fetch: Gives the images at these rows, as the data set stores them.
        decode: Decodes one.
        count: Number of images.
        where: The split, for errors.
        expected: `(C, H, W)` that every image must have; None until the first is known.
    """

    fetch: Callable[[Rows], Sequence[Coded]]
    decode: Decoder
    count: int
    where: str
    expected: tuple[int, ...] | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return self.count

    def read(self, rows: Rows) -> Array:
        """Return the images at `rows`.

        Raises:
            ValueError: If one cannot be decoded, if they differ in size or channels among each
                other or from `expected`, or an image is of a kind without an agreed value range.
        """
        arrays = []
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            for row, coded in zip(chunk, self.fetch(chunk), strict=True):
                arrays.append(self.decode(coded, f"image {row} of {self.where}"))
        shapes = Counter(array.shape for array in arrays)
        if self.expected is not None:
            shapes.setdefault(self.expected, 0)
        if len(shapes) > 1:
            raise ValueError(_mixed(shapes, self.where))
        # An image of another depth among them is no error: 8 and 16 bits meet in float32.
        depths = {array.dtype for array in arrays}
        return np.stack(arrays if len(depths) == 1 else [_unit(array) for array in arrays])

    def corrupt(self) -> Rows:
        """Look at every image, and return the rows of those that cannot be decoded."""
        bad = []
        for start in range(0, self.count, CHUNK):
            chunk = np.arange(start, min(start + CHUNK, self.count))
            for row, coded in zip(chunk, self.fetch(chunk), strict=True):
                try:
                    self.decode.opened(coded, "")
                except CorruptImageError:
                    bad.append(row)
        return np.array(bad, np.int64)


def in_memory(pixels: Pixels, rows: Rows, limit: int) -> tuple[Pixels, Rows]:
    """Decode and fit the images at `rows` once for all if they take at most `limit` bytes.

    Returns:
        The pixels and where each of `rows` is in them.
    """
    if isinstance(pixels, StoredPixels) and pixels.fit is None:
        return pixels, rows
    first = pixels.read(rows[:1])
    if first.nbytes * len(rows) <= limit:
        # All at once, not by chunks, so that an error can count all sizes.
        return StoredPixels(pixels.read(rows)), np.arange(len(rows))
    if isinstance(pixels, CodedPixels):
        pixels = replace(pixels, expected=first.shape[1:])
    return pixels, rows


class CorruptImageError(ValueError):
    """An image that cannot be decoded."""


def decoded(image: Image.Image, channels: int | None, *, where: str) -> Array:
    """Turn a Pillow image into `(C, H, W)`, uint8 or uint16, with 1 to 4 channels.

    Palette images become RGB (RGBA if they have transparency), bilevel ones grey; 16 bits stay.

    Args:
        image: Of any mode that Pillow knows.
        channels: 1, 3 or 4 to convert; None to keep the image's own.
        where: Which image, for errors.

    Raises:
        ValueError: For modes without an agreed range (32-bit integers, floats) or colour space
            (CMYK, LAB, …) unless that one converts safely, and for transparency that would be lost.

    Examples:
        >>> decoded(Image.new("P", (28, 20)), None, where="image 0").shape
        (3, 20, 28)
    """
    mode = image.mode
    if mode in ("1", "P", "PA"):
        keeps = "RGBA" if mode == "PA" or "transparency" in image.info else "RGB"
        image = image.convert("L" if mode == "1" else keeps)
    elif mode in ("CMYK", "YCbCr"):
        image = image.convert("RGB")
    elif mode not in ("L", "LA", "RGB", "RGBA", "I;16", "I;16L", "I;16B"):
        raise ValueError(
            f"{where} has Pillow's mode {mode!r}, whose values have no agreed range; convert it to "
            "8 or 16 bits per channel first"
        )
    if channels is not None and channels != len(image.getbands()):
        image = _converted(image, channels, where)
    # Pillow's array of big-endian 16 bits has that byte order; the cast makes it native.
    array = np.asarray(image)
    array = array.astype(np.uint16 if array.dtype.itemsize == 2 else np.uint8, copy=False)
    return array[None] if array.ndim == 2 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _converted(image: Image.Image, channels: int, where: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        raise ValueError(f"{where} is grey with 16 bits; only channels=1 or None can keep them")
    if image.mode in ("LA", "RGBA") and channels != 4:
        lowest, _ = image.getchannel("A").getextrema()
        if lowest != 255:
            raise ValueError(
                f"{where} has transparent pixels, whose colour channels={channels} would invent; "
                "put the images on a background first, or take channels=4"
            )
    return image.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])


def resized(images: Array, size: Size) -> Array:
    """Resize `(N, C, H, W)` so that the whole of `size` is covered, then cut out the centre.

    Bicubic with antialiasing; the aspect ratio stays. 16-bit images become float32.

    Examples:
        >>> resized(np.zeros((2, 1, 28, 40), np.uint8), (14, 14)).shape
        (2, 1, 14, 14)
    """
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    scale = max(size[0] / height, size[1] / width)
    inner = [max(size[0], round(height * scale)), max(size[1], round(width * scale))]
    tensor = torch.from_numpy(_unit(images) if images.dtype == np.uint16 else images)
    parts = []
    for chunk in torch.split(tensor, CHUNK):
        enlarged = V.resize(chunk, inner, V.InterpolationMode.BICUBIC, antialias=True)
        cut = V.center_crop(enlarged, list(size))
        # Bicubic overshoots at edges; integers are clamped by torchvision.
        parts.append(cut.clamp(0, 1) if cut.is_floating_point() else cut)
    result: Array = torch.cat(parts).numpy()
    return result


def to_unit(images: Array) -> Tensor:
    """Turn stored pixels into a float32 tensor in [0, 1]: `k / 255`, `k / 65535`, or as they are.

    Examples:
        >>> to_unit(np.array([0, 51, 255], np.uint8))
        tensor([0.0000, 0.2000, 1.0000])
    """
    return torch.from_numpy(_unit(images))


def _unit(images: Array) -> npt.NDArray[np.float32]:
    if images.dtype == np.float32:
        return images
    floats = images.astype(np.float32)
    return np.divide(floats, np.float32(np.iinfo(images.dtype).max), out=floats)


def _mixed(shapes: Counter[tuple[int, ...]], where: str) -> str:
    counts = dict(shapes.most_common(5))
    if len({shape[0] for shape in shapes}) > 1:
        found = ", ".join(f"{c} channels in {n} images" for (c, _, _), n in counts.items())
        return f"images of {where} differ in channels ({found}); give channels=1, 3 or 4 to convert"
    found = ", ".join(f"{h}x{w} in {n} images" for (_, h, w), n in counts.items())
    more = f" and {len(shapes) - 5} more" if len(shapes) > 5 else ""
    return (
        f"images of {where} differ in height x width ({found}{more}); give size= to resize "
        "and crop them to one"
    )
