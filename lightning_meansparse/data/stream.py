"""Data sets that are read as a stream: too large to store, shared among processes image by image.

Which training images are held out is decided by a hash of the coded image and the seed, so it needs
no pass over the data, is the same however the stream is sharded or shuffled, and copies of an image
are all on one side. Every process reads the whole stream and decodes its own images alone: then
shards of any sizes are fine, and every image comes exactly once.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from lightning_meansparse.data.augment import Augment
from lightning_meansparse.data.labels import Classes
from lightning_meansparse.data.loading import PatientLoader
from lightning_meansparse.data.pixels import (
    Coded,
    CodedPixels,
    CorruptImageError,
    Decoder,
    to_unit,
)
from lightning_meansparse.data.sources import Request, Split, find_hugging_face, load

_BUFFER = 1000  # coded images that are kept to draw from
_TOGETHER = 32


@dataclass(frozen=True)
class Stream:
    """One split, image by image: coded, with its label.

    Args:
        data: An `IterableDataset` of `datasets`, images not decoded.
        image: Column of images.
        label: Column of labels.
        decode: Decodes an image.
        names: Of the classes, where the data set stores them.
        where: The split, for errors.
    """

    data: Any
    image: str
    label: str
    decode: Decoder
    names: tuple[str, ...] | None
    where: str

    def shuffled(self, seed: int) -> Stream:
        """The same in another order: shards, and images within a buffer."""
        values = {**vars(self), "data": self.data.shuffle(seed=seed, buffer_size=_BUFFER)}
        return Stream(**values)

    def __iter__(self) -> Iterator[tuple[Coded, Any]]:
        """Give the coded images and their labels, as stored."""
        # Not `for row in data`: in a loader's worker that is a part of the shards.
        for rows in self.data.iter(batch_size=_TOGETHER):
            yield from zip(rows[self.image], rows[self.label], strict=True)

    def collected(self, limit: int | None, *, holdout: tuple[float, int] | None = None) -> Split:
        """Keep the first images, coded, or of those the held-out ones.

        Args:
            limit: At most so many; None for all.
            holdout: Share and seed of the held-out images; None takes every image.
        """
        rows = (row for row in self if holdout is None or held_out(row[0], *holdout))
        kept = list(islice(rows, limit))
        if not kept:
            raise ValueError(f"{self.where} has no images{' to hold out' if holdout else ''}")
        coded = [image for image, _ in kept]
        pixels = CodedPixels(
            lambda rows: [coded[row] for row in rows], self.decode, len(coded), self.where
        )
        return Split(pixels, np.asarray([label for _, label in kept]), self.names)


def open_streams(dataset: str | Path | Mapping[str, Any], request: Request) -> dict[str, Stream]:
    """Open the splits of a data set as streams; see `open_splits` for what it may be.

    Raises:
        TypeError: If it is a mapping with anything but data sets of `datasets`.
    """
    if isinstance(dataset, Mapping):
        splits = dict(dataset)
        for name, data in splits.items():
            if not hasattr(data, "features") or not hasattr(data, "cast_column"):
                raise TypeError(
                    f"split {name!r} of dataset must be of Hugging Face datasets to be streamed, "
                    f"got {type(data).__name__}"
                )
            if hasattr(data, "to_iterable_dataset"):
                splits[name] = data.to_iterable_dataset()
    else:
        splits = dict(load(dataset, request, streaming=True))
    return {name: _stream(data, name, request) for name, data in splits.items()}


def _stream(data: Any, split: str, request: Request) -> Stream:
    import datasets

    if data.features is None:
        data = data._resolve_features()
    columns = find_hugging_face(data, split, request)
    coded = data.select_columns([columns.image, columns.label])
    coded = coded.cast_column(columns.image, datasets.Image(decode=False))
    decode = Decoder(columns.open, request.channels, request.fit)
    where = f"split {split!r}"
    return Stream(coded, columns.image, columns.label, decode, columns.names, where)


def held_out(coded: Coded, share: float, seed: int) -> bool:
    """Whether an image belongs to the held-out share, by its content."""
    known = coded or {}
    content = known.get("bytes")
    if content is None:  # a file, which its folder and name stand for
        content = "/".join(PurePath(str(known.get("path"))).parts[-2:]).encode()
    digest = hashlib.blake2b(content, digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") < share * 2**64


class StreamPart(IterableDataset[tuple[Tensor, int]]):
    """Training images of a stream, without those held out.

    Args:
        stream: The training split.
        classes: Numbers the labels.
        share: That is held out.
        seed: Of that and of shuffling.
        limit: At most so many images, over all processes; None for all.
        shuffle: Give another order in every epoch.
        even: Leave out up to one image per process at the end, so that all have as many and none
            waits for the others; otherwise every image comes exactly once.
        skip_corrupt: Leave out what cannot be decoded.
        augment: Varies a batch `(n, C, H, W)`; None for none.
        rank: Number of this process and how many there are; None asks torch.distributed.
    """

    def __init__(
        self,
        stream: Stream,
        classes: Classes,
        share: float,
        seed: int,
        *,
        limit: int | None = None,
        shuffle: bool = False,
        even: bool = False,
        skip_corrupt: bool = False,
        augment: Augment | None = None,
        rank: tuple[int, int] | None = None,
    ) -> None:
        self.stream = stream
        self.classes = classes
        self.share = share
        self.seed = seed
        self.limit = limit
        self.shuffle = shuffle
        self.even = even
        self.skip_corrupt = skip_corrupt
        self.augment = augment
        self.rank = rank
        self.epoch = 0
        self.expected: tuple[int, ...] | None = None

    def limited(self, limit: int | None) -> StreamPart:
        """The first images, at most so many; None for as many as it has."""
        first = copy.copy(self)
        known = [count for count in (self.limit, limit) if count is not None]
        first.limit = min(known, default=None)
        return first

    def for_rank(self, rank: int, world_size: int) -> StreamPart:
        """The share of one process, each image on one of them."""
        share = copy.copy(self)
        share.rank = (rank, world_size)
        return share

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        """Give this process's images, float32 `(C, H, W)` in [0, 1], with their class numbers."""
        stream = self.stream.shuffled(self.seed + self.epoch) if self.shuffle else self.stream
        mine, count = self._share_of()
        rows = (
            row for row in stream if not (self.share and held_out(row[0], self.share, self.seed))
        )
        last: tuple[int, Coded, Any] | None = None
        for place, (coded, label) in enumerate(islice(rows, self.limit)):
            if place % count == mine:
                last = (place, coded, label)
            # With `even`, not before all others have theirs.
            if last is not None and (not self.even or place % count == count - 1):
                item = self._item(*last)
                last = None
                if item is not None:
                    yield item

    def _share_of(self) -> tuple[int, int]:
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        rank, world_size = self.rank or (0, 1)
        if self.rank is None and together:
            rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        if self.skip_corrupt and self.even and world_size > 1:
            raise ValueError(
                "skip_corrupt=True would give processes different numbers of training images, and "
                "they would wait for each other for ever; repair the images or take one process"
            )
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        return rank * workers + number, world_size * workers

    def _item(self, place: int, coded: Coded, label: Any) -> tuple[Tensor, int] | None:
        where = f"training image {place} of the stream of {self.stream.where}"
        try:
            image = self.stream.decode(coded, where)
        except CorruptImageError:
            if self.skip_corrupt:
                return None
            raise
        self.expected = self.expected or image.shape
        if image.shape != self.expected:
            raise ValueError(
                f"{where} has the shape {image.shape}, the first one {self.expected}; give size= "
                "or classifier= to resize and crop them to one, or channels="
            )
        pixels = to_unit(image[None])
        if self.augment is not None:
            pixels = self.augment(pixels)
        number = self.classes.of(np.asarray([label]), self.stream.names, self.stream.where)
        return pixels[0], int(number[0])


class StreamLoader(PatientLoader[tuple[Tensor, int]]):
    """A loader whose stream knows, also in its workers, which epoch it is."""

    def __iter__(self) -> Any:
        """Begin another epoch."""
        batches = super().__iter__()
        part: Any = self.dataset
        part.epoch += 1
        return batches
