"""torchattacks' Square attack with random numbers that do not depend on the batch.

Imported only when the attack is built, since its base class is torchattacks'.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_meansparse.attacks.library import load_torchattacks

_Square: Any = load_torchattacks().Square


class Square(_Square):  # type: ignore[misc]
    """Square attack (Andriushchenko et al., arXiv 1912.00049) as in torchattacks, for any batch.

    torchattacks draws the squares' places once for all samples, but the signs once per sample of
    the batch, so that a result depends on who else is in it. Here the signs are shared as well:
    each sample sees the same distribution as before, and a result depends on the seed and the
    sample alone.
    """

    def random_choice(self, shape: Sequence[int]) -> Tensor:
        """Random signs of ``shape``, with one draw for the whole batch."""
        shared = [1, *shape[1:]] if len(shape) == 4 else list(shape)
        signs: Tensor = super().random_choice(shared)
        return signs

    def random_int(self, low: int = 0, high: int = 1, shape: Sequence[int] = (1,)) -> Tensor:
        """A random place for a square; one larger than a narrow image starts at its edge."""
        place: Tensor = super().random_int(low, max(low, high), list(shape))
        return place

    def attack_single_run(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """One run, after a look at the shape of the images.

        Raises:
            ValueError: If torchattacks' grid of five tiles does not fit the images (L2 only).
        """
        height, width = x.shape[-2:]
        tile = height // 5
        if self.norm == "L2" and (
            height != width
            or tile == 0
            or (height - 5 * tile) // 2 + height // tile * tile > height
        ):
            raise ValueError(
                "under norm='L2' its tiles fit quadratic images of 25 pixels or more (and some "
                f"smaller ones), got {height} x {width}; leave it out, e.g. "
                "attacks=['pgd', 'apgd-ce', 'adaptive']."
            )
        queries, found = super().attack_single_run(x, y)
        return queries, found
