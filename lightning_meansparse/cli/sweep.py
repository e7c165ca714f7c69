"""`meansparse sweep`: choose alpha on held-out images, report it on test images."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser
from rich.console import Console
from rich.text import Text

from lightning_meansparse.cli.console import (
    READING,
    calm,
    make_console,
    results_table,
    tell,
    tell_flags,
)
from lightning_meansparse.cli.lightning import RecipeCLI
from lightning_meansparse.report import find, write_report
from lightning_meansparse.report.cells import stage_label
from lightning_meansparse.report.drawing import require_matplotlib
from lightning_meansparse.tasks import AlphaSweep


class SweepCLI(RecipeCLI):
    """Options of `meansparse sweep`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what the sweep takes besides trainer, model and data."""
        parser.set_defaults({"model.output": "outputs/sweep"})
        super().add_arguments_to_parser(parser)


def run(args: Sequence[str]) -> None:
    """Sweep as the options and recipes say, print the tables, write the report."""
    console = make_console()
    with calm(console):
        cli = SweepCLI("sweep", AlphaSweep, args)
        sweep = cli.model
        require_matplotlib()  # now, not after hours of attacks
        sweep.notes["command"] = shlex.join(["meansparse", "sweep", *args])
        sweep.progress.console = console
        cli.trainer.validate(
            sweep, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path, verbose=False
        )
        cli.trainer.test(sweep, datamodule=cli.datamodule, verbose=False)
        if cli.trainer.is_global_zero:
            show(console, sweep)
            if sweep.output is not None:
                console.print(f"report: {write_report(sweep.output)}", soft_wrap=True)


def show(console: Console, sweep: AlphaSweep) -> None:
    """Print every stage's table, the verdict, and what else a reader must know."""
    if sweep.chosen_alpha is None:  # one alpha was measured, and none chosen
        for split, summaries in sweep.summaries.items():
            console.print(f"\n[bold]{split} images[/], n = {summaries[0].n:,}")
            console.print(results_table(summaries))
        console.print(READING)
        console.print()
        tell_flags(console, find(sweep.records, sweep.metadata()))
        return
    findings = find(sweep.records, sweep.metadata())
    for stage in reversed(findings.in_order):  # what the verdict speaks of stands next to it
        console.print(Text(f"\n{stage_label(findings, stage)}", style="bold"))
        console.print(results_table(stage, chosen=findings.chosen))
    console.print(READING)
    console.print()
    tell(console, findings)
    console.print()
