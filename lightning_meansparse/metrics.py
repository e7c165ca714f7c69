"""Robust accuracy as a torchmetrics metric: clean, per attack, and the per-sample worst case."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_meansparse.attacks import (
    AttackSpec,
    Evaluation,
    check_norm,
    evaluate,
    parse_eps,
    resolve_attacks,
)


class RobustAccuracy(Metric):
    """Accuracy of a classifier under attack, as a per-sample worst case.

    With c[i] whether sample i is classified right, and r[i, a] whether it is on the example that
    attack a found,

        worst = 1/n · Σ_i c[i] · Π_a r[i, a]

    Only samples that still stand are attacked, one attack after the other, so
    ``robust_acc/<attack>`` is what is left after this attack *and all before it*: the values fall
    from left to right, and the last equals the worst case.

    ``update`` takes the classifier, which is never kept: ``clone`` and ``state_dict`` stay small.

    As input to ``update``:

    - ``classifier``: a module from pixels to logits, e.g. a
      `Classifier`
    - ``images``: float tensor ``(N, C, H, W)`` in [0, 1]
    - ``labels``: int64 tensor ``(N,)``
    - ``indices``: int64 tensor ``(N,)``, numbers of the samples in their data set; optional in one
      process. A sample that appears more than once counts once, which makes the result exact where
      a distributed sampler repeats samples. Without them every sample counts.

    As output of ``compute``: a dictionary of 0-d float tensors, fractions: ``clean_acc``,
    ``robust_acc/<attack>`` for each attack, ``robust_acc/worst``.

    Args:
        attacks: Suite, attack, or several, as `resolve_attacks`
            takes them.
        eps: Radius of the ball in pixel units; a number or a fraction such as ``"8/255"``.
        norm: ``"Linf"`` or ``"L2"``.
        seed: Seed of all attacks.
        batch_size: Samples per forward pass of an attack, see `evaluate`.
        kwargs: Arguments of `Metric`.

    Attributes:
        evaluation: Per-sample result of the last ``update``, an
            `Evaluation`.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, or ``compute`` is called before any sample.

    Examples:
        >>> images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 1, 0])
        >>> classifier = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
        >>> metric = RobustAccuracy("fgsm", eps="8/255")
        >>> metric.update(classifier, images, labels)
        >>> sorted(metric.compute())
        ['clean_acc', 'robust_acc/fgsm', 'robust_acc/worst']
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False  # otherwise forward() would run every attack twice
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    index: list[Tensor]
    clean: list[Tensor]
    standing: list[Tensor]
    config: Tensor

    def __init__(
        self,
        attacks: str
        | AttackSpec
        | Mapping[str, Any]
        | Sequence[str | AttackSpec | Mapping[str, Any]] = "standard",
        *,
        eps: float | str,
        norm: str = "Linf",
        seed: int = 0,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        check_norm(norm)
        self.attacks = resolve_attacks(attacks)
        self.eps = parse_eps(eps, norm)
        self.norm = norm
        self.seed = seed
        self.batch_size = batch_size
        self.evaluation: Evaluation | None = None
        for name in ("index", "clean", "standing"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        # MetricCollection merges metrics whose states are equal after one batch; two radii may well
        # agree on one.
        settings = [[spec.as_dict() for spec in self.attacks], self.eps, norm, seed]
        digest = zlib.crc32(json.dumps(settings, default=str).encode())
        self.add_state("config", default=torch.tensor(digest), dist_reduce_fx="max")

    def update(
        self,
        classifier: nn.Module,
        images: Tensor,
        labels: Tensor,
        indices: Tensor | None = None,
    ) -> None:
        """Attack one batch; see the class for the arguments."""
        seen = sum(len(part) for part in self.index)
        numbered = indices is not None
        if seen and numbered == bool((self.index[0] < 0).any()):
            raise ValueError(
                "indices must be given in every update or in none: with them samples that repeat "
                "count once, without them nobody can tell."
            )
        numbers = indices if indices is not None else torch.arange(seen, seen + len(images))
        evaluation = evaluate(
            classifier,
            images,
            labels,
            attacks=self.attacks,
            eps=self.eps,
            norm=self.norm,
            seed=self.seed,
            indices=numbers,
            batch_size=self.batch_size,
        )
        self.evaluation = evaluation
        self.batch_size = evaluation.batch_size  # fewer from now on, where the memory ran out
        # Negative: not a number in a data set, so ranks may hold equal ones of different samples.
        kept = evaluation.indices if numbered else -1 - evaluation.indices
        self.index.append(kept.to(self.device))
        self.clean.append(evaluation.clean.to(self.device))
        self.standing.append(evaluation.standing.to(self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """Gather the states of all ranks; a rank may have seen nothing."""
        if not self.index:
            # torchmetrics would send an empty float vector, which no other rank can take.
            self.index.append(torch.empty(0, dtype=torch.int64, device=self.device))
            self.clean.append(torch.empty(0, dtype=torch.bool, device=self.device))
            self.standing.append(
                torch.empty(0, len(self.attacks), dtype=torch.bool, device=self.device)
            )
        super().sync(*args, **kwargs)

    def compute(self) -> dict[str, Tensor]:
        """Fractions over all samples; see the class for the names.

        Raises:
            ValueError: If there is no sample.
        """
        index = dim_zero_cat(self.index) if len(self.index) else torch.empty(0)
        if len(index) == 0:
            raise ValueError(
                "RobustAccuracy has seen no sample; call update(classifier, images, labels) "
                "before compute()."
            )
        first = _first_occurrence(index) if bool((index >= 0).all()) else slice(None)
        clean = dim_zero_cat(self.clean)[first]
        standing = dim_zero_cat(self.standing)[first]
        result = {"clean_acc": clean.float().mean()}
        for a, spec in enumerate(self.attacks):
            result[f"robust_acc/{spec.name}"] = standing[:, a].float().mean()
        result["robust_acc/worst"] = standing[:, -1].float().mean()
        return result


def _first_occurrence(index: Tensor) -> Tensor:
    """Positions of the first occurrence of each value."""
    order = index.argsort(stable=True)
    values = index[order]
    fresh = torch.ones_like(values, dtype=torch.bool)
    fresh[1:] = values[1:] != values[:-1]
    return order[fresh]
