"""One pass over the training set that measures every operator's mean and variance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from lightning_meansparse.layer import MeanSparse
from lightning_meansparse.meeting import Meeting, Peers, collective
from lightning_meansparse.moments import ChannelMoments, Statistics
from lightning_meansparse.surgery.insertion import operators, shorten
from lightning_meansparse.surgery.wrapped import speechless

# What data sets and processors call the images of a batch.
IMAGE_KEYS = ("image", "images", "pixel_values")


def calibrate_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    max_batches: int | None = None,
    statistics: Statistics = "pooled",
    progress: bool = False,
) -> None:
    """Measure every operator's mean and variance in one pass, in place.

    The pass runs the base model: in eval mode, without gradients, with every operator letting its
    input through unchanged, and not compiled even if the model is. A second calibration overwrites
    the first; a failed one changes nothing. Under ``torch.distributed`` the statistics of all ranks
    are merged, so every rank must call it, with its own share of the data, which may be empty, and
    no sample on two ranks. Then the model may be wrapped in ``DistributedDataParallel`` or sharded
    by ``fully_shard``; during the pass it is whole on every rank. If one rank fails, all do.

    Args:
        model: A model with operators, see `sparsify_`.
        batches: Images ``(N, C, H, W)`` as the model takes them: tensors, tuples or lists that
            begin with one, or dicts with ``"image"``, ``"images"`` or ``"pixel_values"``. They
            are moved to the model's device and given as its first argument.
        max_batches: Stop after so many batches.
        statistics: ``"pooled"`` (exact) or ``"official"`` (the authors' averaging), see
            `ChannelMoments`.
        progress: Show a progress bar.

    Raises:
        RuntimeError: If the model has no operators, or an operator was never reached.
        ValueError: If there are no batches, a batch is of another form, or a site's values are not
            finite.
        ConnectionError: If another rank has failed; the message says why.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_meansparse import calibrate_, find_sites, sparsify_
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> sparsify_(model, find_sites(model, torch.rand(1, 3, 8, 8)), alpha=0.2)
        >>> calibrate_(model, [torch.rand(16, 3, 8, 8) for _ in range(4)])
    """
    if not operators(model):
        raise RuntimeError(
            "model has no MeanSparse operators to calibrate. Call sparsify_(model, sites) first."
        )
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be None or at least 1, got {max_batches}.")
    if progress:
        length = len(batches) if isinstance(batches, Sized) else max_batches
        total = length if max_batches is None or length is None else min(length, max_batches)
        batches = track(batches, description="Calibrating", total=total)
    with Meeting().telling() as peers:
        calibrate_among(peers, model, islice(batches, max_batches), statistics=statistics)


def calibrate_among(
    peers: Peers, model: nn.Module, batches: Iterable[Any], *, statistics: Statistics
) -> None:
    """Do the same among processes that have a meeting already, which hears of any that fails.

    Args:
        peers: The other processes; whoever opened the meeting tells them of an exception here.
        model: As for `calibrate_`, with operators.
        batches: As for `calibrate_`.
        statistics: As for `calibrate_`.

    Raises:
        RuntimeError: As `calibrate_`.
        ValueError: As `calibrate_`.
        ConnectionError: As `calibrate_`.
    """
    found = operators(model)
    moments = {
        name: ChannelMoments(tuple(op.mean.shape), statistics=statistics, device=op.mean.device)
        for name, op in found.items()
    }
    device = next(iter(found.values())).mean.device
    with (
        torch.no_grad(),
        evaluating(model),
        speechless(model) as alone,
        torch.compiler.set_stance("force_eager"),
        _observing(found, moments),
    ):
        for batch in batches:
            peers.listen()
            alone(images_in(batch).to(device))
    peers.meet()
    with collective():
        for each in moments.values():
            each.reduce()
    unseen = [name for name, each in moments.items() if each.count == 0]
    if len(unseen) == len(moments):
        raise ValueError("batches must give at least one image, got none.")
    if unseen:
        raise RuntimeError(
            f"the forward pass never reached {shorten(unseen)}: "
            "does the model run the way find_sites saw it?"
        )
    new = {name: (m.mean.float(), m.var.float()) for name, m in moments.items()}
    broken = [
        name
        for name, pair in new.items()
        if not all(bool(value.isfinite().all()) for value in pair)
    ]
    if broken:
        raise ValueError(
            f"values at {shorten(broken)} are not finite. Check the images and the model's weights."
        )
    for name, op in found.items():
        op.mean.copy_(new[name][0])
        op.var.copy_(new[name][1])
        op.count = moments[name].count


def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers of the first, whose model is the one that is saved.

    Weights are the same everywhere; the running statistics of batch norms are not after the last
    training step. Every process must call it.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, src=0)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the ``with`` block, and every module's own mode again after it."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in before:
            module.training = mode


@contextmanager
def _observing(
    found: Mapping[str, MeanSparse], moments: Mapping[str, ChannelMoments]
) -> Iterator[None]:
    """Let every operator pass its input on as it is, and count it, inside the ``with`` block."""

    def observe(seen: ChannelMoments, x: Tensor, **_: object) -> Tensor:
        seen.update(x)
        return x

    try:
        for name, op in found.items():
            op.forward = partial(observe, moments[name])  # type: ignore[method-assign]
        yield
    finally:
        for op in found.values():
            vars(op).pop("forward", None)


def images_in(batch: object) -> Tensor:
    """The images ``(N, C, H, W)`` of a batch, in whichever of the usual forms a loader gives it.

    Raises:
        ValueError: If it is none of a tensor, a sequence that begins with one, or a dict with one.
    """
    if isinstance(batch, Sequence) and not isinstance(batch, str) and batch:
        batch = batch[0]
    if isinstance(batch, Mapping):
        batch = next((batch[key] for key in IMAGE_KEYS if key in batch), batch)
    if isinstance(batch, Tensor):
        return batch
    raise ValueError(
        f"batches must hold image tensors, tuples that begin with one, or dicts with one of "
        f"{', '.join(map(repr, IMAGE_KEYS))}; got {type(batch).__name__}"
        + (f" with keys {sorted(map(str, batch))}" if isinstance(batch, Mapping) else "")
        + "."
    )
