"""`meansparse fit`: train a classifier."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_meansparse.cli.console import calm, make_console
from lightning_meansparse.cli.lightning import RecipeCLI
from lightning_meansparse.tasks import AdversarialTraining


class FitCLI(RecipeCLI):
    """Options of `meansparse fit`."""

    ckpt_help = "Go on from this checkpoint."


def run(args: Sequence[str]) -> None:
    """Train as the options and recipes say."""
    console = make_console()
    with calm(console):
        cli = FitCLI("fit", AdversarialTraining, args)
        cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=cli.config.ckpt_path)
        if cli.trainer.is_global_zero:
            for name, value in sorted(cli.trainer.callback_metrics.items()):
                console.print(f"{name:<16} {value.item():.4f}")
            if cli.model.save_to is not None:
                console.print(f"classifier: {cli.model.save_to}", soft_wrap=True)
