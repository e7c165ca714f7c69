"""What an image processor of transformers does to pixels, found by showing it flat images.

Its fields tell only half: `include_top` of EfficientNet's divides by the deviation once more,
PP-LCNet's swaps red and blue without a field for it, and what a file leaves out is up to the class.
Resizing and cropping leave a flat image flat, so three of them tell what becomes of any pixel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

_SIDE = 67  # no model's size, so that what comes out tells whether images are resized
_LEVELS = (51, 102, 204, 153)


class UnknownNormalisationError(ValueError):
    """Nothing says how the pixels of a model are normalised."""


@dataclass(frozen=True)
class Pixels:
    """A processor as `(pixels - mean) / std` of pixels in [0, 1].

    Args:
        mean: Per channel, in the order in which the model takes them.
        std: Per channel, in the same order.
        bgr: The model takes blue first.
        size: `(C, H, W)`; None if images keep their size.
    """

    mean: list[float]
    std: list[float]
    bgr: bool
    size: tuple[int, int, int] | None


def measure(processor: Any, channels: int) -> Pixels:
    """Find out what a processor does to pixels.

    Args:
        processor: An image processor of transformers.
        channels: Channels of the images.

    Raises:
        ValueError: If it gives no image, or does anything that mean and std cannot express.
    """
    levels = np.array((_LEVELS * channels)[:channels], dtype=np.uint8)
    black, white, colour = (
        _shown(processor, flat) for flat in (levels * 0, levels * 0 + 255, levels)
    )
    middle = (slice(None), black.shape[1] // 2, black.shape[2] // 2)  # padding is at the borders
    low, high, seen = (image[middle].astype(np.float64) for image in (black, white, colour))
    if not bool((high - low > 0).all()):
        raise ValueError("white does not come out of it as more than black")
    wanted, found = levels / 255, (seen - low) / (high - low)
    bgr = not np.allclose(found, wanted, atol=1e-3)
    if bgr and not np.allclose(found, wanted[::-1], atol=1e-3):
        raise ValueError("what it does to pixels is no subtraction and division per channel")
    shape = (channels, *black.shape[1:])
    return Pixels(
        _rounded(-low / (high - low), getattr(processor, "image_mean", None)),
        _rounded(1 / (high - low), getattr(processor, "image_std", None)),
        bgr,
        None if shape[1:] == (_SIDE, _SIDE) else shape,
    )


def _shown(processor: Any, colour: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """What becomes of an image `(H, W, C)` of one colour: `(C, H, W)`."""
    image = np.broadcast_to(colour, (_SIDE, _SIDE, len(colour))).copy()
    given = processor(images=[image], input_data_format="channels_last", return_tensors="np")
    pixels: np.ndarray[Any, Any] = np.asarray(given.get("pixel_values", 0))
    if pixels.ndim != 4 or pixels.shape[:2] != (1, len(colour)):
        got = f"pixel_values of shape {pixels.shape}" if pixels.ndim else ", ".join(given)
        raise ValueError(f"it makes no image (1, {len(colour)}, H, W) of an image, but {got}")
    shown: np.ndarray[Any, Any] = pixels[0]
    return shown


def _rounded(measured: np.ndarray[Any, Any], declared: Any) -> list[float]:
    """The declared numbers where they are what was measured, else these to seven digits."""
    if declared is not None:
        numbers = np.asarray(declared, dtype=np.float64).ravel()
        if numbers.size in (1, measured.size) and np.allclose(measured, numbers, 1e-5, 1e-6):
            return [float(number) for number in np.broadcast_to(numbers, measured.shape)]
    return [float(f"{number:.7g}") + 0.0 for number in measured]
