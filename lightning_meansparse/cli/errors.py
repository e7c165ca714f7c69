"""Wrong input ends in one line that says what to do."""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Iterable

WRONG_INPUT = 2
FAULT = 1

# What our own rooms, Lightning and torch raise for input that cannot work. The errors of
# jsonargparse and Lightning are known by name: importing them takes longer than all else here.
_EXPECTED = (ValueError, TypeError, RuntimeError, OSError, ImportError, MemoryError)


def complain(program: str, text: str) -> None:
    """Write one line to stderr."""
    sys.stderr.write(f"{program}: {text}\n")


def explain(program: str, error: BaseException) -> int:
    """Tell an exception in one line and return the exit code."""
    if type(error).__name__ == "ArgumentError":
        complain(program, f"{plain(one_line(error))} ({program} --help lists the options)")
        return WRONG_INPUT
    if isinstance(error, _EXPECTED) or type(error).__name__ == "MisconfigurationException":
        complain(program, one_line(error))
        return WRONG_INPUT
    complain(
        program,
        f"unexpected {type(error).__name__}: {one_line(error)} (a fault of the program, please "
        "report it; MEANSPARSE_DEBUG=1 shows where)",
    )
    return FAULT


def unknown(word: str, known: Iterable[str]) -> str:
    """Say that a command does not exist, and which come close."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"choose from {', '.join(known)}"
    return f"no command {word!r}: {hint} (meansparse --help tells what each does)"


def one_line(error: BaseException) -> str:
    """Return an exception's message as one line.

    Examples:
        >>> one_line(ValueError("eps must be", 3))
        "('eps must be', 3)"
    """
    return re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__


def plain(text: str) -> str:
    """Turn what jsonargparse says about Python types into what an option wants.

    Examples:
        >>> plain('Parser key "a.b": Expected a <class "int">. Got value: x')
        "--a.b must be int, got 'x'"
        >>> plain("the following arguments are required: a.b, c")
        '--a.b and --c are missing'
    """
    if match := re.fullmatch(r".*arguments are required: (.*)", text):
        names = [f"--{name}" for name in match[1].split(", ")]
        return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} missing"
    key = ""
    if match := re.match(r'Parser key "([^"]+)":\s*', text):
        key, text = f"--{match[1]}", text[match.end() :]
    got = ""
    if match := re.search(r"\.? ?(?:Given value type: .*?)?(?:Got|Given) value: (.*)$", text):
        got, text = f", got {match[1]!r}", text[: match.start()]
    wanted: list[str] = []
    if match := re.search(r"Subtypes: (\[.*?\]) Errors:", text):
        wanted = re.split(r", (?![^\[]*\])", match[1][1:-1])
    elif match := re.fullmatch(r"Expected an? (.*)", text):
        wanted = [match[1]]
    if key and got and wanted:
        return f"{key} must be {' or '.join(_spoken(name) for name in wanted)}{got}"
    return f"{key}: {text}{got}" if key else text + got


def _spoken(kind: str) -> str:
    """Return `<class 'int'>` as int, `typing.Literal['a', 'b']` as 'a' or 'b'."""
    if match := re.fullmatch(r"<class ['\"](?:.*\.)?(\w+)['\"]>", kind):
        return "null" if match[1] == "NoneType" else match[1]
    if match := re.fullmatch(r"(?:typing\.)?Literal\[(.*)\]", kind):
        return " or ".join(match[1].split(", "))
    return kind
