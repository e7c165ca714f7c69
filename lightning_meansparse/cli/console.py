"""How the commands look: one console, no noise from below, tables."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

# First: it sets the levels of its loggers when it is imported, which `calm` changes.
import lightning.pytorch  # noqa: F401
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table
from rich.text import Text

from lightning_meansparse.records import AlphaSummary
from lightning_meansparse.report.cells import (
    alpha_column,
    capital,
    flag_head,
    quiet_flags,
    result_columns,
    signs,
)
from lightning_meansparse.report.findings import Findings


def make_console() -> Console:
    """Return the console that everything is shown on, bars and text alike."""
    return Console(highlight=False, soft_wrap=False)


@contextmanager
def calm(console: Console, *, level: int = logging.WARNING) -> Iterator[None]:
    """Show what this package says; from Lightning only what is at least as serious as `level`.

    Hints for developers (how many workers, how often to log, deprecations between two libraries)
    help nobody who runs a command. `MEANSPARSE_DEBUG=1` shows everything.
    """
    if os.environ.get("MEANSPARSE_DEBUG", "") not in ("", "0"):
        logging.basicConfig(level=logging.INFO)
        yield
        return
    ours = logging.getLogger("lightning_meansparse")
    data = logging.getLogger("lightning_meansparse.data")
    theirs = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False)
    before = [(logger, logger.level) for logger in (ours, data, *theirs)]
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    for logger in (data, *theirs):
        logger.setLevel(level)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning\.")
            warnings.filterwarnings("ignore", message=".*LeafSpec.*")
            yield
    finally:
        ours.removeHandler(handler)
        for logger, old in before:
            logger.setLevel(old)


def results_table(summaries: list[AlphaSummary], *, chosen: float | None = None) -> Table:
    """Return the numbers of one split, a row per alpha, the chosen one marked.

    Args:
        summaries: Of one split.
        chosen: The alpha to mark.
    """
    # Without n, which the heading above says: the rest fits a terminal of 80 columns.
    shown = [column for column in result_columns(summaries) if column.head != "n"]
    columns = [alpha_column(summaries), *shown]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1))
    for column in columns:
        style = {"worst": "bold", "apparent": "dim"}.get(column.kind)
        table.add_column(column.head, justify="right", style=style, no_wrap=True)
    for place, summary in enumerate(summaries):
        mark = " ◀" if summary.alpha == chosen else ""
        first, *rest = (column.texts[place] for column in columns)
        table.add_row(first + mark, *rest, style="green" if mark else None)
    return table


def tell(console: Console, findings: Findings) -> None:
    """Print the verdict, what else a reader must know, and the reasons to doubt the numbers."""
    # As plain text: a name from a file may hold what looks like markup.
    console.print(Text(signs(f"{findings.headline}: {findings.sentence}"), style="bold"))
    for note in findings.notes:
        console.print(Text(capital(signs(note))))
    tell_flags(console, findings)


def tell_flags(console: Console, findings: Findings) -> None:
    """Print the reasons to doubt the numbers, and what was looked for without finding it."""
    for flag in findings.raised:
        style = "bold yellow" if findings.concerns(flag) else "bold"
        head, seen = signs(flag_head(flag)), signs(flag.seen)
        console.print(Text.assemble((f"{head}: ", style), seen, (f" See {flag.read_on}.", "dim")))
    for line in quiet_flags(findings):
        console.print(Text(line, style="dim"))


READING = (
    "[dim]apparent[/]: left after attacks that follow the model's own gradient, which the operator "
    "blocks. [bold]worst case[/]: left after all attacks, the number that counts. "
    "Accuracies in %, gain and masking in points."
)
"""How to read `results_table`, with rich's markup."""
