"""When a model is sparsified and calibrated during a Trainer run. How is surgery's business."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import RunningStage, TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from lightning_meansparse.adapter import save_adapter
from lightning_meansparse.adapter.base import mark_measured, provenance
from lightning_meansparse.adapter.files import from_checkpoint
from lightning_meansparse.adapter.format import Adapter
from lightning_meansparse.adapter.models import describe, insert
from lightning_meansparse.callback.batches import (
    CalibrationData,
    Counted,
    Source,
    calibration_data,
    calibration_facts,
    to_device,
)
from lightning_meansparse.callback.options import Where, check_globs, check_options
from lightning_meansparse.layer import Center
from lightning_meansparse.meeting import Meeting
from lightning_meansparse.moments import Statistics
from lightning_meansparse.sites import Site, find_sites
from lightning_meansparse.surgery import (
    alphas,
    calibrate_,
    images_in,
    operators,
    restore_,
    set_alpha,
    share_buffers,
    sparsify_,
)

logger = logging.getLogger(__name__)

_TRAINED = "Training itself has finished: the model holds the trained weights."


class MeanSparseCallback(Callback):
    """Sparsify and calibrate the model after ``fit``, and keep it so when it is evaluated.

    Training itself is untouched: it runs the base model, draws the same random numbers and ends
    with the same weights as without the callback, and so do the validations inside ``fit``. When it
    ends, in ``on_fit_end`` (after EMA and SWA callbacks have put their averages in, and after a
    resumed run that had nothing left to train), operators are inserted and one pass over the
    training data measures their statistics.

    ``trainer.validate``, ``test`` and ``predict`` then never see statistics of other weights. If
    the weights are not those that were measured, as with ``ckpt_path="best"``, the statistics come
    from the checkpoint if it holds them (it does when it was saved after fit), and else are
    measured again, which costs one pass over the training data and is logged. A model that was
    never fitted is handled alike, so the callback also works on a pretrained model without ``fit``.
    If there are no data to measure on, that is an error and not a silent base model.

    The pass runs the module's own ``forward(images)`` in eval mode, without gradients, on the
    trainer's device, through the module's and the datamodule's batch-transfer hooks, in the dtype
    of the weights with autocast off (bf16 rounding would blur the statistics). Under DDP every
    sample is counted on one rank once.

    Which data: ``dataloader``, else the datamodule's ``calibration_dataloader()``, else the
    training data set without shuffling. What that data set does to its images it still does; if
    it augments them at random a warning says so.

    Args:
        alpha: Half-width of the band in standard deviations; or ``{glob over site names: number}``.
            Site names are relative to the ``LightningModule``, e.g. ``"net.layer1.0.act1@in"``.
        where: Which sites, see `find_sites`.
        dataloader: Batches to calibrate on, or a function that gives them. Used as they are.
        max_batches: At most this many batches, over all ranks together. Of the training data set,
            evenly spread samples are taken; of a given loader, its first batches.
        statistics: ``"pooled"`` (exact) or ``"official"`` (the authors' averaging).
        center: What a sparsified value becomes, see `MeanSparse`.
        save_to: Write an adapter into this folder after every calibration (not under
            ``fast_dev_run``).
        base: Name of the base model for the adapter, such as ``"timm/resnet18"``.
        strict: Whether activations that cannot be reached are an error (before training starts) or
            a warning.

    Raises:
        ValueError: If an option is out of range.
        TypeError: If ``dataloader`` can be read only once, like a generator.

    Examples:
        >>> from lightning.pytorch import Trainer
        >>> callback = MeanSparseCallback(alpha=0.2, save_to="adapter")
        >>> trainer = Trainer(max_epochs=1, callbacks=[callback], logger=False)
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
        super().__init__()
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
        self._saved: Adapter | None = None  # of the checkpoint that the current run has loaded
        self._fitted: tuple[weakref.ref[Trainer], weakref.ref[LightningModule], Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to one process: the training data of the last fit."""
        return {**vars(self), "_fitted": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked, and give ``fit`` the base model."""
        self._saved = None
        if isinstance(trainer.strategy, (FSDPStrategy, DeepSpeedStrategy, ModelParallelStrategy)):
            raise ValueError(
                f"MeanSparseCallback does not support {type(trainer.strategy).__name__}, which "
                "splits the weights. Train without the callback, then run trainer.validate with it "
                "on one device or under DDP."
            )
        if self.save_to is not None and self.save_to.is_file():
            raise ValueError(f"save_to must be a folder, and {self.save_to} is a file.")
        if stage != TrainerFn.FITTING:
            for other in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(other, WeightAveraging):
                    # A copy left over from fit, whose averages are in the model by now. It would
                    # swap it with the model at every validation, tensor by tensor in tree order,
                    # which operators change, and load a checkpoint's raw weights in place of the
                    # averaged ones.
                    other._average_model = None
            return
        if not is_overridden("forward", pl_module):
            raise ValueError(
                f"{type(pl_module).__name__} has no forward(images), which MeanSparseCallback runs "
                "to calibrate. Add e.g. `def forward(self, x): return self.net(x)`."
            )
        if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher) and not self.save_to:
            rank_zero_warn(
                "this strategy trains in spawned processes, and only weights come back from them: "
                "after fit, the model in this process will be the base model. Pass "
                "MeanSparseCallback(save_to=...) and load_adapter, or use strategy='ddp'."
            )
        if operators(pl_module):
            rank_zero_info("MeanSparse: fit trains the base model; operators are out until it ends")
        restore_(pl_module)
        # EMA and SWA callbacks before us in the list have copied the model in their setup, and walk
        # both side by side.
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            for value in vars(other).values():
                if isinstance(value, nn.Module):
                    restore_(value)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the sites once before training: what is going to fail should fail now."""
        self._remember(trainer, pl_module)
        with self._neutral(trainer, pl_module):
            sites = self._find_sites(trainer, pl_module, self._data(trainer, pl_module))
        check_globs(self.alpha, sites)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Insert operators, calibrate, save."""
        self._remember(trainer, pl_module)
        device = pl_module.device
        try:
            pl_module.to(trainer.strategy.root_device)
            self._calibrate(trainer, pl_module, {})
        except Exception as error:
            error.add_note(_TRAINED)
            raise
        finally:
            pl_module.to(device)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Say in what state an interrupted fit leaves the model."""
        if trainer.state.fn != TrainerFn.FITTING or _TRAINED in getattr(exception, "__notes__", ()):
            return
        if trainer.is_global_zero:
            logger.warning(
                "fit ended early (%s): the model is the base model, without operators. Resume with "
                "trainer.fit(..., ckpt_path=...), or evaluate it: that calibrates it as it is.",
                type(exception).__name__,
            )

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `_before_evaluation`."""
        self._before_evaluation(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `_before_evaluation`."""
        self._before_evaluation(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See `_before_evaluation`."""
        self._before_evaluation(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """A mark, so that loading a checkpoint without the callback makes Lightning warn."""
        return {"config": None}

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put the statistics into the checkpoint, if there are any that belong to its weights."""
        if not _calibrated(pl_module):
            return
        if provenance(pl_module) == "stale":
            logger.warning(
                "the weights have changed since the statistics were measured, so the checkpoint is "
                "saved without them; loading it will measure them again"
            )
            return
        adapter = describe(pl_module, base=self.base, statistics=self.statistics)
        checkpoint["callbacks"][self.state_key] = {
            "config": adapter.config(),
            "tensors": dict(adapter.tensors),
            "where": self._where_text(),
        }

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the statistics of the checkpoint until its weights are on the device."""
        state = checkpoint["callbacks"].get(self.state_key) or {}
        if trainer.state.fn == TrainerFn.FITTING or not state.get("config"):
            return
        saved = from_checkpoint(checkpoint, "the checkpoint")
        asked = (self.center, self.statistics, self._where_text())
        if (saved.center, saved.statistics, state.get("where")) == asked:
            self._saved = saved
        else:
            rank_zero_info("MeanSparse: the checkpoint's statistics are for other options")

    def _before_evaluation(self, trainer: Trainer, model: LightningModule) -> None:
        """Make sure that the model is sparsified with statistics of the weights it has."""
        saved, self._saved = self._saved, None
        if trainer.state.fn == TrainerFn.FITTING:
            return
        before = alphas(model) if _calibrated(model) else {}
        if before and provenance(model) != "stale":
            if not isinstance(self.alpha, Mapping) and set(before.values()) != {self.alpha}:
                rank_zero_info(
                    f"MeanSparse: the model keeps the alpha that it has, not the callback's "
                    f"{self.alpha}; use set_alpha(model, {self.alpha}) to change it"
                )
            return
        if saved is not None:
            restore_(model)
            try:
                insert(model, saved)
            except ValueError as error:
                rank_zero_info(f"MeanSparse: the statistics in the checkpoint do not fit: {error}")
            else:
                self._set_alpha(model, before)
                rank_zero_info("MeanSparse: statistics taken from the checkpoint")
                return
        why = "belong to other weights" if before else "are missing"
        rank_zero_info(f"MeanSparse: the statistics {why}, so they are measured now")
        self._calibrate(trainer, model, before)

    def _where_text(self) -> str | None:
        """``where`` as text to compare by; code cannot be compared."""
        return None if callable(self.where) else repr(self.where)

    def _calibrate(
        self, trainer: Trainer, model: LightningModule, before: Mapping[str, float]
    ) -> None:
        """Insert operators unless they are there, measure, set α, save; or leave the base model."""
        try:
            # Evaluation hooks run in inference mode, whose tensors can never be trained again.
            with torch.inference_mode(False), self._neutral(trainer, model):
                data = self._data(trainer, model)
                if not operators(model):
                    sites = self._find_sites(trainer, model, data)
                    sparsify_(model, sites, center=self.center)
                rank_zero_info(
                    f"MeanSparse: measuring {len(operators(model))} sites on {data.origin}"
                )
                counted = Counted(to_device(trainer, batch) for batch in data.batches())
                share_buffers(model)
                calibrate_(model, counted, statistics=self.statistics)
                self._set_alpha(model, before)
                seen = torch.tensor(counted.images, device=trainer.strategy.root_device)
                images = int(trainer.strategy.reduce(seen, reduce_op="sum"))
                facts = calibration_facts(data, trainer, images)
                mark_measured(model, self.statistics, {"calibration": facts})
        except BaseException:
            restore_(model)
            raise
        self._save(trainer, model)

    def _set_alpha(self, model: LightningModule, before: Mapping[str, float]) -> None:
        """α as configured; but what was set on these same operators by hand stays."""
        set_alpha(model, before if before.keys() == operators(model).keys() else self.alpha)

    def _save(self, trainer: Trainer, model: LightningModule) -> None:
        if self.save_to is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with Meeting().telling():  # a full disk is not for the others to wait for
            if trainer.is_global_zero:
                save_adapter(model, self.save_to, base=self.base, statistics=self.statistics)
                rank_zero_info(f"MeanSparse: adapter written to {self.save_to}")

    def _data(self, trainer: Trainer, model: LightningModule) -> CalibrationData:
        limit = self.max_batches
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            limit = min(limit or int(trainer.fast_dev_run), int(trainer.fast_dev_run))  # type: ignore[attr-defined]
        fitted = None
        if self._fitted is not None:
            last_trainer, last_model, loader = self._fitted
            fitted = loader if last_trainer() is trainer or last_model() is model else None
        return calibration_data(trainer, model, self.dataloader, max_batches=limit, fitted=fitted)

    def _find_sites(
        self, trainer: Trainer, model: LightningModule, data: CalibrationData
    ) -> tuple[Site, ...]:
        example = images_in(to_device(trainer, data.example()))[:2]
        return find_sites(model, example, where=self.where, strict=self.strict)

    def _remember(self, trainer: Trainer, model: LightningModule) -> None:
        loader = trainer.train_dataloader
        if loader is not None:
            self._fitted = (weakref.ref(trainer), weakref.ref(model), loader)

    @contextmanager
    def _neutral(self, trainer: Trainer, model: LightningModule) -> Iterator[None]:
        """A forward pass that leaves no trace: neither in the random numbers nor in the stage."""
        precision = trainer.precision_plugin
        mixed = isinstance(precision, MixedPrecision)
        stage = trainer.state.stage
        with isolate_rng(), nullcontext() if mixed else precision.forward_context():
            try:
                if stage == RunningStage.TRAINING:
                    # Batch hooks ask for it to decide whether to augment.
                    trainer.state.stage = RunningStage.VALIDATING
                with torch.no_grad():
                    yield
            finally:
                trainer.state.stage = stage


def _calibrated(model: nn.Module) -> bool:
    return any(bool(op.var.any()) for op in operators(model).values())
