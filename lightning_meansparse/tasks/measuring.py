"""One split of a sweep: its rounds one after the other, each batch once, all ranks together."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_meansparse.attacks import CHECKS, BaseExamples, Evaluation, check_eps, evaluate
from lightning_meansparse.callback.batches import to_device
from lightning_meansparse.records import SCHEMA, rows
from lightning_meansparse.surgery import alpha_set
from lightning_meansparse.tasks import facts
from lightning_meansparse.tasks.batches import images_and_labels
from lightning_meansparse.tasks.journal import Journal
from lightning_meansparse.tasks.ranks import merged_table, shared_table
from lightning_meansparse.tasks.rounds import Plan, Round
from lightning_meansparse.tasks.samples import Samples, loader_of

if TYPE_CHECKING:
    from lightning_meansparse.tasks.sweep import AlphaSweep

_log = logging.getLogger(__name__)

Measured = tuple[pa.Table, dict[str, Tensor]]
"""Rows of one batch at all alphas of a round, and its adversarial examples if they are kept."""


class Measurement:
    """Carries out a plan on one split of a sweep.

    The processes deal the samples of each round among them by clean margin. What the journal holds
    is not measured again, whoever measured it. The processes meet before a round and after it, and
    never inside: the plan sees the rows of all.

    Args:
        sweep: Says how to attack, and what.
        plan: Says what to measure.
        split: Name of the split.
        samples: Of the split.
        journal: Where rows are kept and found.

    Attributes:
        rounds: All rounds so far, with the next one.
        table: The rows of all finished rounds, of all processes.
        fresh: Whether anything has to be measured that is not in the records.
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
        self.table = SCHEMA.empty_table()
        self._margins: list[Tensor] = []  # one per batch of this process
        self._at_once: int | None = None  # images per forward pass, once that is known
        self._next = self._first_unknown()
        self.fresh = self._next is not None
        if not self.fresh and journal.rank == 0:
            _log.info("%s: everything is in the records, nothing is measured again", split)

    def look(self, images: Tensor, labels: Tensor) -> None:
        """Find out the clean margins of the base model on this process's next batch, if needed."""
        if not self.fresh:
            return
        with alpha_set(self.sweep.classifier, 0.0):
            self._margins.append(self._evaluated(images, labels, attacks=()).margin)
        given = self.samples.given[self.samples.rank]
        self.sweep.progress.looked(self.split, sum(map(len, self._margins)), len(given))

    def complete(self, loader: DataLoader[Any]) -> pa.Table:
        """Carry out all rounds that are left, after a look at every batch.

        Args:
            loader: The trainer's.

        Returns:
            The rows of all rounds, of all processes.
        """
        if self._next is not None:
            self.sweep.together.meet()
            clean = torch.cat([torch.zeros(0), *self._margins])
            margins = self.samples.in_order(clean, self.sweep.device)
        while self._next is not None:
            self._add(self._measured(self._next, margins, loader))
            self._next = self._first_unknown()
        return self.table

    def batches(
        self, loader: DataLoader[Any], numbers: Sequence[Tensor]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield numbers, images and labels of samples; hear of the others, and meet them at last.

        Args:
            loader: The trainer's.
            numbers: Of the samples of each batch on this rank.
        """
        for some, batch in zip(numbers, loader_of(loader, numbers), strict=True):
            self.sweep.together.listen()
            yield some, *images_and_labels(to_device(self.sweep.trainer, batch))
        self.sweep.together.meet()

    def _first_unknown(self) -> Round | None:
        """The next round that is not in the records; those that are go into the table."""
        while (round := self.plan.next(self.table)) is not None:
            self.rounds.append(round)
            known = self.journal.finished(self.split, round)
            if known is None:
                return round
            self._add(known)
        return None

    def _add(self, rows: pa.Table) -> None:
        self.table = pa.concat_tables([self.table, rows])

    def _measured(self, round: Round, margins: Tensor, loader: DataLoader[Any]) -> pa.Table:
        """The rows of one round, of all processes: those that are kept, and the others measured."""
        about = facts.about_rounds(self.sweep, self.rounds)
        self.journal.about["rounds"] = {**self.sweep.rounds, self.split: about}
        # One process reads for all: they must agree, and others may soon write.
        first = self.journal.rank == 0
        rows = self.journal.measured(self.split, round) if first else SCHEMA.empty_table()
        self.sweep.together.meet()
        known = shared_table(rows, self.sweep.device)
        indices = torch.tensor(pc.unique(known["index"]).to_pylist(), dtype=torch.int64)
        if len(indices) and first:
            _log.info(
                "%s, round %s: going on, %d of %d samples were measured before",
                self.split,
                round.name,
                len(indices),
                len(self.samples.of(round)),
            )
        hand = self.samples.hand(round, margins)
        left = [batch[~torch.isin(batch, indices)] for batch in hand]
        left = [batch for batch in left if len(batch)]
        mine = sum(map(len, hand))
        self.sweep.progress.begin(
            self.split,
            round,
            samples=mine,
            before=mine - sum(map(len, left)),
            evaluations=evaluations(self.table) + evaluations(known),
        )
        found = [SCHEMA.empty_table()]
        for numbers, images, labels in self.batches(loader, left):
            table, examples = self._attack(images, labels, numbers, round)
            self.journal.keep(table, self.split, round, examples)
            found.append(table)
            self.sweep.progress.passed(len(numbers))
        self.sweep.progress.end()
        return pa.concat_tables([known, merged_table(pa.concat_tables(found), self.sweep.device)])

    def _attack(self, images: Tensor, labels: Tensor, indices: Tensor, round: Round) -> Measured:
        """Attack one batch at every alpha of a round; what alphas can share is made once."""
        sweep, progress = self.sweep, self.sweep.progress
        tables: list[pa.Table] = []
        examples: dict[str, Tensor] = {}
        pool = BaseExamples()
        for place, alpha in enumerate(round.alphas):
            progress.at(len(images), place, alpha)
            with alpha_set(sweep.classifier, alpha):
                evaluation = self._evaluated(
                    images,
                    labels,
                    attacks=round.attacks,
                    eps=round.eps,
                    indices=indices,
                    base=pool,
                    progress=progress.tell,
                    keep_examples=sweep.save_examples and bool(round.attacks),
                )
            tables.append(rows(evaluation, alpha=alpha, split=self.split, round=round.name))
            progress.spent(evaluations(tables[-1]))
            if evaluation.examples is not None:
                examples[f"alpha_{alpha:g}"] = evaluation.examples
        if examples:
            examples |= {"indices": indices, "labels": labels.cpu()}
        # In one piece: a chunk per column and alpha would take five times the memory of the rows.
        return pa.concat_tables(tables).combine_chunks(), examples

    def _evaluated(
        self, images: Tensor, labels: Tensor, *, eps: float | None = None, **options: Any
    ) -> Evaluation:
        """What the classifier says to images, as it is set now; hear of the others before."""
        self.sweep.together.listen()
        evaluation = evaluate(
            self.sweep.classifier,
            images,
            labels,
            eps=self.sweep.eps if eps is None else eps,
            norm=self.sweep.norm,
            seed=self.sweep.seed,
            listen=self.sweep.together.listen,
            batch_size=self._at_once,
            **options,
        )
        self._at_once = evaluation.batch_size
        return evaluation


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
