"""Plain options for the commands that need no recipe, so that their help is there at once."""

from __future__ import annotations

import argparse
from typing import NoReturn

from lightning_meansparse.cli.commands import COMMANDS


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any: None and False say nothing."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Words(argparse.ArgumentParser):
    """An argument parser whose errors are raised, for `main` to tell them in one line.

    Args:
        command: Name of the command.
    """

    def __init__(self, command: str) -> None:
        known = COMMANDS[command]
        super().__init__(
            prog=f"meansparse {command}",
            description=known.summary,
            epilog=f"example: {known.example}",
            formatter_class=_Help,
        )

    def error(self, message: str) -> NoReturn:
        """Raise instead of exiting."""
        raise ValueError(f"{message} ({self.prog} --help lists the options)")
