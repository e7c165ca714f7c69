"""ImageDataModule: any image data set as batches of pixels in [0, 1]."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_meansparse.classifier import Classifier
from lightning_meansparse.data.augment import resolve_augment
from lightning_meansparse.data.fitting import eval_transform, named
from lightning_meansparse.data.images import ImagePart, Part, channels_of, fingerprint_of, parts_of
from lightning_meansparse.data.labels import Classes, classes_of
from lightning_meansparse.data.loading import PatientLoader
from lightning_meansparse.data.parts import (
    Rows,
    held_out_count,
    limited,
    split_of,
    stratified_order,
)
from lightning_meansparse.data.pixels import CodedPixels, resized
from lightning_meansparse.data.sources import MEMORY_LIMIT, Request, Split, is_local, open_splits
from lightning_meansparse.data.stream import StreamLoader, StreamPart, open_streams
from lightning_meansparse.data.subset import write_part

_log = logging.getLogger(__name__)

Channels = Literal[1, 3, 4]


_Parts = dict[Part, ImagePart | StreamPart]
_Made = tuple[_Parts, Classes, dict[str, Rows]]


class ImageDataModule(LightningDataModule):
    """Batches of any image data set: images float32 `(N, C, H, W)` in [0, 1], labels `(N,)`.

    The training split is divided into a part to train on and a held-out part, by class and seed.
    The held-out part chooses alpha (`val_dataloader`), so that the test split is only reported.
    Nothing is normalised here: a `Classifier` does that.

    Every part is in a stratified order: its first n images hold the classes in proportion for any
    n, and a smaller limit takes a part of what a larger one takes. `parts["test"].rows`
    says which rows of the split the loader gives, one after the other.

    Args:
        dataset: A Hugging Face Hub id (`"uoft-cs/cifar10"`, needs the `hf` extra); a folder of IDX
            files (MNIST's format, plain or gzipped), of Parquet files, saved by `save_to_disk`, or
            with `train/<class>/` images; a Parquet file; or a mapping from split names to
            `datasets.Dataset` or `(images (N, C, H, W), labels)` pairs, such as a `DatasetDict`.
        config_name: Configuration of a Hub data set, or subfolder of a local one.
        revision: Commit, tag or branch of a Hub data set.
        image_key: Column of images. The default stands for the only such column, whatever its name.
        label_key: Column of labels: class numbers, or names (then sorted to give the numbers). The
            default stands for the only such column.
        size: Resize the shorter side and cut out the centre, an int for squares or
            `(height, width)`. Needed when images differ in size.
        classifier: Resize, crop and order the classes as this classifier was evaluated: by timm's
            or torchvision's eval transform or the image processor of transformers, without the
            normalisation, which the classifier does itself. A name that `load_classifier` takes
            will do.
        channels: Convert images to 1, 3 or 4 channels; None keeps theirs.
        class_names: Names by class number. Where the data set stores them in another order, its
            labels are numbered anew.
        batch_size: Images per batch.
        holdout: Share (float) or count (int) of training images held out for choosing alpha.
        calibration: Use this many training images for statistics; None for all.
        augment: For training images: True (padded crop and mirroring), a callable on one float
            image `(C, H, W)` such as a `torchvision.transforms.v2` one, or its import path.
        limit_train: Train on this many images; None for all.
        limit_holdout: Keep this many held-out images; None for all.
        limit_test: Keep this many test images; None for all.
        num_workers: Processes that load; 0 is fastest for small images, which are kept in memory.
        worker_timeout: Seconds to wait for a batch of these processes before that is an error.
        seed: Of the division and the limits; shuffling follows `seed_everything`.
        train_split: Name of the training split.
        test_split: Name of the test split; None for no test.
        streaming: Read the training images one after the other, without storing the data set (needs
            the `hf` extra). `holdout` must be a share; an image belongs to it by its content. The
            held-out and test images are kept, so limit them by `limit_holdout` and `limit_test`,
            which draw from some of its shards. Every process reads all of it and decodes its share.
        skip_corrupt: Leave out images that cannot be decoded, and say which; else they are errors.
            This looks at every image once before it begins.

    Attributes:
        num_classes: Number of classes (after `setup`, as everything here).
        class_names: Name of every class; the numbers as text where the data set has none.
        in_chans: Channels of the images.
        skipped: Rows that `skip_corrupt` left out, by split.
        fingerprint: Hash of the labels and pixels in use, 12 hexadecimal digits. When images are
            too large for memory it looks at the pixels of the first 1,024 of each part.

    Raises:
        ValueError: In `setup`, before anything is set, for columns, splits, labels, sizes or limits
            that the data set does not have. The message says which it has.

    Examples:
        >>> images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
        >>> labels = torch.arange(40) % 2
        >>> pairs = {"train": (images, labels), "test": (images[:10], labels[:10])}
        >>> data = ImageDataModule(pairs, batch_size=16, holdout=0.25)
        >>> data.setup()
        >>> data.num_classes, len(data.parts["train"]), len(data.parts["holdout"])
        (2, 30, 10)
        >>> batch, _ = next(iter(data.train_dataloader()))
        >>> batch.shape, batch.dtype
        (torch.Size([16, 1, 8, 8]), torch.float32)
    """

    def __init__(
        self,
        dataset: str | Path | Mapping[str, Any],
        *,
        config_name: str | None = None,
        revision: str | None = None,
        image_key: str = "image",
        label_key: str = "label",
        size: int | tuple[int, int] | None = None,
        classifier: Classifier | str | None = None,
        channels: Channels | None = None,
        class_names: Sequence[str] | None = None,
        batch_size: int = 128,
        holdout: int | float = 0.1,
        calibration: int | None = None,
        augment: bool | str | Callable[[Tensor], Tensor] = False,
        limit_train: int | None = None,
        limit_holdout: int | None = None,
        limit_test: int | None = None,
        num_workers: int = 0,
        worker_timeout: float = 60.0,
        seed: int = 0,
        train_split: str = "train",
        test_split: str | None = "test",
        streaming: bool = False,
        skip_corrupt: bool = False,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if channels is not None and channels not in get_args(Channels):
            raise ValueError(f"channels must be 1, 3, 4 or None, got {channels}")
        sides = None if size is None else (size,) * 2 if isinstance(size, int) else tuple(size)
        if size is not None and classifier is not None:
            raise ValueError("size and classifier both say how large images are; give one of them")
        if sides is not None and [type(n) is int and n > 0 for n in sides] != [True, True]:
            raise ValueError(f"size must be a positive int or (height, width), got {size!r}")
        self.dataset = dataset
        self.request = Request(
            image_key=image_key,
            label_key=label_key,
            channels=channels,
            fit=None if sides is None else partial(resized, size=(sides[0], sides[1])),
            config_name=config_name,
            revision=revision,
        )
        self.batch_size = batch_size
        self.holdout = holdout
        self.calibration = calibration
        self.augment = resolve_augment(augment)
        self.limit_train = limit_train
        self.limit_holdout = limit_holdout
        self.limit_test = limit_test
        self.num_workers = num_workers
        self.worker_timeout = worker_timeout
        self.seed = seed
        self.train_split = train_split
        self.test_split = test_split
        self.classifier = classifier
        self.streaming = streaming
        self.skip_corrupt = skip_corrupt
        self._given_names = None if class_names is None else list(class_names)
        self.parts: _Parts = {}
        self.skipped: dict[str, Rows] = {}
        self.num_classes: int
        self.class_names: list[str]
        self.in_chans: int
        self.fingerprint: str

    def prepare_data(self) -> None:
        """Download a Hub data set; Lightning calls this on one process per machine."""
        if isinstance(self.dataset, str) and not is_local(self.dataset) and not self.streaming:
            open_splits(self.dataset, self.request)

    def setup(self, stage: str | None = None) -> None:
        """Open and divide the data set, once; the same on every rank and for every stage.

        Args:
            stage: Ignored: whatever can fail shall fail before training, not at the test after it.
        """
        if self.parts:
            return
        on_hub = isinstance(self.dataset, str) and not is_local(self.dataset)
        if (revision := self.request.revision) is not None and not on_hub:
            raise ValueError(f"revision={revision!r} is for the Hub, and dataset is a local one")
        classifier = None if self.classifier is None else named(self.classifier)
        request = self.request
        if classifier is not None:
            channels = request.channels or classifier.in_chans
            request = replace(request, fit=eval_transform(classifier), channels=channels)
        labels = None if classifier is None else classifier.labels
        make = self._streamed if self.streaming else self._stored
        parts, classes, skipped = make(request, labels)
        self.in_chans = channels_of(parts)
        self.class_names = list(classes.names)
        self.num_classes = len(classes.names)
        kept = {name: part for name, part in parts.items() if isinstance(part, ImagePart)}
        self.fingerprint = fingerprint_of(kept)
        self.skipped = skipped
        self.parts = parts
        for split, rows in skipped.items():
            _log.warning(
                "%s: %d images cannot be decoded and are left out, rows %s%s",
                *(split, len(rows), rows[:5].tolist(), " …" if len(rows) > 5 else ""),
            )
        sizes = {name: len(part) for name, part in kept.items()}
        _log.info("%s: %s images", self.fingerprint, sizes)

    def _stored(self, request: Request, labels: Sequence[str] | None) -> _Made:
        """Divide a data set whose images have numbers."""
        opened = open_splits(self.dataset, request)
        train = split_of(opened, self.train_split, "train_split")()
        test = split_of(opened, self.test_split, "test_split")() if self.test_split else None
        where = f"train_split={self.train_split!r}"
        classes = classes_of(
            train.labels, train.class_names, given=self._given_names, model=labels, where=where
        )
        skipped: dict[str, Rows] = {}
        numbers = classes.of(train.labels, train.class_names, where)
        order = self._order(train, numbers, self.train_split, skipped)
        count = held_out_count(self.holdout, len(order))
        rest, held, where = order[count:], order[:count], "the training part"
        rest = limited(rest, self.limit_train, name="limit_train", where=where)
        limited(rest, self.calibration, name="calibration", where=where)
        if count:
            held = limited(
                held, self.limit_holdout, name="limit_holdout", where="the held-out part"
            )
        rows: dict[Part, Rows] = {"train": rest, "holdout": held}
        parts: _Parts = {**parts_of(train.pixels, numbers, rows, MEMORY_LIMIT)}
        if test is not None:
            parts |= self._test(test, classes, skipped)
        return parts, classes, skipped

    def _streamed(self, request: Request, labels: Sequence[str] | None) -> _Made:
        """Divide a stream: training images stay one, held-out and test images get numbers."""
        if isinstance(self.holdout, int) and self.holdout:
            raise ValueError(
                f"holdout={self.holdout}, but of a stream a share is held out: give a float, and "
                "limit_holdout= for how many of these images choose alpha"
            )
        held_out_count(self.holdout, 1 + bool(self.holdout))
        streams = open_streams(self.dataset, request)
        train = split_of(streams, self.train_split, "train_split")
        test = split_of(streams, self.test_split, "test_split") if self.test_split else None
        where = f"train_split={self.train_split!r}"
        if train.names is None and self._given_names is None and labels is None:
            raise ValueError(
                f"the labels of {where} have no names, and a stream does not say how many classes "
                "there are: give class_names="
            )
        classes = classes_of(
            np.zeros(1, np.int64), train.names, given=self._given_names, model=labels, where=where
        )
        share = float(self.holdout)
        part = StreamPart(
            train, classes, share, self.seed, limit=self.limit_train, skip_corrupt=self.skip_corrupt
        )
        parts: _Parts = {"train": part}
        skipped: dict[str, Rows] = {}
        if share:
            shuffled = train.shuffled(self.seed)
            held = shuffled.collected(self.limit_holdout, holdout=(share, self.seed))
            numbers = classes.of(held.labels, held.class_names, where)
            order = self._order(held, numbers, self.train_split, skipped)
            parts |= parts_of(held.pixels, numbers, {"holdout": order}, MEMORY_LIMIT)
        if test is not None:
            kept = test if self.limit_test is None else test.shuffled(self.seed)
            parts |= self._test(kept.collected(self.limit_test), classes, skipped)
        return parts, classes, skipped

    def _test(
        self, split: Split, classes: Classes, skipped: dict[str, Rows]
    ) -> dict[Part, ImagePart]:
        numbers = classes.of(split.labels, split.class_names, f"test_split={self.test_split!r}")
        order = self._order(split, numbers, str(self.test_split), skipped)
        limit = None if self.streaming else self.limit_test
        kept = limited(order, limit, name="limit_test", where="the test split")
        return parts_of(split.pixels, numbers, {"test": kept}, MEMORY_LIMIT)

    def _order(self, split: Split, numbers: Rows, name: str, skipped: dict[str, Rows]) -> Rows:
        """The rows of a split in their order, without those that are to be skipped."""
        order = stratified_order(numbers, self.seed)
        if self.skip_corrupt and isinstance(split.pixels, CodedPixels):
            bad = split.pixels.corrupt()
            if len(bad):
                skipped[name] = np.union1d(skipped.get(name, bad), bad)
                order = order[~np.isin(order, bad)]
        if not len(order):
            raise ValueError(f"split {name!r} has no image that can be decoded")
        return order

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the training part, augmented and shuffled."""
        varied = copy.copy(self._part("train"))
        varied.augment = self.augment
        if isinstance(varied, StreamPart):
            varied.shuffle = varied.even = True
            return self._loader(varied)
        return self._loader(varied, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]] | list[Any]:
        """Return the held-out part of the training split; empty with `holdout=0`."""
        part = self.parts.get("holdout") if self.parts else self._part("holdout")
        return self._loader(part) if isinstance(part, ImagePart) and len(part) else []

    def test_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the test split.

        Raises:
            RuntimeError: With `test_split=None`.
        """
        return self._loader(self._part("test"))

    def calibration_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the training part for statistics: without augmentation, unshuffled."""
        part = self._part("train")
        if isinstance(part, StreamPart):
            return self._loader(part.limited(self.calibration))
        some = slice(self.calibration)
        return self._loader(
            ImagePart(part.pixels, part.places[some], part.rows[some], part.labels[some])
        )

    def write_parquet(self, directory: str | Path) -> Path:
        """Write the images in use as a data set of its own: PNG in Hugging Face's Parquet layout.

        The training and held-out parts become `train.parquet`, the test part `test.parquet`. With
        limits this makes a small, stratified copy; the pixels stay the same bit for bit.

        Args:
            directory: Is made if needed; files of the same name are replaced.

        Returns:
            The directory, which `ImageDataModule` and `datasets.load_dataset` open.

        Raises:
            ValueError: If the pixels are floats, which PNG cannot hold.
        """
        self.setup()
        if self.streaming:
            raise ValueError("write_parquet needs images with numbers; give streaming=False")
        folder = Path(directory)
        for name, members in (("train", ("train", "holdout")), ("test", ("test",))):
            found = [
                part
                for key, part in self.parts.items()
                if key in members and isinstance(part, ImagePart) and len(part)
            ]
            if found:
                images = np.concatenate([part.pixels.read(part.places) for part in found])
                labels = np.concatenate([part.labels for part in found])
                keys = (self.request.image_key, self.request.label_key)
                write_part(folder / f"{name}.parquet", images, labels, self.class_names, keys=keys)
        return folder

    def _part(self, name: Part) -> ImagePart | StreamPart:
        if not self.parts:
            raise RuntimeError(
                "call setup() before asking for a dataloader, or give it to a Trainer"
            )
        if name not in self.parts:
            raise RuntimeError("there is no test data: the data were made with test_split=None")
        return self.parts[name]

    def _loader(
        self, part: ImagePart | StreamPart, *, shuffle: bool = False
    ) -> DataLoader[tuple[Tensor, int]]:
        kind = StreamLoader if isinstance(part, StreamPart) else PatientLoader[tuple[Tensor, int]]
        return kind(
            part,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            timeout=self.worker_timeout if self.num_workers else 0,
            # A stream is told its epoch before its workers start.
            persistent_workers=self.num_workers > 0 and kind is not StreamLoader,
            pin_memory=torch.cuda.is_available(),
        )
