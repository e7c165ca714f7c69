"""`meansparse validate`: clean and robust accuracy of one classifier."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser

from lightning_meansparse.cli.console import calm, make_console
from lightning_meansparse.cli.lightning import RecipeCLI
from lightning_meansparse.cli.sweep import show
from lightning_meansparse.surgery import alphas
from lightning_meansparse.tasks import AlphaSweep


class ValidateCLI(RecipeCLI):
    """Options of `meansparse validate`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what it takes besides trainer, model and data."""
        parser.add_argument(
            "--alpha",
            type=float | None,
            default=None,
            help="Measure at this threshold beside the base model; without it the adapter's own, "
            "or the base model alone.",
        )
        super().add_arguments_to_parser(parser)


def run(args: Sequence[str]) -> None:
    """Measure on the test images; nothing is chosen, and the records go to no file."""
    console = make_console()
    with calm(console):
        cli = ValidateCLI("validate", AlphaSweep, args)
        sweep = cli.model
        wanted = cli.config.alpha
        if wanted is None:
            own = set(alphas(sweep.classifier).values())
            if len(own) > 1:
                raise ValueError(
                    f"the adapter has several alphas, {sorted(own)}: give one with --alpha"
                )
            wanted = own.pop() if own else 0.0
        sweep.alphas = tuple(sorted({0.0, wanted}))
        sweep.test_alphas, sweep.output = "all", None
        sweep.progress.console = console
        cli.trainer.test(
            sweep, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path, verbose=False
        )
        if cli.trainer.is_global_zero:
            show(console, sweep)
