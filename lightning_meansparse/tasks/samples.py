"""Which sample of its data set each image of a batch is.

A sweep compares the same sample under several alphas and counts none twice, so it must know samples
by number. The number comes from the loader's own batch sampler: that survives Lightning's
distributed sampler, whose padding repeats samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
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

from lightning_meansparse.data.images import ImagePart
from lightning_meansparse.data.loading import PatientLoader
from lightning_meansparse.tasks.batches import images_and_labels
from lightning_meansparse.tasks.ranks import gathered, this_rank
from lightning_meansparse.tasks.rounds import Round

_ASK = (
    "Give a DataLoader over a dataset with __len__ and __getitem__, with shuffle=False; "
    "ImageDataModule does."
)


@dataclass(frozen=True)
class Samples:
    """The samples of one split: which the loader gives to whom, and their common order.

    Attributes:
        given: Numbers of the samples that the loader gives on each rank, in its order, `(m,)`
            int64. The padding of a distributed sampler repeats some.
        order: Numbers of the samples of all ranks, each once, `(n,)` int64. The first so many are
            the same set for any number of ranks.
        rank: Number of this process.
        size: Of a batch.
    """

    given: list[Tensor]
    order: Tensor
    rank: int
    size: int

    def __len__(self) -> int:
        """Return the number of samples over all ranks."""
        return len(self.order)

    def of(self, round: Round) -> Tensor:
        """Return the numbers of the samples that a round measures, on all ranks together."""
        return self.order[round.start : round.stop]

    def in_order(self, values: Tensor, device: torch.device) -> Tensor:
        """Return one value per sample of `order`, on every rank.

        Args:
            values: Of the samples that the loader gives on this rank, `(m,)` float32.
            device: Where this rank's tensors are.
        """
        numbers, found = torch.cat(self.given), torch.cat(gathered(values, device))
        known = dict(zip(numbers.tolist(), found.tolist(), strict=True))
        return torch.tensor([known[number] for number in self.order.tolist()])

    def first(self, count: int) -> list[Tensor]:
        """Return this rank's part of the first so many samples of `order`, by batch."""
        return self._in_batches(self.order[:count][self.rank :: len(self.given)])

    def hand(self, round: Round, margins: Tensor) -> list[Tensor]:
        """Return the numbers of the samples that this rank measures in a round, by batch.

        What a sample costs depends on whether it stays robust, and that on its clean margin. So
        each round's samples are dealt in the order of their margins, there and back: with 3 ranks
        to 0, 1, 2, 2, 1, 0, 0, 1, …

        Args:
            round: The round.
            margins: Clean margin of each sample of `order`, `(n,)`.
        """
        part = margins[round.start : round.stop]
        turns = part.nan_to_num(-torch.inf).argsort(descending=True, stable=True)
        ranks = len(self.given)
        place = torch.arange(len(turns)) % (2 * ranks)
        mine = torch.minimum(place, 2 * ranks - 1 - place) == self.rank
        return self._in_batches(self.of(round)[turns[mine]])

    def _in_batches(self, numbers: Tensor) -> list[Tensor]:
        return [batch for batch in torch.split(numbers, self.size) if len(batch)]


def dealt(batches: Sequence[Tensor], device: torch.device) -> Samples:
    """Put the samples of all ranks into one order.

    A distributed sampler that does not shuffle deals them one by one, as cards: of w ranks, rank r
    gets samples r, r + w, r + 2w, … So they are taken back one by one.

    Args:
        batches: Numbers of the samples of each batch on this rank.
        device: Where this rank's tensors are.

    Examples:
        >>> samples = dealt([torch.tensor([4, 2]), torch.tensor([7])], torch.device("cpu"))
        >>> samples.order, samples.hand(Round("all", (0.0,), ()), torch.tensor([0.1, 0.9, 0.5]))
        (tensor([4, 2, 7]), [tensor([2, 7]), tensor([4])])
    """
    given = gathered(torch.cat([torch.zeros(0, dtype=torch.int64), *batches]), device)
    turns = zip_longest(*(hand.tolist() for hand in given))
    order = dict.fromkeys(number for turn in turns for number in turn if number is not None)
    size = max(map(len, batches), default=1)
    return Samples(given, torch.tensor(list(order), dtype=torch.int64), this_rank(), size)


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
    loader = only_loader(loader)
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
    positions = [torch.tensor(batch, dtype=torch.int64) for batch in batches]
    numbers = _numbers(loader)
    return positions if numbers is None else [numbers[batch] for batch in positions]


def loader_of(loader: DataLoader[Any], batches: Sequence[Tensor]) -> DataLoader[Any]:
    """Return a loader that gives these samples of another one's data, as that would.

    Args:
        loader: Over a data set with `__len__` and `__getitem__`.
        batches: Numbers of the samples of each batch.
    """
    numbers = _numbers(loader)
    positions = [batch.tolist() for batch in batches]
    if numbers is not None:
        place = {number: position for position, number in enumerate(numbers.tolist())}
        positions = [[place[number] for number in batch] for batch in positions]
    workers = loader.num_workers if positions else 0
    return PatientLoader(
        loader.dataset,
        batch_sampler=positions,
        num_workers=workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout if workers else 0,
        prefetch_factor=loader.prefetch_factor if workers else None,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context if workers else None,
    )


def _numbers(loader: DataLoader[Any]) -> Tensor | None:
    """The number of the sample at each position of the data; None where they are the same."""
    dataset = loader.dataset
    return torch.from_numpy(dataset.rows) if isinstance(dataset, ImagePart) else None


def only_loader(loader: Any) -> DataLoader[Any]:
    """Return the one DataLoader that a trainer holds.

    Raises:
        TypeError: If it is none.
        ValueError: If there are several.
    """
    if isinstance(loader, list | tuple):
        if len(loader) > 1:
            raise ValueError(f"a sweep measures one data set, got {len(loader)} loaders")
        loader = loader[0] if loader else None
    if not isinstance(loader, DataLoader):
        raise TypeError(f"a sweep needs one DataLoader, got {type(loader).__name__}. {_ASK}")
    return loader


def first_samples(loader: DataLoader[Any], count: int) -> tuple[Tensor, Tensor]:
    """Return images and labels of the first samples of a loader's data set, the same on any rank.

    Args:
        loader: Over a data set with `__len__` and `__getitem__`.
        count: At most so many.
    """
    dataset: Any = loader.dataset
    places = list(range(min(count, len(dataset))))
    many = getattr(dataset, "__getitems__", None)
    items = [dataset[place] for place in places] if many is None else many(places)
    return images_and_labels(loader.collate_fn(items))


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
