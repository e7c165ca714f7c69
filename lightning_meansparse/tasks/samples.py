"""Which sample of its data set each image of a batch is.

A sweep compares the same sample under several alphas and counts none twice, so it must know samples
by number. The number comes from the loader's own batch sampler: that survives Lightning's
distributed sampler, whose padding repeats samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    IterableDataset,
    RandomSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from lightning_meansparse.data.module import ImagePart
from lightning_meansparse.surgery import images_in

_ASK = (
    "Give a DataLoader over a dataset with __len__ and __getitem__, with shuffle=False; "
    "ImageDataModule does."
)


def batch_indices(loader: Any) -> list[Tensor]:
    """Numbers of the samples of every batch that this loader gives on this rank, in order.

    Of an `ImageDataModule` the number is the row in the data set's own
    split, of other data the position in the loader's dataset.

    Args:
        loader: A DataLoader, or a list with one, as a trainer holds it.

    Returns:
        One int64 tensor `(batch size,)` per batch.

    Raises:
        TypeError: If it is no DataLoader over numbered samples.
        ValueError: If its order is random, so that numbers and images would not belong together.

    Examples:
        >>> from torch.utils.data import TensorDataset
        >>> batch_indices(DataLoader(TensorDataset(torch.zeros(5)), batch_size=2))
        [tensor([0, 1]), tensor([2, 3]), tensor([4])]
    """
    if isinstance(loader, list | tuple) and len(loader) == 1:
        loader = loader[0]
    if not isinstance(loader, DataLoader):
        raise TypeError(f"a sweep needs one DataLoader, got {type(loader).__name__}. {_ASK}")
    if isinstance(loader.dataset, IterableDataset) or loader.batch_sampler is None:
        raise TypeError(
            "a sweep needs samples with numbers and a loader that makes batches of them, got "
            f"{type(loader.dataset).__name__} without. {_ASK}"
        )
    batches, again = _drawn(loader.batch_sampler), _drawn(loader.batch_sampler)
    if batches != again or _is_random(loader):
        raise ValueError(
            "the loader gives its samples in random order, so a sweep cannot tell which sample is "
            f"which. {_ASK}"
        )
    numbers = None
    if isinstance(loader.dataset, ImagePart):
        numbers = torch.from_numpy(loader.dataset.rows)
    positions = [torch.tensor(batch, dtype=torch.int64) for batch in batches]
    return positions if numbers is None else [numbers[batch] for batch in positions]


def _drawn(batch_sampler: Any) -> list[list[int]]:
    with torch.random.fork_rng(devices=[]):
        # Two passes of a random sampler must differ: fork_rng alone would not make them.
        torch.seed()
        return [list(batch) for batch in batch_sampler]


def _is_random(loader: DataLoader[Any]) -> bool:
    """Whether a sampler is random by its class: by chance, few samples come in the same order."""
    samplers = [loader.sampler, getattr(loader.batch_sampler, "sampler", None)]
    return any(
        isinstance(sampler, RandomSampler | SubsetRandomSampler | WeightedRandomSampler)
        for sampler in samplers
    )


def first_images(loader: Any, device: torch.device, *, at_least: int = 512) -> Iterator[Tensor]:
    """Batches of images from the beginning of a Trainer's evaluation loader."""
    seen = 0
    for batch in loader[0] if isinstance(loader, list | tuple) else loader:
        if seen >= at_least:
            return
        images = images_in(batch)
        seen += len(images)
        yield images.to(device)
