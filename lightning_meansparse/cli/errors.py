"""Wrong input ends in one line that says what to do."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable

# What our own rooms, Lightning and jsonargparse raise for input that cannot work; anything else is
# a fault of the program.
WRONG_INPUT = (ValueError, TypeError, RuntimeError, OSError, ImportError, MemoryError)


def complain(program: str, text: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(f"{program}: {text}\n")


def unknown(word: str, known: Iterable[str]) -> str:
    """Say that a command does not exist, and which come close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"
    return f"no command {word!r}: {hint} (meansparse --help tells what each does)"


def one_line(error: BaseException) -> str:
    """Return an exception's message as one line."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    return text or type(error).__name__
