"""Functions written anew from their source, with calls routed through operators."""

from __future__ import annotations
import __future__

import ast
import inspect
import linecache
from collections.abc import Iterator
from copy import deepcopy
from functools import reduce
from operator import or_
from types import CellType, CodeType, FunctionType
from typing import Any

from lightning_meansparse.rewrite.runtime import RUNTIME
from lightning_meansparse.sites.source import (
    REWRITTEN,
    SUM,
    Function,
    call_name,
    code_of,
    forward_of,
    is_sum,
    mangled,
    mentions,
)

_WALK = REWRITTEN + "walk"
_FUTURE = reduce(or_, (getattr(__future__, n).compiler_flag for n in __future__.all_feature_names))


def write_forward(base: type, names: frozenset[str]) -> FunctionType:
    """The `forward` of a class, written anew to pass by operators at the calls of these names.

    Raises:
        ValueError: If it has no source, comes to none of them, or has a decorator that cannot be
            copied.
    """
    forward = forward_of(base)
    if forward is None:
        raise ValueError(f"{base.__name__}.forward has no source.")
    writer = _Writer(base, names)
    if forward.function not in writer.touched:
        raise ValueError(f"{base.__name__}.forward comes to none of {sorted(names)}.")
    written = writer.write(forward, entry=True)
    return _decorated(forward.decorated, forward.function, written)


class _Writer:
    """Writes the functions of one class anew."""

    def __init__(self, base: type, names: frozenset[str]) -> None:
        self.names = names
        self.cells: dict[str, CellType] = {n: CellType(value) for n, value in RUNTIME.items()}
        self.cells |= {_WALK: CellType()}
        self._written: dict[FunctionType, str] = {}
        functions = {f.function: f for f in code_of(base).values()}
        self.touched = {
            function
            for function, found in functions.items()
            if any(mentions(n, name) for n in ast.walk(found.node) for name in names)
        }
        while True:  # whoever uses a touched function is touched
            users = {
                function
                for function, found in functions.items()
                if any(used.function in self.touched for used in found.uses.values())
            }
            if users <= self.touched:
                break
            self.touched |= users

    def reference(self, function: Function) -> str:
        """Name under which the other functions find one that is written anew."""
        if function.function not in self._written:
            name = f"{REWRITTEN}function_{len(self._written)}"
            self._written[function.function] = name
            self.cells[name] = CellType()  # before it is written, as it may call itself
            written = self.write(function)
            self.cells[name].cell_contents = _decorated(
                function.decorated, function.function, written
            )
        return self._written[function.function]

    def write(self, function: Function, *, entry: bool = False) -> FunctionType:
        """One function anew; it makes the walk if it is the entry, and is given it otherwise."""
        original = function.function
        node = _Rewriter(self, function).function(entry=entry)
        free = [*original.__code__.co_freevars, *self.cells]
        scope = ast.arguments([], [ast.arg(name) for name in free], None, [], [], None, [])
        outer = ast.FunctionDef(REWRITTEN + "scope", scope, [node], [])
        text = ast.unparse(ast.fix_missing_locations(ast.Module([outer], [])))
        file = _shown(f"{original.__module__}.{original.__qualname__}", self.names, text)
        flags = original.__code__.co_flags & _FUTURE
        code = compile(text, file, "exec", flags=flags, dont_inherit=True)
        return self._made(next(_named(code, original.__name__)), original)

    def _made(self, code: CodeType, original: FunctionType) -> FunctionType:
        own = dict(zip(original.__code__.co_freevars, original.__closure__ or (), strict=True))
        closure = tuple((own | self.cells)[name] for name in code.co_freevars)
        made = FunctionType(
            code, original.__globals__, original.__name__, original.__defaults__, closure
        )
        made.__kwdefaults__ = original.__kwdefaults__
        made.__qualname__, made.__module__ = original.__qualname__, original.__module__
        made.__annotations__, made.__doc__ = original.__annotations__, original.__doc__
        vars(made).update(vars(original))
        return made


class _Rewriter(ast.NodeTransformer):
    """Writes the tree of one function anew."""

    def __init__(self, writer: _Writer, function: Function) -> None:
        self.writer, self.source = writer, function
        self.me = function.first
        self.followed = {_place(node): used for node, used in function.uses.items()}
        self.uses = {
            place: used for place, used in self.followed.items() if used.function in writer.touched
        }

    def function(self, *, entry: bool) -> ast.FunctionDef:
        """The definition. Decorators, defaults and annotations are taken over later."""
        node = deepcopy(self.source.node)
        body = ast.Module(node.body, [])
        self.generic_visit(body)
        node.body = body.body
        node.decorator_list, node.returns, arguments = [], None, node.args
        for argument in ast.walk(arguments):
            if isinstance(argument, ast.arg):
                argument.arg = mangled(argument.arg, self.source.home)
                argument.annotation = None
        arguments.defaults = [ast.Constant(None) for _ in arguments.defaults]
        arguments.kw_defaults = [d and ast.Constant(None) for d in arguments.kw_defaults]
        if entry:
            walk = ast.Tuple([_load(self.me), ast.Dict([], [])], ast.Load())
            node.body.insert(0, ast.Assign([ast.Name(_WALK, ast.Store())], walk))
        else:
            self._take_walk(arguments)
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        """A statement: the value of its call is not used, so the call acts in place."""
        if not isinstance(node.value, ast.Call):
            return self.generic_visit(node)
        node.value = self._call(node.value, "_in_place")
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """A call, perhaps one through an operator."""
        return self._call(node, "")

    def visit_BinOp(self, node: ast.BinOp) -> ast.AST:
        """A sum, perhaps one through an operator."""
        wanted = SUM in self.writer.names and is_sum(node)
        self.generic_visit(node)
        return (
            _runtime("sum", SUM, _load(REWRITTEN + "add"), node.left, node.right)
            if wanted
            else node
        )

    def visit_AugAssign(self, node: ast.AugAssign) -> ast.AST:
        """`x += y` becomes `x = sum(x, y)`."""
        wanted = SUM in self.writer.names and is_sum(node)
        self.generic_visit(node)
        if not wanted or not isinstance(node.target, ast.Name):
            return node
        add = _load(REWRITTEN + "iadd")
        total = _runtime("sum", SUM, add, _load(node.target.id), node.value)
        return ast.Assign([node.target], total)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        """`self.helper` and `super().helper` become the helper anew, bound to the owner."""
        used = self.uses.get(_place(node))
        if used is None:
            node.attr = mangled(node.attr, self.source.home)
            return self.generic_visit(node)
        return self._bound(used)

    def visit_Name(self, node: ast.Name) -> ast.AST:
        """A function of a module, perhaps one that is written anew."""
        used = self.uses.get(_place(node))
        node.id = mangled(node.id, self.source.home)
        return node if used is None else self._bound(used)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        """The argument of a function inside the function."""
        node.arg = mangled(node.arg, self.source.home)
        return self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        """A function inside the function: it is given the walk like any helper."""
        self.generic_visit(node)
        if not _walks(node):
            return node
        self._take_walk(node.args)
        again = ast.Assign([ast.Name(node.name, ast.Store())], self._bind(_load(node.name)))
        return [node, again]

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        """The same for a lambda."""
        self.generic_visit(node)
        if not _walks(node):
            return node
        self._take_walk(node.args)
        return self._bind(node)

    @staticmethod
    def _take_walk(arguments: ast.arguments) -> None:
        arguments.kwonlyargs.append(ast.arg(_WALK))
        arguments.kw_defaults.append(None)

    @staticmethod
    def _bind(function: ast.expr, *first: ast.expr) -> ast.Call:
        return ast.Call(_load(REWRITTEN + "bind"), [_load(_WALK), function, *first], [])

    def _bound(self, used: Function) -> ast.Call:
        owner: ast.expr = _load(self.me)
        if used.gets == "class" and self.source.gets == "owner":
            owner = ast.Attribute(owner, "__class__", ast.Load())
        first = [] if used.gets == "nothing" else [owner]
        return self._bind(_load(self.writer.reference(used)), *first)

    def _call(self, node: ast.Call, how: str) -> ast.Call:
        # What is called inside a helper counts, not the call of the helper.
        name = None if _place(node.func) in self.followed else call_name(node)
        total = is_sum(node)
        self.generic_visit(node)
        if name is None or name not in self.writer.names or total != (name == SUM):
            return node
        method = node.func if isinstance(node.func, ast.Attribute) else None
        if total and method is not None and len(node.args) == 1:
            both = ast.arguments([], [ast.arg("a"), ast.arg("b")], None, [], [], None, [])
            bound = ast.Attribute(_load("a"), method.attr, ast.Load())
            add = ast.Lambda(both, ast.Call(bound, [_load("b")], []))
            return _runtime("sum" + how, name, add, method.value, *node.args)
        if total:
            return _runtime("sum" + how, name, node.func, *node.args)
        if method is None:
            made = _runtime("call" + how, name, node.func, *node.args)
        else:
            attribute = ast.Constant(method.attr)
            made = _runtime("method" + how, name, method.value, attribute, *node.args)
        made.keywords = node.keywords
        return made


def _shown(name: str, names: frozenset[str], text: str) -> str:
    """Name of a file that is none, under which tracebacks and debuggers find what runs."""
    file, lines = f"<{name} with operators at {', '.join(sorted(names))}>", text.splitlines(True)
    while file in linecache.cache and linecache.getlines(file) != lines:
        file = f"{file[:-1]}'>"  # as a part of another class's forward, say
    linecache.cache[file] = (len(text), None, lines, file)
    return file


def _load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _runtime(function: str, name: str, *arguments: ast.expr) -> ast.Call:
    """A call of one of the functions that rewritten code calls."""
    lead = [ast.Constant(name), _load(_WALK)]
    return ast.Call(_load(REWRITTEN + function), [*lead, *arguments], [])


def _walks(node: ast.AST) -> bool:
    """Whether anything in a tree needs the walk."""
    return any(isinstance(n, ast.Name) and n.id == _WALK for n in ast.walk(node))


def _place(node: ast.expr) -> tuple[type, int, int, int | None, int | None]:
    """What an expression and its copy have in common and no other has."""
    return type(node), node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


def _named(code: CodeType, name: str) -> Iterator[CodeType]:
    """Code objects of that name, the outermost first."""
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    yield from (each for each in inner if each.co_name == name)
    for each in inner:
        yield from _named(each, name)


def _decorated(outer: FunctionType, plain: FunctionType, new: FunctionType) -> FunctionType:
    """The new function inside copies of the decorators' functions that are around the plain one."""
    if outer is plain:
        return new
    cells = dict(zip(outer.__code__.co_freevars, outer.__closure__ or (), strict=True))
    for name, cell in cells.items():
        inner = cell.cell_contents
        if inner is plain or (isinstance(inner, FunctionType) and inspect.unwrap(inner) is plain):
            cells[name] = CellType(_decorated(inner, plain, new))
            copy = FunctionType(
                outer.__code__,
                outer.__globals__,
                outer.__name__,
                outer.__defaults__,
                tuple(cells.values()),
            )
            copy.__kwdefaults__ = outer.__kwdefaults__
            vars(copy).update(vars(outer), __wrapped__=cells[name].cell_contents)
            copy.__qualname__, copy.__module__ = outer.__qualname__, outer.__module__
            copy.__doc__, copy.__annotations__ = outer.__doc__, outer.__annotations__
            return copy
    raise ValueError(
        f"{plain.__qualname__} is decorated by {outer.__name__} in a way that cannot be copied."
    )
