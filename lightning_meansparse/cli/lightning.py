"""What the commands share that run a Lightning Trainer from options and YAML recipes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_meansparse.cli.commands import COMMANDS
from lightning_meansparse.data import ImageDataModule


class RecipeCLI(LightningCLI):
    """One command's parser: trainer, model and data from options and `--config` files.

    A parser of its own per command, not LightningCLI's subcommands: building one parser takes about
    a second, and each command has another model class.
    """

    def __init__(self, command: str, model: type[LightningModule], args: Sequence[str]) -> None:
        known = COMMANDS[command]
        super().__init__(
            model,
            ImageDataModule,
            args=list(args),
            run=False,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "logger": {
                    "class_path": "lightning.pytorch.loggers.CSVLogger",
                    "init_args": {"save_dir": "outputs", "name": command},
                }
            },
            parser_kwargs={
                "prog": f"meansparse {command}",
                "usage": f"meansparse {command} --config FILE [--SECTION.OPTION VALUE ...]",
                "description": f"{known.summary}\n\nExample: {known.example}",
                "exit_on_error": False,
            },
        )

    ckpt_help = "Take the weights from this checkpoint of `meansparse fit`."

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what every command takes besides trainer, model and data."""
        parser.add_argument("--ckpt_path", type=str | None, default=None, help=self.ckpt_help)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Put what is ours first in the help; a Trainer has sixty options more."""
        parser.add_lightning_class_args(self._model_class, "model")
        parser.add_lightning_class_args(self._datamodule_class, "data")
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        parser.set_defaults({f"trainer.{name}": v for name, v in self.trainer_defaults.items()})

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the given words; LightningCLI would warn that there are others in sys.argv."""
        self.config = parser.parse_args(args)
