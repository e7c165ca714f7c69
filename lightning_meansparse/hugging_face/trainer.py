"""The callback for transformers' own ``Trainer``: what `MeanSparseCallback` is in Lightning."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from lightning_meansparse.adapter import save_adapter
from lightning_meansparse.adapter.base import mark_measured
from lightning_meansparse.callback.batches import (
    CalibrationData,
    Counted,
    Source,
    given_data,
    training_data,
)
from lightning_meansparse.callback.options import Where, check_globs, check_options
from lightning_meansparse.layer import Center
from lightning_meansparse.moments import Statistics
from lightning_meansparse.sites import Site, find_sites
from lightning_meansparse.surgery import (
    calibrate_,
    images_in,
    restore_,
    set_alpha,
    share_buffers,
    sparsify_,
)

logger = logging.get_logger(__name__)


@dataclass(frozen=True)
class _Ranks:
    world_size: int
    global_rank: int


class MeanSparseTrainerCallback(TrainerCallback):
    """Sparsify and calibrate the model when transformers' ``Trainer`` has trained it.

    Training itself is untouched: it runs the base model, and its checkpoints and evaluations are
    the base's. In ``on_train_end``, after ``load_best_model_at_end`` has put the best weights in,
    operators are inserted, and one pass over the training data in eval mode measures their
    statistics, in the dtype of the weights with autocast off. Several processes count every sample
    once. From then on ``trainer.evaluate`` and ``predict`` run the sparsified model, and
    ``trainer.save_model`` and ``push_to_hub`` write it as a whole, see `save_pretrained`. Training
    again begins with the base.

    Which data: ``dataloader``, else the training data set without shuffling, through the Trainer's
    collator. What that data set does to its images it still does; if it augments them at random a
    warning says so.

    Args:
        alpha: Half-width of the band in standard deviations; or ``{glob over site names: number}``.
        where: Which sites, see `find_sites`.
        dataloader: Batches to calibrate on, or a function that gives them. Used as they are.
        max_batches: At most this many batches, over all processes together. Of the training data
            set, evenly spread samples are taken; of a given loader, its first batches.
        statistics: ``"pooled"`` (exact) or ``"official"`` (the authors' averaging).
        center: What a sparsified value becomes, see `MeanSparse`.
        save_to: Write an adapter into this folder after the calibration.
        base: Name of the trained base model for the adapter, such as ``"hf/org/name"``.
        strict: Whether activations that cannot be reached are an error (before training starts) or
            a warning.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If ``dataloader`` can be read only once, like a generator.

    Examples:
        >>> from lightning_meansparse.hugging_face import MeanSparseTrainerCallback
        >>> callback = MeanSparseTrainerCallback(alpha=0.2, save_to="adapter")
        >>> # trainer = Trainer(model, args, train_dataset=..., callbacks=[callback])
    """

    def __init__(
        self,
        alpha: float | Mapping[str, float] = 0.2,
        *,
        where: Where = "activations",
        dataloader: Source | None = None,
        max_batches: int | None = None,
        statistics: Statistics = "pooled",
        center: Center = "channel",
        save_to: str | os.PathLike[str] | None = None,
        base: str | None = None,
        strict: bool = True,
    ) -> None:
        check_options(alpha, center, statistics, max_batches, dataloader)
        self.alpha = alpha
        self.where = where
        self.dataloader = dataloader
        self.max_batches = max_batches
        self.statistics: Statistics = statistics
        self.center: Center = center
        self.save_to = None if save_to is None else Path(save_to)
        self.base = base
        self.strict = strict

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Give the training the base model, and fail now where the end would fail."""
        if args.fsdp or args.deepspeed:
            raise ValueError(
                "MeanSparseTrainerCallback does not support FSDP and DeepSpeed, which split the "
                "weights. Train without the callback, then calibrate on one device: sparsify_, "
                "calibrate_."
            )
        if self.save_to is not None and self.save_to.is_file():
            raise ValueError(f"save_to must be a folder, and {self.save_to} is a file.")
        model = kwargs["model"]
        restore_(model)
        data = self._data(args, kwargs["train_dataloader"])
        with _as_in_use(model):
            check_globs(self.alpha, self._find_sites(model, data))

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Insert operators, calibrate, save."""
        model = kwargs["model"]
        try:
            data = self._data(args, kwargs["train_dataloader"])
            counted = Counted(data.batches())
            share_buffers(model)
            with _as_in_use(model):
                sparsify_(model, self._find_sites(model, data), center=self.center)
                logger.info(f"MeanSparse: calibrating on {data.origin}")
                calibrate_(model, counted, statistics=self.statistics)
            set_alpha(model, self.alpha)
            mark_measured(model, self.statistics)
        except BaseException as error:
            restore_(model)
            error.add_note("Training itself has finished: the model holds the trained weights.")
            raise
        images = _sum_over_ranks(counted.images, args.device)
        if self.save_to is not None and state.is_world_process_zero:
            save_adapter(
                model,
                self.save_to,
                base=self.base,
                statistics=self.statistics,
                calibration={"data": data.origin, "images": images},
            )
        if torch.distributed.is_initialized():
            torch.distributed.barrier()

    def _data(self, args: TrainingArguments, loader: Any) -> CalibrationData:
        ranks = _Ranks(args.world_size, args.process_index)
        source = self.dataloader
        if source is not None:
            make = source if callable(source) else lambda: source
            return given_data(make, "dataloader=", ranks, self.max_batches)
        plain: DataLoader[Any] = DataLoader(
            loader.dataset,
            batch_size=args.per_device_train_batch_size,
            collate_fn=loader.collate_fn,
            num_workers=args.dataloader_num_workers,
        )
        return training_data(plain, "the training data", ranks, self.max_batches)

    def _find_sites(self, model: nn.Module, data: CalibrationData) -> tuple[Site, ...]:
        device = next(model.parameters()).device
        example = images_in(data.example())[:2].to(device)
        return find_sites(model, example, where=self.where, strict=self.strict)


@contextmanager
def _as_in_use(model: nn.Module) -> Iterator[None]:
    """The model without what accelerate puts around ``forward`` in training: mixed precision.

    Random numbers go on after it as if nothing had been.
    """
    around = vars(model).pop("forward", None) if "_original_forward" in vars(model) else None
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            yield
    finally:
        if around is not None:
            model.forward = around


def _sum_over_ranks(count: int, device: torch.device) -> int:
    if not torch.distributed.is_initialized():
        return count
    total = torch.tensor(count, device=device)
    torch.distributed.all_reduce(total)
    return int(total)
