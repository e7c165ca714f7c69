"""ImageDataModule: any image data set as batches of pixels in [0, 1]."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_meansparse.data.augment import Augment, resolve_augment
from lightning_meansparse.data.parts import Rows, held_out_count, limited, stratified_order
from lightning_meansparse.data.pixels import CodedPixels, Pixels, to_unit
from lightning_meansparse.data.sources import (
    MEMORY_LIMIT,
    Opened,
    Request,
    Split,
    is_local,
    open_splits,
)
from lightning_meansparse.data.subset import write_part

_log = logging.getLogger(__name__)

Part = Literal["train", "holdout", "test"]
Channels = Literal[1, 3, 4]
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
        image_key: Column of images.
        label_key: Column of labels: class numbers, or names (then sorted to give the numbers).
        size: Resize the shorter side and cut out the centre, an int for squares or
            `(height, width)`. Needed when images differ in size.
        channels: Convert images to 1, 3 or 4 channels; None keeps theirs.
        class_names: Names by class number, where the data set stores none.
        batch_size: Images per batch.
        holdout: Share (float) or count (int) of training images held out for choosing alpha.
        calibration: Use this many training images for statistics; None for all.
        augment: For training images: True (padded crop and mirroring), a callable on one float
            image `(C, H, W)` such as a `torchvision.transforms.v2` one, or its import path.
        limit_train: Train on this many images; None for all.
        limit_holdout: Keep this many held-out images; None for all.
        limit_test: Keep this many test images; None for all.
        num_workers: Processes that load; 0 is fastest for small images, which are kept in memory.
        seed: Of the division and the limits; shuffling follows `seed_everything`.
        train_split: Name of the training split.
        test_split: Name of the test split; None for no test.

    Attributes:
        num_classes: Number of classes (after `setup`, as everything here).
        class_names: Name of every class; the numbers as text where the data set has none.
        in_chans: Channels of the images.
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
        seed: int = 0,
        train_split: str = "train",
        test_split: str | None = "test",
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if channels is not None and channels not in get_args(Channels):
            raise ValueError(f"channels must be 1, 3, 4 or None, got {channels}")
        sides = None if size is None else (size, size) if isinstance(size, int) else tuple(size)
        if sides is not None and (sides[2:] or min(sides, default=0) < 1):
            raise ValueError(f"size must be a positive int or (height, width), got {size!r}")
        self.dataset = dataset
        self.request = Request(
            image_key=image_key,
            label_key=label_key,
            channels=channels,
            size=None if sides is None else (sides[0], sides[1]),
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
        self.seed = seed
        self.train_split = train_split
        self.test_split = test_split
        self._given_names = None if class_names is None else list(class_names)
        self.parts: dict[Part, ImagePart] = {}
        self.num_classes: int
        self.class_names: list[str]
        self.in_chans: int
        self.fingerprint: str

    def prepare_data(self) -> None:
        """Download a Hub data set; Lightning calls this on one process per machine."""
        if isinstance(self.dataset, str) and not is_local(self.dataset):
            open_splits(self.dataset, self.request)

    def setup(self, stage: str | None = None) -> None:
        """Open and divide the data set, once; the same on every rank and for every stage.

        Args:
            stage: Ignored: whatever can fail shall fail before training, not at the test after it.
        """
        if self.parts:
            return
        opened = open_splits(self.dataset, self.request)
        train = _get_split(opened, self.train_split, "train_split")
        test = _get_split(opened, self.test_split, "test_split") if self.test_split else None
        names = self._names(train)
        labels = _class_numbers(train, names, f"train_split={self.train_split!r}")
        order = stratified_order(labels, self.seed)
        count = held_out_count(self.holdout, len(order))
        rows: dict[Part, Rows] = {
            "train": limited(
                order[count:], self.limit_train, name="limit_train", where="the training part"
            ),
            "holdout": order[:count],
        }
        if count:
            rows["holdout"] = limited(
                order[:count], self.limit_holdout, name="limit_holdout", where="the held-out part"
            )
        limited(rows["train"], self.calibration, name="calibration", where="the training part")
        parts = _parts(train.pixels, labels, rows)
        if test is not None:
            labels = _class_numbers(test, names, f"test_split={self.test_split!r}")
            order = stratified_order(labels, self.seed)
            kept = limited(order, self.limit_test, name="limit_test", where="the test split")
            parts |= _parts(test.pixels, labels, {"test": kept})
        shapes = {name: part[0][0].shape for name, part in parts.items() if len(part)}
        if len(set(shapes.values())) > 1:
            found = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
            raise ValueError(
                f"images differ in shape between splits ({found}); give size= or channels="
            )
        self.class_names = names
        self.num_classes = len(names)
        self.in_chans = shapes["train"][0]
        self.fingerprint = _fingerprint(parts)
        self.parts = parts
        _log.info(
            "%s: %s images", self.fingerprint, {name: len(part) for name, part in parts.items()}
        )

    def train_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the training part, augmented and shuffled."""
        part = self._part("train")
        varied = copy.copy(part)
        varied.augment = self.augment
        return self._loader(varied, shuffle=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, int]] | list[Any]:
        """Return the held-out part of the training split; empty with `holdout=0`."""
        part = self._part("holdout")
        return self._loader(part) if len(part) else []

    def test_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the test split.

        Raises:
            RuntimeError: With `test_split=None`.
        """
        return self._loader(self._part("test"))

    def calibration_dataloader(self) -> DataLoader[tuple[Tensor, int]]:
        """Return the training part for statistics: without augmentation, unshuffled."""
        part = self._part("train")
        first = slice(self.calibration)
        return self._loader(
            ImagePart(part.pixels, part.places[first], part.rows[first], part.labels[first])
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
        folder = Path(directory)
        for name, members in (("train", ("train", "holdout")), ("test", ("test",))):
            found = [part for key, part in self.parts.items() if key in members and len(part)]
            if found:
                images = np.concatenate([part.pixels.read(part.places) for part in found])
                labels = np.concatenate([part.labels for part in found])
                keys = (self.request.image_key, self.request.label_key)
                write_part(folder / f"{name}.parquet", images, labels, self.class_names, keys=keys)
        return folder

    def _names(self, train: Split) -> list[str]:
        """Return the class names: stored, given, from names as labels, or from class numbers."""
        if train.labels.dtype.kind == "U":
            stored: Sequence[str] | None = np.unique(train.labels).tolist()
        else:
            stored = train.class_names
        given = self._given_names
        if given is not None and stored is not None and list(stored) != given:
            raise ValueError(f"class_names={given} are not those of the data set: {list(stored)}")
        names = stored or given
        if names is None:
            numbers = _class_numbers(train, None, f"train_split={self.train_split!r}")
            count = int(numbers.max()) + 1
            if count > max(1000, len(numbers)):
                raise ValueError(
                    f"labels must be class numbers, got {count - 1}: number them 0, 1, 2, …"
                )
            names = [str(number) for number in range(count)]
        return list(names)

    def _part(self, name: Part) -> ImagePart:
        if not self.parts:
            raise RuntimeError(
                "call setup() before asking for a dataloader, or give it to a Trainer"
            )
        if name not in self.parts:
            raise RuntimeError(
                "there is no test data: ImageDataModule was made with test_split=None"
            )
        return self.parts[name]

    def _loader(self, part: ImagePart, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, int]]:
        return DataLoader(
            part,
            batch_size=self.batch_size,
            shuffle=shuffle,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


def _get_split(opened: Opened, name: str, argument: str) -> Split:
    if name not in opened:
        raise ValueError(
            f"{argument}={name!r} is no split of the data set, which has: {', '.join(opened)}"
        )
    return opened[name]()


def _class_numbers(split: Split, names: Sequence[str] | None, where: str) -> Rows:
    """Check the labels of a split and return them as class numbers."""
    labels = split.labels
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        kind = "lists" if labels.ndim > 1 else f"of type {labels.dtype}, perhaps with gaps"
        raise TypeError(f"labels of {where} must be class numbers or names, but they are {kind}")
    if labels.dtype.kind == "U":
        number = {name: index for index, name in enumerate(names or ())}
        if unknown := sorted(set(np.unique(labels).tolist()) - set(number)):
            raise ValueError(f"labels of {where} have names that training does not: {unknown[:5]}")
        return np.array([number[label] for label in labels.tolist()], np.int64)
    numbers = labels.astype(np.int64)
    if numbers.min() < 0:
        raise ValueError(
            f"{int((numbers < 0).sum())} of {len(numbers)} labels of {where} are negative: this "
            "split is not labelled; choose one that is"
        )
    if names is not None and numbers.max() >= len(names):
        raise ValueError(
            f"labels of {where} go up to {numbers.max()}, but there are {len(names)} classes"
        )
    return numbers


def _parts(pixels: Pixels, labels: Rows, rows: Mapping[Part, Rows]) -> dict[Part, ImagePart]:
    """Make parts of one split, decoded into memory when they fit."""
    used = np.concatenate(list(rows.values()))
    if isinstance(pixels, CodedPixels):
        pixels, places = pixels.stored(used, MEMORY_LIMIT)
    else:
        places = used
    ends = np.cumsum([len(part) for part in rows.values()])
    return {
        name: ImagePart(pixels, places[end - len(part) : end], part, labels[part])
        for (name, part), end in zip(rows.items(), ends, strict=True)
    }


def _fingerprint(parts: Mapping[Part, ImagePart]) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for name, part in parts.items():
        digest.update(f"{name} {len(part)} ".encode() + part.labels.tobytes())
        seen = part.places[:_HASHED] if isinstance(part.pixels, CodedPixels) else part.places
        images = part.pixels.read(seen) if len(seen) else np.empty(0)
        digest.update(f"{images.shape} {images.dtype} ".encode() + images.tobytes())
    return digest.hexdigest()
