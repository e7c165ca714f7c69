"""What a sweep is doing and for how long still: a bar in a terminal, or some lines in a log."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from lightning_meansparse.attacks import AttackSpec

_log = logging.getLogger(__name__)

_EVERY = 30.0
"""Seconds between two lines in a log."""


class SweepProgress:
    """Shows split, batch, alpha, attack and time left.

    The time left weighs attacks by their budgets: a sweep is one tenth done when a tenth of the
    work is, not of the batches. In a terminal it replaces the trainer's own bar, which sees batches
    only; elsewhere a line goes to the log at most every half minute.

    Args:
        attacks: The attacks that run at each alpha.
        console: Where to draw; None for stderr.
    """

    def __init__(self, attacks: Sequence[AttackSpec], *, console: Console | None = None) -> None:
        # Made when it is first needed: a console cannot be pickled, as spawned processes want.
        self.console = console
        self.work = [1.0, *(_work(spec) for spec in attacks)]
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._hidden: ProgressBar | None = None
        self._shown = self._draws = False
        self._done = 0.0
        self._total = 0.0
        self._step = 0
        self._split = self._where = ""
        self._batches = self._alphas = 0
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

    def begin(self, split: str, batches: int, alphas: int) -> None:
        """Start with one split."""
        self._split, self._batches, self._alphas = split, batches, alphas
        self._total, self._done = batches * alphas * sum(self.work), 0.0
        self._begun = time.monotonic()
        self._told = self._begun
        if self._draws:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("[dim]{task.fields[now]}"),
                console=self.console,
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(split, total=self._total, now="")

    def at(self, batch: int, place: int, alpha: float) -> None:
        """Say which batch and alpha come next."""
        self._done = (batch * self._alphas + place) * sum(self.work)
        self._step = 0
        self._where = f"batch {batch + 1}/{self._batches} · α = {alpha:g}"

    def tell(self, text: str) -> None:
        """Say which attack comes next; `evaluate` calls this before each."""
        done = self._done + sum(self.work[: self._step])
        self._step += 1
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, now=f"{self._where} · {text}")
        now = time.monotonic()
        if self._shown and self._bar is None and now - self._told >= _EVERY:
            self._told = now
            share = done / self._total
            left = (now - self._begun) * (1 - share) / share if share else float("nan")
            _log.info(
                "%s: %.0f %%, about %s left (%s · %s)",
                self._split,
                100 * share,
                _duration(left),
                self._where,
                text,
            )

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def give_back(self) -> None:
        """Give the trainer its own bar back."""
        self.end()
        if self._hidden is not None:
            self._hidden.enable()
        self._hidden = None


def _work(spec: AttackSpec) -> float:
    """Roughly how many forward passes an attack spends on a sample that withstands it."""
    options = spec.options
    passes = 0.0
    for name in ("n_queries", "steps"):
        value = options.get(name)
        if isinstance(value, int):
            # A step goes forward and backward.
            passes = float(value if name == "n_queries" else 3 * value)
            break
    for name in ("n_restarts", "n_targets"):
        value = options.get(name)
        passes *= value if isinstance(value, int) and value > 0 else 1
    return max(passes, 1.0)


def _duration(seconds: float) -> str:
    if seconds != seconds:
        return "unknown time"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
