"""The source behind a module: the functions that its `forward` comes to, and how they call things.

Calls that no hook reaches are named by what the owner's code calls them: `relu[1]` is the second
time that its `forward` comes to `F.relu(...)`, `self.relu(...)` or `x.relu()`. The same names are
found again without running the model, since an adapter knows nothing but names: both the probe and
`lightning_meansparse.rewrite` read them from the source, here.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import linecache
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from types import CodeType, FunctionType, ModuleType
from typing import Literal, NamedTuple

import torch
from torch import nn

from lightning_meansparse.sites.activations import PACKAGES

SUM = "add"
"""Name of every sum, whether the code writes `x + y`, `x += y`, `torch.add(x, y)` or `x.add(y)`."""

REWRITTEN = "_meansparse_"
"""How names begin that rewritten code uses; what it calls gets the name as its first argument."""

TORCH = os.path.dirname(torch.__file__) + os.sep
OURS = os.path.dirname(os.path.dirname(__file__)) + os.sep

Gets = Literal["owner", "class", "nothing"]


@dataclass(eq=False)
class Function:
    """A Python function that an owner's `forward` comes to.

    Attributes:
        function: The function itself, without decorators.
        decorated: As its class or module holds it.
        node: Its definition.
        home: The class that defines it, None for a function of a module.
        gets: What it gets as its first argument without being given it: the `"owner"`, its
            `"class"`, or `"nothing"`.
        uses: Other functions of the code, by the expression that names them; `forward` is found by
            following these.
    """

    function: FunctionType
    decorated: FunctionType
    node: ast.FunctionDef
    home: type | None
    gets: Gets = "nothing"
    uses: dict[ast.expr, Function] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """What it calls the owner or the class that it gets; empty if it gets none."""
        arguments = self.node.args.posonlyargs + self.node.args.args
        return arguments[0].arg if arguments and self.gets != "nothing" else ""


# ---------------------------------------------------------------------------------------- names


def called(node: ast.expr) -> str | None:
    """What code calls the thing that an expression names; None if it gives it no name.

    Examples:
        >>> import ast
        >>> texts = "F.relu_", "self.acts[0]", "get_act('relu')", "x or y"
        >>> [called(ast.parse(text, mode="eval").body) for text in texts]
        ['relu', 'acts', 'get_act_call', None]
    """
    if isinstance(node, ast.Name):
        return node.id.rstrip("_") or None
    if isinstance(node, ast.Attribute):
        return node.attr.rstrip("_") or None
    if isinstance(node, ast.Subscript):
        return called(node.value)
    if isinstance(node, ast.Call):
        maker = called(node.func)
        return maker and f"{maker}_call"
    return None


def call_name(node: ast.Call) -> str | None:
    """What a call calls its function: itself, or as the first argument of a rewritten call.

    Python's own functions have no name here: what runs inside `list(map(f, x))` is called by none.
    """
    if isinstance(node.func, ast.Name) and hasattr(builtins, node.func.id):
        return None
    if isinstance(node.func, ast.Name) and node.func.id.startswith(REWRITTEN):
        name = node.args[0]
        return str(name.value) if isinstance(name, ast.Constant) else None
    return called(node.func)


def is_sum(node: ast.AST) -> bool:
    """Whether a node adds two things in a way that can be rewritten, or has been."""
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.Add)
    if isinstance(node, ast.AugAssign):
        return isinstance(node.op, ast.Add) and isinstance(node.target, ast.Name)
    if not isinstance(node, ast.Call) or node.keywords or call_name(node) != SUM:
        return False
    if called(node.func) != SUM:
        return True
    return len(node.args) == 2 or (len(node.args) == 1 and isinstance(node.func, ast.Attribute))


def is_whole_sum(left: object, right: object) -> bool:
    """Whether two summands are tensors of one shape, whatever the batch size.

    The first axis is not compared: a table `(1, N, C)` counts with a batch of one as with others.
    """
    return (
        isinstance(left, torch.Tensor)
        and isinstance(right, torch.Tensor)
        and left.ndim == right.ndim > 1
        and left.shape[1:] == right.shape[1:]
        and left.is_floating_point()
        and right.is_floating_point()
    )


# --------------------------------------------------------------------------------------- source


@dataclass(eq=False)
class File:
    """A parsed source file: its definitions by first line and name, its nodes by position."""

    functions: dict[tuple[int, str], ast.FunctionDef] = field(default_factory=dict)
    calls: dict[tuple[int, int], ast.Call] = field(default_factory=dict)
    sums: dict[tuple[int, int, int, int], ast.AST] = field(default_factory=dict)
    statements: set[ast.AST] = field(default_factory=set)
    wrappers: set[ast.AST] = field(default_factory=set)  # `f(x)` in `lambda x: f(x)`


@lru_cache(maxsize=256)
def _parse(text: str) -> File:
    file = File()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            file.functions[first, node.name] = node
        elif isinstance(node, ast.Call):
            # A call's end is its own; where a chain of methods spans lines, its start is not.
            file.calls[node.end_lineno or 0, node.end_col_offset or 0] = node
        elif isinstance(node, ast.Expr):
            file.statements.add(node.value)
        elif isinstance(node, ast.Lambda):
            arguments, call = node.args.posonlyargs + node.args.args, node.body
            given = call.args[0] if isinstance(call, ast.Call) and call.args else None
            if arguments and isinstance(given, ast.Name) and given.id == arguments[0].arg:
                file.wrappers.add(call)
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Add):
            end = node.end_lineno or 0, node.end_col_offset or 0
            file.sums[node.lineno, node.col_offset, *end] = node
    return file


def file_of(code: CodeType, names: dict[str, object]) -> File | None:
    """The parsed file in which a code object was written; None if there is no source."""
    text = "".join(linecache.getlines(code.co_filename, names))
    try:
        return _parse(text) if text else None
    except (SyntaxError, ValueError):
        return None


def _definition(function: FunctionType) -> ast.FunctionDef | None:
    code = function.__code__
    file = file_of(code, function.__globals__)
    return file.functions.get((code.co_firstlineno, code.co_name)) if file else None


# ------------------------------------------------------------------------------------- the code


@lru_cache(maxsize=1024)
def code_of(cls: type) -> dict[CodeType, Function]:
    """Every function that a module's `forward` may come to, by its code and by code nested in it.

    Followed are the class's own methods (`self.f`, `super().f`) and functions of modules outside
    torch that the code names, through decorators that pass all arguments on. Empty if `forward` has
    no source.
    """
    functions: dict[FunctionType, Function] = {}
    found: dict[CodeType, Function] = {}
    start = _lookup(cls.__mro__, "forward")
    first = start and _add(functions, start, entry=True)
    waiting = [first] if first else []
    while waiting:
        user = waiting.pop()
        found.update((code, user) for code in _nested(user.function.__code__))
        for expression, target in _references(user, cls):
            known = target.decorated in functions
            used = _add(functions, target)
            if used is not None:
                user.uses[expression] = used
                if not known:
                    waiting.append(used)
    return found


def forward_of(cls: type) -> Function | None:
    """The `forward` of a class, None if it has no source."""
    start = _lookup(cls.__mro__, "forward")
    code = inspect.unwrap(start.decorated).__code__ if start else None
    return code_of(cls).get(code) if code else None


class _Named(NamedTuple):
    """A function that code names."""

    decorated: FunctionType
    home: type | None = None
    gets: Gets = "nothing"


def _add(
    functions: dict[FunctionType, Function], named: _Named, *, entry: bool = False
) -> Function | None:
    decorated, home, gets = named
    if decorated not in functions:
        plain, decorators = decorated, []
        while isinstance(getattr(plain, "__wrapped__", None), FunctionType):
            decorators.append(plain)
            plain = plain.__wrapped__  # type: ignore[attr-defined]
        node = _definition(plain)
        # A rewritten helper gets one more argument, which its decorators must let through.
        if node is None or not (entry or all(map(_passes_all_on, decorators))):
            return None
        functions[decorated] = Function(plain, decorated, node, home, gets)
    return functions[decorated]


def _passes_all_on(decorator: FunctionType) -> bool:
    every = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS
    return decorator.__code__.co_flags & every == every


def _lookup(mro: tuple[type, ...], name: str) -> _Named | None:
    """The method that a class has by that name, if it is a Python function."""
    for cls in mro:
        if name in vars(cls):
            found: object = vars(cls)[name]
            gets: Gets = "owner"
            if isinstance(found, staticmethod | classmethod):
                gets = "class" if isinstance(found, classmethod) else "nothing"
                found = found.__func__
            return _Named(found, cls, gets) if isinstance(found, FunctionType) else None
    return None


def _nested(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _references(user: Function, cls: type) -> Iterator[tuple[ast.expr, _Named]]:
    """Expressions in a function's body that name another function of the code."""
    names = {**user.function.__globals__, **_closure(user.function)}
    codes = list(_nested(user.function.__code__))
    own = {name for code in codes for name in (*code.co_varnames, *code.co_cellvars)}
    for statement in user.node.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                mro: tuple[type, ...] | None = None
                if isinstance(node.value, ast.Name) and node.value.id == user.first:
                    mro = cls.__mro__
                elif _is_super(node.value) and user.home in cls.__mro__:
                    mro = cls.__mro__[cls.__mro__.index(user.home) + 1 :]
                if mro is not None:
                    method = _lookup(mro, mangled(node.attr, user.home))
                    if method is not None and method.home is not nn.Module:
                        yield node, method
                elif isinstance(node.value, ast.Name) and node.value.id not in own:
                    home = names.get(node.value.id)
                    if isinstance(home, ModuleType) and _foreign(vars(home).get(node.attr)):
                        yield node, _Named(vars(home)[node.attr])
            elif (
                isinstance(node, ast.Name)
                and isinstance(node.ctx, ast.Load)
                and node.id not in own
                and _foreign(names.get(node.id))
            ):
                yield node, _Named(names[node.id])


def mangled(name: str, home: type | None) -> str:
    """A name as code of a class sees it, which makes `__x` private to the class."""
    if home is None or not name.startswith("__") or name.endswith("__"):
        return name
    return f"_{home.__name__.lstrip('_')}{name}"


def _is_super(node: ast.expr) -> bool:
    return (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "super"
        and not node.args
    )


def _closure(function: FunctionType) -> dict[str, object]:
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    return {name: cell.cell_contents for name, cell in cells if _filled(cell)}


def _filled(cell: object) -> bool:
    try:
        cell.cell_contents  # type: ignore[attr-defined]  # noqa: B018
    except ValueError:
        return False
    return True


def _foreign(function: object) -> bool:
    """Whether something is a Python function that may hold a network's code: none of torch's."""
    if not isinstance(function, FunctionType):
        return False
    plain = inspect.unwrap(function)  # not what torch's decorators put around it
    home = plain.__code__.co_filename if isinstance(plain, FunctionType) else TORCH
    return not home.startswith((TORCH, OURS)) and not is_known(plain.__globals__)


def is_known(names: dict[str, object]) -> bool:
    """Whether code stands in a module of activations, each of which is one as a whole."""
    return str(names.get("__name__", "")).startswith(PACKAGES)


def obstacle(owner: nn.Module, name: str) -> str | None:
    """Why a call cannot be reached in the code of an owner, None if it can.

    Args:
        owner: The module whose `forward` comes to the call.
        name: What its code calls it.
    """
    cls: type = type(owner)
    kind, code = cls.__name__, code_of(cls)
    entry = forward_of(cls)
    if entry is None:
        return f"{kind}.forward has no source"
    if issubclass(cls, torch.fx.GraphModule):
        return f"{kind} is traced, and a copy of it would write its code anew: take what was traced"
    if not entry.first:
        return f"{kind}.forward has no argument for its owner"
    functions = {f.function: f for f in code.values()}.values()
    shadowed = {f.node.name for f in functions if f.home} & vars(owner).keys()
    if shadowed:
        return f"this {kind} has a {sorted(shadowed)[0]} of its own beside its class's"
    for function in functions:
        if any(mentions(node, name) for node in ast.walk(function.node)):
            return None
    return f"the code of {kind} has no call of {name}"


def mentions(node: ast.AST, name: str) -> bool:
    """Whether a node is a call by that name, or a sum where the name is `SUM`."""
    if name == SUM:
        return is_sum(node)
    return isinstance(node, ast.Call) and call_name(node) == name
