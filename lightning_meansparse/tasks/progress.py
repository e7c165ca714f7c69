"""What a sweep is doing and for how long still: a bar in a terminal, or some lines in a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lightning_meansparse.attacks import AttackSpec
from lightning_meansparse.records import MAIN
from lightning_meansparse.tasks.rounds import Round

_log = logging.getLogger(__name__)

_EVERY = 30.0
"""Seconds between two lines in a log."""

_T = TypeVar("_T")


class SweepProgress:
    """Shows split, round, samples, alpha, attack, model evaluations and the time left of the round.

    The time left weighs attacks by their budgets: a round is one tenth done when a tenth of the
    work is, not of the batches. Which rounds follow depends on what is found, so nobody knows more.
    In a terminal it replaces the trainer's own bar, which sees batches only; elsewhere a line goes
    to the log at most every half minute.

    Args:
        console: Where to draw; None for stderr.
    """

    def __init__(self, *, console: Console | None = None) -> None:
        # Made when it is first needed: a console cannot be pickled, as spawned processes want.
        self.console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._hidden: ProgressBar | None = None
        self._shown = self._draws = False
        self._title = self._where = ""
        self._work: list[float] = []
        self._alphas = 1
        self._samples = self._passed = self._before = 0
        self._batch = self._place = self._step = 0
        self._evaluations = 0
        self._begun = self._told = 0.0

    def take_over(self, trainer: Trainer) -> None:
        """Take the place of the trainer's own bar, if it has one."""
        if self.console is None:
            self.console = Console(stderr=True)
        own = trainer.progress_bar_callback
        self._shown = own is not None and trainer.is_global_zero
        self._draws = self._shown and (self.console.is_terminal or self.console.is_jupyter)
        if own is not None:
            own.disable()
            self._hidden = own

    def through(self, batches: Iterable[_T], title: str) -> Iterator[_T]:
        """Yield batches, and show how many went by."""
        self._draw(title, len(batches) if isinstance(batches, Sized) else None)
        for number, batch in enumerate(batches):
            yield batch
            self._show(number + 1, left="", now="")
        self.end()

    def looked(self, split: str, images: int, total: int) -> None:
        """Say that so many clean images of a split have been looked at, of so many."""
        if self._bar is None:
            self._draw(f"{split} · clean images", total)
        self._show(images, left="", now="")
        if images == total:
            self.end()

    def begin(self, split: str, round: Round, samples: int, before: int, evaluations: int) -> None:
        """Start with one round.

        Args:
            split: Name of the split.
            round: The round.
            samples: How many samples it has on this rank.
            before: How many of them were measured by an earlier run.
            evaluations: Model evaluations spent on this split so far, on all ranks; to those of
                this round only this rank's are added until it ends.
        """
        self._title = split if round.name == MAIN else f"{split} · {round.name}"
        self._work = [1.0, *(work(spec) for spec in round.attacks)]
        self._alphas = len(round.alphas)
        self._samples, self._passed, self._before = samples, before, before
        self._evaluations = evaluations
        self._begun = self._told = time.monotonic()
        self._draw(self._title, 1.0)

    def at(self, images: int, place: int, alpha: float) -> None:
        """Say that so many images come next, at this alpha, which has this place in the round."""
        self._batch, self._place, self._step = images, place, 0
        self._where = f"α = {alpha:g}"

    def tell(self, text: str) -> None:
        """Say which attack comes next; `evaluate` calls this before each."""
        whole = self._alphas * sum(self._work)
        within = self._place * sum(self._work) + sum(self._work[: self._step])
        self._step += 1
        done = self._passed * whole + self._batch * within
        share = done / (self._samples * whole)
        now = time.monotonic()
        fresh = share - self._before / self._samples
        left = _duration((now - self._begun) * (1 - share) / fresh) if fresh > 0 else "unknown time"
        text = (
            f"{self._passed:,}/{self._samples:,} images · {self._where} · {text} · "
            f"{_many(self._evaluations)} evaluations"
        )
        self._show(share, left=left, now=text)
        if self._bar is None and self._shown and now - self._told >= _EVERY:
            self._told = now
            _log.info("%s: %.0f %%, about %s left (%s)", self._title, 100 * share, left, text)

    def spent(self, evaluations: int) -> None:
        """Add the model evaluations of what was just measured."""
        self._evaluations += evaluations

    def passed(self, images: int) -> None:
        """Say that so many images are done at every alpha."""
        self._passed += images

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def give_back(self) -> None:
        """Leave the terminal as it was, and give the trainer its own bar back."""
        self.end()
        if self._hidden is not None:
            self._hidden.enable()
        self._hidden = None

    def _show(self, completed: float, *, left: str, now: str) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=completed, left=left, now=now)

    def _draw(self, title: str, total: float | None) -> None:
        self.end()
        if not self._draws:
            return
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]} left"),
            TextColumn("[dim]{task.fields[now]}"),
            console=self.console,
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(title, total=total, left="?", now="")


def work(spec: AttackSpec) -> float:
    """Roughly how many forward passes an attack spends on a sample that withstands it."""
    options = spec.options
    passes = 0.0
    for name in ("n_queries", "steps"):
        value = options.get(name)
        if isinstance(value, int):
            # A step goes forward and backward.
            passes = float(value if name == "n_queries" else 3 * value)
            break
    # Restarts for the few samples that are close hardly count.
    each = ("n_targets",) if options.get("close", 1) < 1 else ("n_restarts", "n_targets")
    for name in each:
        value = options.get(name)
        passes *= value if isinstance(value, int) and value > 0 else 1
    return max(passes, 1.0)


def _many(count: int) -> str:
    """A count in three digits or so: 940, 12.3 k, 4.56 M."""
    for size, unit in ((1_000_000, " M"), (1_000, " k")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
