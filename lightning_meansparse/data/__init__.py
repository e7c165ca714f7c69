"""Images for every task: any image data set in, batches of pixels in [0, 1] out.

`module` is what users see; `sources` opens data sets, `pixels` holds or decodes images, `parts`
divides a split, `augment` varies training images, `subset` writes a part of a data set as Parquet.
"""

from __future__ import annotations

from lightning_meansparse.data.module import ImageDataModule

__all__ = ["ImageDataModule"]
