"""The `meansparse` command: demo, fit, validate, sites, sweep, export, report, card, push.

This file starts it and stays light: help, version and slips of the pen are answered before torch
and Lightning, many seconds of imports, are loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from lightning_meansparse.cli.commands import COMMANDS, overview
from lightning_meansparse.cli.errors import complain, explain, unknown

__all__ = ["main"]

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it: 128 + SIGINT."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line `args` (None: what the shell gave) and return the exit code.

    0 when all went well, 2 for wrong input, 130 after Ctrl-C, 1 for a fault of the program.
    Whatever it is, it is told in one line; `MEANSPARSE_DEBUG=1` shows the traceback.
    """
    words = list(sys.argv[1:] if args is None else args)
    command = words[0] if words else "--help"
    if command in ("-h", "--help", "help"):
        sys.stdout.write(overview())
        return 0
    if command in ("-V", "--version"):
        from lightning_meansparse import __version__

        sys.stdout.write(f"meansparse {__version__}\n")
        return 0
    if command not in COMMANDS:
        complain("meansparse", unknown(command, COMMANDS))
        return 2
    debug = os.environ.get("MEANSPARSE_DEBUG", "") not in ("", "0")
    program = f"meansparse {command}"
    try:
        COMMANDS[command].load()(words[1:])
    except (KeyboardInterrupt, SystemExit) as stop:
        # Lightning turns Ctrl-C into sys.exit(1); argparse leaves --help by sys.exit(0).
        if not isinstance(stop, KeyboardInterrupt) and not isinstance(
            stop.__context__, KeyboardInterrupt
        ):
            return stop.code if isinstance(stop.code, int) else 0
        complain(program, "interrupted")
        return INTERRUPTED
    except Exception as error:
        if debug:
            raise
        return explain(program, error)
    return 0
