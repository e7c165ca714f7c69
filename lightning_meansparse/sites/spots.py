"""Where in an owner's code something is about to happen, told by the frames that are running."""

from __future__ import annotations

import ast
import os
import sys
from dataclasses import dataclass
from functools import lru_cache
from types import CodeType, FrameType

from torch import Tensor, nn

from lightning_meansparse.sites.source import (
    OURS,
    SUM,
    TORCH,
    call_name,
    code_of,
    file_of,
    forward_of,
    is_known,
    is_sum,
)

_MODULE_CALL = os.path.join(TORCH, "nn", "modules", "module.py")


@dataclass(frozen=True)
class Spot:
    """Where in an owner's code an event happens.

    Attributes:
        name: What the code calls it, `SUM` for a sum.
        discarded: The call is a statement of its own: it acts in place, and its value is not used.
    """

    name: str
    discarded: bool = False


def module_spot(owner: nn.Module) -> Spot | str:
    """Where the owner's code calls the module whose hook is running, or why that is unknown."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith((OURS, _MODULE_CALL)):
        frame = frame.f_back
    return _spot(frame, owner)


def function_spot(owner: nn.Module) -> Spot | str:
    """Where the owner's code calls the torch function that is about to run, or why not."""
    return _spot(_outside_torch(sys._getframe(1), owner), owner)


def handed(owner: nn.Module) -> Tensor | None:
    """The first tensor that the owner's code gives a library function that calls an activation.

    None if the code calls the activation itself.
    """
    outer, frame = None, sys._getframe(1)
    stop = _outside_torch(frame, owner)
    while frame is not None and frame is not stop:
        outer, frame = frame, frame.f_back  # type: ignore[assignment]
    if outer is None or outer.f_code.co_filename.startswith(OURS):
        return None
    names = outer.f_code.co_varnames[: outer.f_code.co_argcount]
    values = (outer.f_locals.get(name) for name in names)
    return next((value for value in values if isinstance(value, Tensor)), None)


def sum_spot(owner: nn.Module) -> Spot | str:
    """Where the owner's code makes the sum that is about to run, or why that is unknown."""
    frame = _outside_torch(sys._getframe(1), owner)
    return _spot(frame, owner, sums=True)


def _outside_torch(frame: FrameType | None, owner: nn.Module) -> FrameType | None:
    """The innermost frame that is neither ours nor torch's, nor inside a known activation."""
    cls: type = type(owner)
    code = code_of(cls)
    while frame is not None and frame.f_code not in code:
        home = frame.f_code.co_filename
        if not home.startswith((OURS, TORCH)) and not (
            is_known(frame.f_globals) or _is_call_alone(frame)
        ):
            break
        frame = frame.f_back
    return frame


def _is_call_alone(frame: FrameType) -> bool:
    """Whether a frame is a lambda that does nothing but this call on its own argument."""
    file = file_of(frame.f_code, frame.f_globals) if frame.f_code.co_name == "<lambda>" else None
    _, end_line, _, end_column = _position(frame)
    return file is not None and file.calls.get((end_line, end_column)) in file.wrappers


def _position(frame: FrameType) -> tuple[int, int, int, int]:
    return _positions(frame.f_code)[frame.f_lasti // 2]


@lru_cache(maxsize=4096)
def _positions(code: CodeType) -> list[tuple[int, int, int, int]]:
    """Line, end line, column and end column of every instruction."""
    return [(a or 0, b or 0, c or 0, d or 0) for a, b, c, d in code.co_positions()]


def _spot(frame: FrameType | None, owner: nn.Module, *, sums: bool = False) -> Spot | str:
    cls: type = type(owner)
    kind, code, entry = cls.__name__, code_of(cls), forward_of(cls)
    if frame is None or frame.f_code not in code:
        where = frame.f_code.co_name if frame else "nowhere"
        return f"{where} is no code that {kind}.forward is seen to call"
    file = file_of(frame.f_code, frame.f_globals)
    line, end_line, column, end_column = _position(frame)
    node: ast.AST | None = file.calls.get((end_line, end_column)) if file else None
    if sums and file and not (node and is_sum(node)):
        node = file.sums.get((line, column, end_line, end_column))
    name = None
    if node is not None:
        name = SUM if sums and is_sum(node) else None
        if name is None and isinstance(node, ast.Call):
            name = call_name(node)
    if name is None or (name == SUM) != sums:
        return f"line {line} of {kind}'s code gives it no name"
    start: FrameType | None = frame
    while start is not None and entry and start.f_code is not entry.function.__code__:
        if start.f_code not in code and not start.f_code.co_filename.startswith((OURS, TORCH)):
            return f"{start.f_code.co_name} stands between {kind}.forward and its call"
        start = start.f_back
    if start is None:
        return f"it does not run inside {kind}.forward"
    return Spot(name, discarded=bool(file and node in file.statements))
