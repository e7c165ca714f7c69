"""Which images a calibration sees: the training data unshuffled, each sample once, on one rank.

Lightning's own loaders do not fit: they shuffle, drop the last batch, and under DDP pad the data
with repeated samples, which shifts the statistics.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    WeightedRandomSampler,
)

from lightning_meansparse.data.loading import PatientLoader
from lightning_meansparse.data.stream import StreamPart
from lightning_meansparse.surgery import images_in

logger = logging.getLogger(__name__)

Source = Iterable[Any] | Callable[[], Iterable[Any]]

# Samplers that decide about the order or the frequency of samples, not about which there are.
_WHOLE = (SequentialSampler, RandomSampler, WeightedRandomSampler, DistributedSampler)
_ASK = (
    "Pass MeanSparseCallback(dataloader=...): a DataLoader (or a function that makes one) over the "
    "training images without augmentation."
)


class Ranks(Protocol):
    """How many processes share the data, and which this is; a ``Trainer`` says it."""

    @property
    def world_size(self) -> int:
        """How many."""

    @property
    def global_rank(self) -> int:
        """Which, from 0 on."""


@dataclass(frozen=True)
class CalibrationData:
    """Batches for one calibration.

    Args:
        origin: Where they come from, in words.
        batches: Gives this rank's share, anew at every call.
        example: Gives a small batch, the same on every rank.
    """

    origin: str
    batches: Callable[[], Iterable[Any]]
    example: Callable[[], Any]


def calibration_data(
    trainer: Trainer,
    model: LightningModule,
    source: Source | None,
    *,
    max_batches: int | None,
    fitted: object = None,
) -> CalibrationData:
    """Find the images to calibrate on.

    In this order: ``source``; the datamodule's ``calibration_dataloader()``; the loader that the
    model was fitted with; the ``train_dataloader()`` of the datamodule or of the model.

    Args:
        trainer: The trainer in whose run this happens.
        model: Its module.
        source: What the user gave.
        max_batches: At most this many batches, over all ranks together.
        fitted: The training loader of an earlier fit, if one is known.

    Raises:
        RuntimeError: If there are no training data, or several loaders.
        TypeError: If the data can be neither counted nor shared among ranks.
    """
    if source is not None:
        make = source if callable(source) else lambda: source
        return given_data(make, "dataloader=", trainer, max_batches)
    datamodule: Any = getattr(trainer, "datamodule", None)
    if callable(getattr(datamodule, "calibration_dataloader", None)):
        origin = f"{type(datamodule).__name__}.calibration_dataloader()"
        loader = _called(trainer, datamodule.calibration_dataloader, origin)
        return given_data(lambda: loader, origin, trainer, max_batches)
    loader, origin = fitted, "the training data"
    if loader is None:
        for owner in (datamodule, model):
            if owner is not None and is_overridden("train_dataloader", owner):
                origin = f"{type(owner).__name__}.train_dataloader()"
                loader = _called(trainer, owner.train_dataloader, origin)
                break
    if loader is None:
        raise RuntimeError(
            "MeanSparseCallback has no training data to calibrate on, and evaluating an "
            f"uncalibrated model would report the base model. {_ASK} Or load_adapter(model, ...) "
            "and leave the callback out; or leave it out to evaluate the base model."
        )
    return training_data(_only_one(loader), origin, trainer, max_batches)


def calibration_facts(data: CalibrationData, trainer: Trainer, images: int) -> dict[str, Any]:
    """What an adapter says of the images that its statistics were measured on.

    Where they come from a datamodule that names its data set, as `ImageDataModule` does: data set,
    configuration, revision and split as well. Of a folder only the last name.
    """
    facts: dict[str, Any] = {"data": data.origin, "images": images}
    datamodule: Any = getattr(trainer, "datamodule", None)
    dataset = getattr(datamodule, "dataset", None)
    if isinstance(dataset, str | Path) and data.origin.startswith(type(datamodule).__name__):
        place = Path(dataset).expanduser()
        request = getattr(datamodule, "request", None)
        known = {
            "dataset": place.name if place.exists() or place.is_absolute() else str(dataset),
            "name": getattr(request, "config_name", None),
            "revision": getattr(request, "revision", None),
            "split": getattr(datamodule, "train_split", None),
        }
        facts |= {key: value for key, value in known.items() if isinstance(value, str)}
    return facts


class Counted:
    """Batches, and a count of the images that went by."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        self.images = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.images += len(images_in(batch))
            yield batch


def to_device(trainer: Trainer, batch: Any) -> Any:
    """The batch as an evaluation step would get it, through the same hooks."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def given_data(
    make: Callable[[], Any], origin: str, ranks: Ranks, max_batches: int | None
) -> CalibrationData:
    """The user's loader: its own order and its own selection; only sharing among ranks is ours."""
    loader = make()
    counted = isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset)
    if ranks.world_size == 1:

        def example() -> Any:
            part = _loader(loader, _selected(loader)[:2], workers=0) if counted else make()
            return _first_batch(part)

        return CalibrationData(origin, lambda: islice(make(), max_batches), example)
    if counted:
        indices = _selected(loader)
        if max_batches is not None:
            indices = indices[: max_batches * _batch_size(loader)]
        return _sharded(loader, indices, origin, ranks)
    if isinstance(loader, Sequence):
        part = islice(range(len(loader)), ranks.global_rank, max_batches, ranks.world_size)
        share = [loader[i] for i in part]
        return CalibrationData(origin, lambda: share, lambda: _first_batch(loader))
    if isinstance(loader, DataLoader) and isinstance(loader.dataset, StreamPart):
        limit = None if max_batches is None else max_batches * _batch_size(loader)
        stream = loader.dataset.limited(limit)
        return CalibrationData(
            origin,
            lambda: _streamed(loader, stream.for_rank(ranks.global_rank, ranks.world_size)),
            lambda: _first_batch(_streamed(loader, stream.for_rank(0, 1))),
        )
    raise TypeError(
        f"{origin}: {type(loader).__name__} cannot be shared among {ranks.world_size} processes "
        "without repeating samples. Give a DataLoader over a dataset with __len__ and __getitem__."
    )


def training_data(
    loader: Any, origin: str, ranks: Ranks, max_batches: int | None
) -> CalibrationData:
    """The training loader's dataset, in its own order, unshuffled."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        endless = isinstance(loader, DataLoader) and max_batches is None
        if endless or isinstance(loader, Iterator) or ranks.world_size > 1:
            what = type(loader.dataset if isinstance(loader, DataLoader) else loader).__name__
            raise TypeError(
                f"{origin} is {what}, which has no fixed samples to go through once. {_ASK} In a "
                "single process max_batches=... bounds an iterable dataset as well."
            )
        return given_data(lambda: loader, origin, ranks, max_batches)
    indices = _selected(loader)
    if max_batches is not None:
        # Evenly spread: the head of a class-sorted data set would be all one class.
        n, keep = len(indices), min(len(indices), max_batches * _batch_size(loader))
        indices = [indices[i * n // keep] for i in range(keep)]
    _warn_if_augmented(loader, indices, origin)
    return _sharded(loader, indices, origin, ranks)


def _sharded(
    loader: DataLoader[Any], indices: list[int], origin: str, ranks: Ranks
) -> CalibrationData:
    share = indices[ranks.global_rank :: ranks.world_size]
    return CalibrationData(
        f"{origin}, {len(indices):,} samples",
        lambda: _loader(loader, share, workers=loader.num_workers),
        lambda: _first_batch(_loader(loader, indices[:2], workers=0)),
    )


def _streamed(like: DataLoader[Any], part: StreamPart) -> DataLoader[Any]:
    return PatientLoader(
        part,
        like.batch_size,
        num_workers=like.num_workers,
        pin_memory=like.pin_memory,
        timeout=like.timeout,
    )


def _loader(like: DataLoader[Any], indices: list[int], *, workers: int) -> DataLoader[Any]:
    """A plain loader over ``indices`` that reads and collates as ``like`` does."""
    options: dict[str, Any] = {}
    if workers:
        options = {
            "num_workers": workers,
            "prefetch_factor": like.prefetch_factor,
            "multiprocessing_context": like.multiprocessing_context,
            "worker_init_fn": like.worker_init_fn,
            "timeout": like.timeout,
        }
    return PatientLoader(
        like.dataset,
        batch_size=None if like.batch_sampler is None else _batch_size(like),
        sampler=indices,
        collate_fn=like.collate_fn,
        pin_memory=like.pin_memory,
        **options,
    )


def _selected(loader: DataLoader[Any]) -> list[int]:
    """Every index that the loader may give, once."""
    sampler: Any = loader.sampler
    if isinstance(sampler, DistributedSamplerWrapper):  # Lightning's, around the user's sampler
        sampler = sampler.dataset._sampler  # type: ignore[attr-defined]
    batch_sampler: Any = loader.batch_sampler
    if batch_sampler is not None and getattr(batch_sampler, "sampler", None) is None:
        drawn: Iterable[int] = (index for batch in batch_sampler for index in batch)
    elif isinstance(sampler, _WHOLE):
        return list(range(len(loader.dataset)))  # type: ignore[arg-type]
    else:
        drawn = sampler
    # A sampler of the user's may draw its selection at random: the same one on every rank.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return sorted(set(drawn))


def _batch_size(loader: DataLoader[Any]) -> int:
    """Samples per batch, for whatever way the loader makes batches."""
    if loader.batch_size is not None:
        return loader.batch_size
    size = getattr(loader.batch_sampler, "batch_size", None)
    if isinstance(size, int):
        return size
    return 1 if loader.batch_sampler is None else len(next(iter(loader.batch_sampler)))


def _only_one(loader: Any) -> Any:
    """The single loader of a Lightning collection of loaders."""
    if isinstance(loader, DataLoader):
        return loader
    inner = loader.values() if isinstance(loader, dict) else loader
    loaders = list(inner) if isinstance(loader, (dict, list, tuple)) else []
    if any(isinstance(each, Tensor) for each in loaders):
        return loader  # a plain list of batches
    nested = [each for each in loaders if isinstance(each, (DataLoader, dict, list, tuple))]
    if isinstance(loader, dict) or any(isinstance(each, DataLoader) for each in nested):
        if len(loaders) == 1:
            return _only_one(loaders[0])
        raise RuntimeError(
            f"there are {len(loaders)} training loaders; which images the statistics should "
            f"describe is for you to say. {_ASK}"
        )
    if hasattr(loader, "flattened"):
        return _only_one(list(loader.flattened))
    return loader


def _called(trainer: Trainer, hook: Callable[[], Any], origin: str) -> Any:
    """Call a hook that makes a loader; outside fit, set the training data up if it needs that.

    Only if it needs that: a second ``setup("fit")`` may draw another split.
    """
    try:
        return hook()
    except (AttributeError, TypeError) as error:
        owner: Any = getattr(hook, "__self__", None)
        if trainer.state.fn == TrainerFn.FITTING or owner is None:
            raise
        logger.info("%s needs its training data set up first (%s)", origin, error)
    try:
        owner.setup("fit")
        return hook()
    except Exception as error:
        raise RuntimeError(f"{origin} gave no training data to calibrate on. {_ASK}") from error


def _first_batch(loader: Iterable[Any]) -> Any:
    batch = next(iter(loader), None)
    if batch is None:
        raise ValueError(f"dataloader: there is no batch in it. {_ASK}")
    return batch


def _warn_if_augmented(loader: DataLoader[Any], indices: list[int], origin: str) -> None:
    """Say it when the same sample does not come out the same twice: then it is augmented."""
    if not indices:
        return
    first = _loader(loader, indices[:1], workers=0)
    draws = [_tensors(next(iter(first))) for _ in range(8)]
    if any(not all(map(torch.equal, draws[0], draw)) for draw in draws[1:]):
        rank_zero_warn(
            f"{origin}: a sample changes from one reading to the next, so the data set augments it "
            "at random and the statistics will describe augmented images. Its transforms cannot be "
            f"switched off from outside. {_ASK}"
        )


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    if isinstance(batch, dict):
        batch = list(batch.values())
    return [t for each in batch for t in _tensors(each)] if isinstance(batch, (list, tuple)) else []
