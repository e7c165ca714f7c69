"""What the operators do to the values that pass: shares replaced, and one channel's histogram."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_meansparse.layer import MeanSparse
from lightning_meansparse.surgery import alpha_set, evaluating, operators

FORMAT_VERSION = 1
_REACH = 4.0
"""Half-width of a histogram, in standard deviations."""

ENOUGH = 512
"""Images to count on, of all ranks together: each costs a forward pass at every alpha."""


class Occupancy:
    """Counts, per site, alpha and channel, how many values the operator replaces.

    Args:
        model: A sparsified and calibrated classifier.
        alphas: The alphas to count at.
        rename: From a site's name in `model` to the name to write.
    """

    def __init__(
        self,
        model: nn.Module,
        alphas: Sequence[float],
        *,
        rename: Callable[[str], str] = lambda name: name,
    ) -> None:
        self.alphas = tuple(alphas)
        self.rename = rename
        self.images = 0
        channels = {name: op.mean.numel() for name, op in operators(model).items()}
        self.replaced = {
            name: torch.zeros(len(self.alphas), n, dtype=torch.float64)
            for name, n in channels.items()
        }
        self.seen = dict.fromkeys(channels, 0.0)

    def update(self, model: nn.Module, images: Tensor) -> None:
        """Run one batch at every alpha, each with all sites at work, and count."""
        self.images += len(images)
        for place, alpha in enumerate(self.alphas):

            def count(name: str, op: MeanSparse, x: Tensor, place: int = place) -> None:
                self.replaced[name][place] += _replaced(op, x)
                if place == 0:
                    self.seen[name] += x.numel() / op.mean.numel()

            with alpha_set(model, alpha), _watching(model, count):
                _forward(model, images)

    def reduce(self, merge: Callable[[Tensor], Tensor]) -> None:
        """Merge the counts of all ranks; `merge` sums a float64 tensor over them."""
        for name in self.replaced:
            self.replaced[name] = merge(self.replaced[name])
            self.seen[name] = merge(torch.tensor(self.seen[name], dtype=torch.float64)).item()
        self.images = round(merge(torch.tensor(float(self.images), dtype=torch.float64)).item())

    def content(self, histogram: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what sites.json holds."""
        return {
            "format_version": FORMAT_VERSION,
            "alphas": list(self.alphas),
            "images": self.images,
            "sites": [
                {
                    "site": self.rename(name),
                    "channels": counts.shape[1],
                    "replaced": (counts.sum(1) / (counts.shape[1] * self.seen[name])).tolist(),
                }
                for name, counts in self.replaced.items()
            ],
            "histogram": histogram,
        }

    def typical(self, alpha: float) -> tuple[str, int]:
        """Return the channel to show: at the site with most values, the one nearest the median.

        Of equals the first, so the choice depends on nothing but the counts.
        """
        most = max(self.seen[name] * self.replaced[name].shape[1] for name in self.seen)
        site = next(n for n in self.seen if self.seen[n] * self.replaced[n].shape[1] == most)
        shares = self.replaced[site][self.alphas.index(alpha)]
        return site, int((shares - shares.median()).abs().argmin())

    def histogram(
        self,
        model: nn.Module,
        batches: Iterable[Tensor],
        alpha: float,
        merge: Callable[[Tensor], Tensor],
    ) -> dict[str, Any] | None:
        """Return one typical channel's values before and after the operator, or None.

        The bins are aligned with the band, whose edges are edges of bins: a bin is either emptied
        or left alone, and what is replaced piles up in the one around the mean.

        Args:
            model: As before.
            batches: Images.
            alpha: One of `alphas`, above 0.
            merge: As for `reduce`, which comes first.
        """
        site, channel = self.typical(alpha)
        op = operators(model)[site]
        mean, std = (value.flatten()[channel].item() for value in (op.mean, op.var.sqrt()))
        if not std > 0:
            return None
        inner = max(0, round(alpha / 0.1 - 0.5))
        width = alpha * std / (inner + 0.5)
        outer = int(_REACH * std / width)
        edges = mean + width * (torch.arange(2 * outer + 2, dtype=torch.float64) - outer - 0.5)
        counts = torch.zeros(2, len(edges) - 1, dtype=torch.float64)

        def count(name: str, operator: MeanSparse, x: Tensor) -> None:
            if name == site:
                # forward, as calling the operator would come back here.
                for row, values in enumerate((x, operator.forward(x))):
                    one = _by_channel(operator, values)[channel].double().cpu()
                    counts[row] += torch.histogram(one, edges).hist

        with alpha_set(model, alpha), _watching(model, count):
            for images in batches:
                _forward(model, images)
        counts = merge(counts)
        return {
            "site": self.rename(site),
            "channel": channel,
            "mean": mean,
            "std": std,
            "alpha": alpha,
            "edges": edges.tolist(),
            "before": counts[0].long().tolist(),
            "after": counts[1].long().tolist(),
        }


def _forward(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad(), evaluating(model), torch.autocast(images.device.type, enabled=False):
        model(images)


@contextmanager
def _watching(model: nn.Module, count: Callable[[str, MeanSparse, Tensor], None]) -> Iterator[None]:
    """Hand what reaches each operator to `count`."""

    def seen(name: str, op: nn.Module, args: tuple[Tensor, ...]) -> None:
        count(name, op, args[0].detach())  # type: ignore[arg-type]

    handles = [
        op.register_forward_pre_hook(partial(seen, name)) for name, op in operators(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _replaced(op: MeanSparse, x: Tensor) -> Tensor:
    """How many values of each channel the operator replaces, `(channels,)` float64.

    By the operator's own definition, not by comparing its output with its input: a value that is
    the mean already counts as replaced.
    """
    inside = (x - op.reference).abs() < op.alpha * op.var.sqrt()
    return _by_channel(op, inside).sum(1, dtype=torch.float64).cpu()


def _by_channel(op: MeanSparse, x: Tensor) -> Tensor:
    """Values `(channels, …)` of `x`, channels in the order of `op.mean.flatten()`."""
    shape = op.mean.shape
    axes = [i - len(shape) for i, size in enumerate(shape) if size > 1]
    axes = axes or [-len(shape)]
    return x.movedim(axes, list(range(len(axes)))).flatten(0, len(axes) - 1).flatten(1)
