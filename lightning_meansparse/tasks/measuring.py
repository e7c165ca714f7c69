"""One split of a sweep: its rounds one after the other, each batch once, all ranks together."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_meansparse.attacks import CHECKS, BaseExamples, check_eps, evaluate
from lightning_meansparse.records import SCHEMA, rows
from lightning_meansparse.surgery import alpha_set
from lightning_meansparse.tasks import facts
from lightning_meansparse.tasks.batches import Transferred
from lightning_meansparse.tasks.journal import Journal
from lightning_meansparse.tasks.ranks import merged_table
from lightning_meansparse.tasks.rounds import Plan, Round
from lightning_meansparse.tasks.samples import Samples, loader_of, with_margins

if TYPE_CHECKING:
    from lightning_meansparse.tasks.sweep import AlphaSweep

_log = logging.getLogger(__name__)

Measured = tuple[pa.Table, dict[str, Tensor]]
"""Rows of one batch at all alphas of a round, and its adversarial examples if they are kept."""


class Measurement:
    """Carries out a plan on one split of a sweep.

    One process measures batches as the trainer's loader gives them; several deal the samples of
    each round among them by clean margin. What the journal holds is not measured again. Between
    rounds, and only there, the ranks meet: the plan sees the rows of all.

    Args:
        sweep: Says how to attack, and what.
        plan: Says what to measure.
        split: Name of the split.
        samples: Of the split.
        journal: Where rows are kept and found.

    Attributes:
        round: The current round; None when all is measured.
        rounds: All rounds so far, with the current one.
        fresh: Whether anything had to be measured that was not in the records.
    """

    def __init__(
        self, sweep: AlphaSweep, plan: Plan, split: str, samples: Samples, journal: Journal
    ) -> None:
        self.sweep = sweep
        self.plan = plan
        self.split = split
        self.samples = samples
        self.journal = journal
        self.rounds: list[Round] = []
        self.fresh = False
        self._merged: list[pa.Table] = []
        self._parts: dict[int, pa.Table] = {}
        self._todo: dict[int, Tensor] = {}
        self._at_once = 256  # images per forward pass; fewer once the memory has run out
        self.round: Round | None = None
        self._advance()

    @property
    def table(self) -> pa.Table:
        """The rows of all finished rounds, of all ranks."""
        return pa.concat_tables([SCHEMA.empty_table(), *self._merged])

    def add(self, batch: int, images: Tensor, labels: Tensor) -> None:
        """Measure what the current round wants of a batch of the loader, unless it is measured.

        Among several processes nothing is: what a rank measures is not what its loader gives.
        """
        if self.samples.margins is None:
            self._add(batch, self.samples.batches[batch], images, labels)

    def complete(self, loader: DataLoader[Any]) -> pa.Table:
        """Finish the current round, and carry out all that follow.

        Args:
            loader: The trainer's.

        Returns:
            The rows of all rounds, of all ranks.
        """
        while self.round is not None:
            left = list(self._todo.items())
            mine = loader_of(loader, [numbers for _, numbers in left])
            batches = Transferred(self.sweep.trainer, mine)
            for (batch, numbers), (images, labels) in zip(left, batches, strict=True):
                self._add(batch, numbers, images, labels)
            self.sweep.progress.end()
            parts = [self._parts[batch] for batch in sorted(self._parts)]
            rows = pa.concat_tables([SCHEMA.empty_table(), *parts])
            self.sweep.together.meet()
            self._merged.append(merged_table(rows, self.sweep.device))
            self._advance()
        return self.table

    def _add(self, batch: int, numbers: Tensor, images: Tensor, labels: Tensor) -> None:
        wanted = self._todo.get(batch)
        if self.round is None or wanted is None:
            return
        here = torch.isin(numbers, wanted).nonzero().squeeze(1).to(images.device)
        table, examples = self._attack(images[here], labels[here], wanted, self.round)
        self.journal.keep(table, self.split, self.round, batch, examples)
        self._parts[batch] = table
        del self._todo[batch]
        self.sweep.progress.passed(len(wanted))

    def _advance(self) -> None:
        while (round := self.plan.next(self.table)) is not None:
            self.rounds.append(round)
            known = self.journal.finished(self.split, round)
            if known is None:
                self._open(round)
                break
            self._merged.append(known)
        self.round = round
        if round is None and not self.fresh and self.journal.rank == 0:
            _log.info("%s: everything is in the records, nothing is measured again", self.split)

    def _open(self, round: Round) -> None:
        self.fresh = True
        hand = enumerate(self.samples.hand(round))
        wanted = {batch: numbers for batch, numbers in hand if len(numbers)}
        found = {
            batch: self.journal.part(self.split, round, batch, numbers)
            for batch, numbers in wanted.items()
        }
        self._parts = {batch: part for batch, part in found.items() if part is not None}
        self._todo = {b: numbers for b, numbers in wanted.items() if b not in self._parts}
        about = facts.about_rounds(self.sweep, self.rounds)
        self.journal.about["rounds"] = {**self.sweep.rounds, self.split: about}
        if self._parts and self.journal.rank == 0:
            _log.info(
                "%s, round %s: going on, %d of %d batches were measured before",
                self.split,
                round.name,
                len(self._parts),
                len(wanted),
            )
        self.sweep.progress.begin(
            self.split,
            round,
            samples=sum(map(len, wanted.values())),
            before=sum(len(wanted[batch]) for batch in self._parts),
            evaluations=sum(map(evaluations, [*self._merged, *self._parts.values()])),
        )

    def _attack(self, images: Tensor, labels: Tensor, indices: Tensor, round: Round) -> Measured:
        """Attack one batch at every alpha of a round; what alphas can share is made once."""
        sweep, progress = self.sweep, self.sweep.progress
        tables: list[pa.Table] = []
        examples: dict[str, Tensor] = {}
        pool = BaseExamples()
        for place, alpha in enumerate(round.alphas):
            progress.at(len(images), place, alpha)
            with alpha_set(sweep.classifier, alpha):
                evaluation = evaluate(
                    sweep.classifier,
                    images,
                    labels,
                    attacks=round.attacks,
                    eps=sweep.eps if round.eps is None else round.eps,
                    norm=sweep.norm,
                    seed=sweep.seed,
                    indices=indices,
                    base=pool,
                    progress=progress.tell,
                    listen=sweep.together.listen,
                    batch_size=self._at_once,
                    keep_examples=sweep.save_examples and bool(round.attacks),
                )
            self._at_once = evaluation.batch_size
            tables.append(rows(evaluation, alpha=alpha, split=self.split, round=round.name))
            progress.spent(evaluations(tables[-1]))
            if evaluation.examples is not None:
                examples[f"alpha_{alpha:g}"] = evaluation.examples
        if examples:
            examples |= {"indices": indices, "labels": labels.cpu()}
        # In one piece: a chunk per column and alpha would take five times the memory of the rows.
        return pa.concat_tables(tables).combine_chunks(), examples


def by_margin(sweep: AlphaSweep, samples: Samples, loader: Iterable[Any]) -> Samples:
    """Let several processes deal the samples by the clean margins of the base model.

    Args:
        sweep: With operators.
        samples: Of the split.
        loader: What gives this rank's batches of them.
    """
    if sweep.trainer.world_size == 1:
        return samples
    margins = [torch.zeros(0)]
    for images, labels in Transferred(sweep.trainer, islice(loader, len(samples.batches))):
        with alpha_set(sweep.classifier, 0.0):
            clean = evaluate(
                sweep.classifier,
                images,
                labels,
                attacks=(),
                eps=sweep.eps,
                norm=sweep.norm,
                listen=sweep.together.listen,
            )
        margins.append(clean.margin)
    sweep.together.meet()
    return with_margins(samples, torch.cat(margins), sweep.device)


def check_rounds(
    alphas: tuple[float, ...], images: int, *, eps: float, norm: str, shape: Sequence[int]
) -> list[Round]:
    """Return one round per check of the evaluation, each attack alone.

    Args:
        alphas: Ascending, with 0.
        images: On the first so many samples; 0 for no checks.
        eps: Radius of the evaluation that is checked.
        norm: Of the ball.
        shape: Of one image, `(C, H, W)`.
    """
    return [
        Round(f"check:{name}", alphas, (spec,), stop=images, eps=check_eps(name, eps, norm, shape))
        for name, spec in (CHECKS.items() if images else ())
    ]


def evaluations(table: pa.Table) -> int:
    """Forward and backward passes that a table's rows have cost, counted per sample."""
    return sum(pc.sum(table.column(name)).as_py() or 0 for name in ("forwards", "backwards"))
