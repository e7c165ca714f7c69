"""`meansparse fit`: train a classifier."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningArgumentParser

from lightning_meansparse.cli.lightning import RecipeCLI
from lightning_meansparse.tasks import AdversarialTraining


class FitCLI(RecipeCLI):
    """Options of `meansparse fit`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what `Trainer.fit` takes besides model and data."""
        parser.add_argument(
            "--ckpt_path", type=str | None, default=None, help="Go on from this checkpoint."
        )


def run(args: Sequence[str]) -> None:
    """Train as the options and recipes say."""
    cli = FitCLI("fit", AdversarialTraining, args)
    cli.trainer.fit(cli.model, cli.datamodule, ckpt_path=cli.config.ckpt_path)
