"""Operators with statistics for a classifier inside a sweep."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lightning_meansparse.adapter import load_adapter
from lightning_meansparse.adapter.base import mark_measured, provenance
from lightning_meansparse.callback.batches import Counted, calibration_data, calibration_facts
from lightning_meansparse.classifier import Classifier
from lightning_meansparse.sites import Site, find_sites
from lightning_meansparse.surgery import (
    calibrate_among,
    evaluating,
    images_in,
    operators,
    restore_,
    sparsify_,
)
from lightning_meansparse.tasks.ranks import summed

if TYPE_CHECKING:
    from lightning_meansparse.tasks.sweep import AlphaSweep

_log = logging.getLogger(__name__)

Where = str | Sequence[str] | Callable[[Site], bool]


def calibrated(sweep: AlphaSweep, measured: Path | None) -> dict[str, Any] | None:
    """Insert and calibrate operators in the classifier of a sweep, unless it has sound ones.

    Args:
        sweep: Within a run of a trainer with a datamodule. Names of sites are relative to the
            network inside the classifier.
        measured: Adapter with the sites and statistics that an earlier run of it measured.

    Returns:
        Facts about the calibration; None if there was nothing to do.

    Raises:
        RuntimeError: If there are no training images to calibrate on.
    """
    classifier = sweep.classifier
    found = operators(classifier)
    if sweep.alphas == (0.0,) and not found:
        return None  # the base model alone: nothing to sparsify
    if found and any(bool(op.var.any()) for op in found.values()):
        if provenance(classifier) != "stale":
            return None
        _log.warning("the weights have changed since the statistics were measured: once more")
    if measured is not None:
        restore_(classifier)
        return dict(load_adapter(classifier, measured).calibration or {})
    datamodule: Any = getattr(sweep.trainer, "datamodule", None)
    if not hasattr(datamodule, "calibration_dataloader") and not (
        datamodule is not None and is_overridden("train_dataloader", datamodule)
    ):
        raise RuntimeError(
            "AlphaSweep has no training images to calibrate on: give the trainer a datamodule with "
            "calibration_dataloader() or train_dataloader(), such as ImageDataModule, or the sweep "
            "an adapter"
        )
    data = calibration_data(sweep.trainer, sweep, None, max_batches=sweep.calibration_batches)
    if not found:
        images = images_in(data.example())[:2].to(sweep.device)
        sites = _sites(classifier, images, sweep.where, strict=sweep.strict)
        sparsify_(classifier.model, sites, center=sweep.center)
    _log.info("calibrating %d sites on %s", len(operators(classifier)), data.origin)
    counted = Counted(sweep.progress.through(data.batches(), "calibrating"))
    try:
        calibrate_among(sweep.together, classifier, counted, statistics=sweep.statistics)
    except BaseException:
        restore_(classifier)  # operators without statistics would pass for a sparsified model
        raise
    images_seen = summed(torch.tensor(counted.images), sweep.device)
    known = calibration_facts(data, sweep.trainer, int(images_seen))
    mark_measured(classifier, sweep.statistics, {"calibration": known})
    return known


def _sites(
    classifier: Classifier, images: Tensor, where: Where, *, strict: bool
) -> tuple[Site, ...]:
    """Sites with names relative to the network inside the classifier, which sees other values."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])

    handle = classifier.model.register_forward_pre_hook(keep)
    try:
        with evaluating(classifier), torch.no_grad():
            classifier(images)
    finally:
        handle.remove()
    return find_sites(classifier.model, seen[0], where=where, strict=strict)
