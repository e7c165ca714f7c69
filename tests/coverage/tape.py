"""What really ran in one forward pass: every tensor that depends on the model's input, and how.

A dispatch mode sees each aten operation, below autograd and below every Python wrapper. The tape is
a graph of *nodes*; a node is one value of one tensor, so a tensor that is written to in place has
several. Nothing is known of modules but their names, for messages, and of operators but which
tensor goes in and which comes out.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Names of aten operations without their in-place underscore.
ACTIVATIONS = words(
    """
    relu relu6 gelu silu sigmoid tanh hardtanh hardswish hardsigmoid leaky_relu elu selu celu mish
    softplus prelu _prelu_kernel log_sigmoid log_sigmoid_forward hardshrink softshrink threshold
    rrelu rrelu_with_noise
    """
)
"""Operations that are an activation function as they stand."""

HIDING = words("_addmm_activation _transformer_encoder_layer_fwd")
"""Fused operations with an activation inside."""

BENT = words("abs erf exp clamp clamp_min clamp_max minimum maximum gt ge lt le heaviside")
"""Operations that make an activation where they meet what they were made from again."""

SELF_GATING = words("mul div where masked_fill minimum maximum")
"""Operations in which an activation written by hand meets its own input: `x * sigmoid(x)`."""

SAME = words("clone _to_copy detach alias lift_fresh contiguous positive")
"""Operations whose result is their input."""

TURNS = words("view _unsafe_view _reshape_alias reshape permute transpose t unsqueeze squeeze")
"""Operations whose result holds every value of the input once, in another place."""

_UNTAGGED = words(
    "copy hardswish masked_fill prelu _prelu_kernel log_sigmoid_forward rrelu_with_noise"
)
_SHAPES_ONLY = words(
    """
    zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones
    new_empty new_full new_empty_strided
    """
)
_OVERWRITES = words("zero fill copy")

UNCOUNTED = words("detach alias lift_fresh")
"""Operations that torch adds or leaves out as it pleases; they have no number of their own."""


@lru_cache(maxsize=4096)
def name_of(func: Any) -> str:
    """`aten::relu_.default` -> `relu`, `aten::view_copy` -> `view`."""
    name: str = func._schema.name.removeprefix("aten::")
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return name if name == "_to_copy" else name.removesuffix("_copy")


@lru_cache(maxsize=4096)
def _is_elementwise(func: Any) -> bool:
    """Whether every value of the result comes from the operands' values at that place alone."""
    return torch.Tag.pointwise in func.tags or name_of(func) in _UNTAGGED


@lru_cache(maxsize=4096)
def _writes(func: Any) -> tuple[int | str, ...]:
    """Which arguments an operation writes to."""
    marked = (
        (a.name if a.kwarg_only else i, a.alias_info) for i, a in enumerate(func._schema.arguments)
    )
    return tuple(where for where, alias in marked if alias is not None and alias.is_write)


@dataclass(eq=False)
class Node:
    """One value of one tensor.

    Attributes:
        index: Its place on the tape.
        step: Number of the operation that made it.
        op: Name of that operation; `"input"`, or `"write"` if another tensor's memory was written.
        parents: The input-dependent nodes that it was made from.
        shape: Shape of the tensor.
        module: Name of the module that was running.
        elementwise: It is an elementwise function of its parents.
        spread: It repeats values along an axis (stride 0).
        inside: It was made by an operator.
        root: The first node of which, alone, it is an elementwise function.
        operator: Number of the operator's call that let it out.
    """

    index: int
    step: int
    op: str
    parents: tuple[Node, ...]
    shape: tuple[int, ...]
    module: str = ""
    elementwise: bool = False
    spread: bool = False
    inside: bool = False
    operator: int | None = None
    root: Node = field(init=False)
    children: list[Node] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        roots = {parent.root for parent in self.parents}
        self.root = roots.pop() if self.elementwise and len(roots) == 1 else self
        for parent in dict.fromkeys(self.parents):
            parent.children.append(self)

    def __repr__(self) -> str:
        return f"Node({self.index}: {self.op} {self.shape} in {self.module!r})"


@dataclass(eq=False)
class Event:
    """An operation that is an activation function: from `source` to `result`, in `module`."""

    step: int
    op: str
    module: str
    source: Node
    result: Node


@dataclass(eq=False)
class Passage:
    """A tensor that went through the operator `name`; the nodes are None if it is a constant."""

    name: str
    source: Node | None
    result: Node | None = None
    seen: tuple[int, int] | None = None  # first operation on it, and which argument it was there


@dataclass(eq=False)
class Step:
    """An operation on input-dependent tensors, and which of its arguments hold such."""

    name: str
    moving: frozenset[int]


class Tape(TorchDispatchMode):
    """Records one forward pass of `model`.

    Args:
        model: The network.
        operators: Those of its modules that are operators.

    Attributes:
        nodes: All nodes, in execution order.
        events: All activation calls, in execution order.
        passages: All calls of operators, in execution order.
        names: Name of every operation, whether it depends on the input or not.
        steps: Those that do, by their number.
        runs: How often each module ran, by name.
        inputs: Nodes of the model's inputs.
        outputs: Nodes of the model's outputs.
    """

    def __init__(self, model: nn.Module, operators: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.events: list[Event] = []
        self.passages: list[Passage] = []
        self.names: list[str] = []
        self.steps: dict[int, Step] = {}
        self.runs: Counter[str] = Counter()
        self.inputs: list[Node] = []
        self.outputs: list[Node] = []
        self._module_names = {module: name for name, module in model.named_modules()}
        self._operators = set(operators)
        self._running: list[nn.Module] = []
        self._inside: list[tuple[Passage, int]] = []
        self._node: dict[int, Node] = {}
        self._alive: dict[int, Tensor] = {}  # as long as it is held, nothing else has its id
        self._sharing: dict[int, list[Tensor]] = defaultdict(list)

    def run(self, forward: Callable[[], object], inputs: Iterable[Tensor]) -> object:
        """Run the forward pass, record it, return what it returned."""
        for tensor in inputs:
            self._meet(tensor)
            if tensor.is_floating_point():  # not masks, sizes, tokens
                self.inputs.append(self._put(tensor, "input", ()))
        hooks = nn.modules.module
        handles = [
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave, always_call=True),
        ]
        try:
            with torch.inference_mode(False), torch.no_grad(), self:
                output = forward()
        finally:
            for handle in handles:
                handle.remove()
        found = [self._node.get(id(tensor)) for tensor in tensors_in(output)]
        self.outputs = [node for node in found if node is not None]
        for container in (self._node, self._alive, self._sharing):
            container.clear()
        self._add_bent()
        return output

    def _add_bent(self) -> None:
        """Add the activations that are written by hand without any activation function."""
        for node in self.nodes:
            if not node.inside and is_self_gating(node):
                inner = elementwise_ancestors(node)
                bent = [n for n in inner | {node} if n.op in BENT and not n.inside]
                if bent and not any(event.result in inner for event in self.events):
                    n = min(bent, key=lambda n: n.index)
                    self.events.append(Event(n.step, n.op, n.module, n.parents[0], n))
        self.events.sort(key=lambda event: event.step)

    # ---------------------------------------------------------------------------------- modules

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)
        if module in self._module_names:
            self.runs[self._module_names[module]] += 1
        if module in self._operators:
            tensor = args[0] if args else None
            passage = Passage(self._module, self._node.get(id(tensor)))
            self.passages.append(passage)
            self._inside.append((passage, id(tensor)))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        while self._running.pop() is not module:
            pass  # modules that raised inside a `try` of the model
        if module not in self._operators:
            return
        passage, _ = self._inside.pop()
        node = self._node.get(id(output))
        if node is not None:
            if passage.source is not None:  # elementwise by contract, whatever it does inside
                node = self._put(output, "alias", (passage.source,), elementwise=True)
            node.operator = self.passages.index(passage)
            passage.result = node

    @property
    def _module(self) -> str:
        names = self._module_names
        return next((names[m] for m in reversed(self._running) if m in names), "")

    # ------------------------------------------------------------------------------- operations

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = name_of(func)
        if name not in UNCOUNTED:
            self.names.append(name)
        step = len(self.names) - 1
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        for tensor in given:
            self._meet(tensor)
        written = [args[w] if isinstance(w, int) else kwargs.get(w) for w in _writes(func)]
        lost = {id(t) for t in written} if name in _OVERWRITES else set()
        parents = tuple(
            self._node[id(t)] for t in given if id(t) in self._node and id(t) not in lost
        )
        moving = frozenset(
            i
            for i, arg in enumerate(args)
            if any(id(leaf) in self._node and id(leaf) not in lost for leaf in tree_leaves(arg))
        )
        if self._inside and self._inside[-1][0].seen is None and name not in UNCOUNTED:
            passage, wanted = self._inside[-1]
            passage.seen = next(((step, i) for i, a in enumerate(args) if id(a) == wanted), None)
        out = func(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        for tensor in results:
            self._meet(tensor)
        if not parents or name in _SHAPES_ONLY:
            for tensor in results:
                self._node.pop(id(tensor), None)
            return out
        elementwise = _is_elementwise(func) or name in SAME
        nodes = [self._put(t, name, parents, elementwise=elementwise) for t in results]
        for tensor in written:
            if isinstance(tensor, Tensor) and id(tensor) in self._node:
                self._write_through(tensor)
        if name not in UNCOUNTED:
            self.steps[step] = Step(name, moving)
        source = self._source(name, args, moving, nodes)
        if source is not None:
            self.events.append(Event(step, name, nodes[0].module, source, nodes[0]))
        return out

    def _source(
        self, name: str, args: tuple[Any, ...], moving: frozenset[int], nodes: list[Node]
    ) -> Node | None:
        """What goes into an activation, None if the operation is none."""
        if not nodes or self._inside or not args or not isinstance(args[0], Tensor):
            return None
        if name in HIDING:
            return nodes[0].parents[0]
        floor = args[1] if len(args) > 1 and isinstance(args[1], int | float) else None
        rectifies = name in ("clamp", "clamp_min") and floor in (0, -1)
        rectifies |= name in ("maximum", "minimum") and len(moving) == 1  # FRN's threshold
        if not args[0].is_floating_point() or not (name in ACTIVATIONS or rectifies):
            return None
        # Read from the parents: an operation in place has given its tensor a new node already.
        return nodes[0].parents[0] if 0 in moving else None

    # ---------------------------------------------------------------------------------- tensors

    def _meet(self, tensor: Tensor) -> None:
        if id(tensor) not in self._alive:
            self._alive[id(tensor)] = tensor
            self._sharing[tensor.untyped_storage()._cdata].append(tensor)

    def _put(
        self, tensor: Tensor, op: str, parents: tuple[Node, ...], *, elementwise: bool = False
    ) -> Node:
        node = Node(
            index=len(self.nodes),
            step=len(self.names) - 1,
            op=op,
            parents=parents,
            shape=tuple(tensor.shape),
            module=self._module,
            elementwise=elementwise,
            spread=any(
                size > 1 and stride == 0
                for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
            ),
            inside=bool(self._inside),
        )
        self.nodes.append(node)
        self._node[id(tensor)] = node
        return node

    def _write_through(self, tensor: Tensor) -> None:
        """A write to a tensor is one to every other tensor that shares its memory."""
        new = self._node[id(tensor)]
        for other in self._sharing[tensor.untyped_storage()._cdata]:
            if other is tensor:
                continue
            mine, its = _places(tensor), _places(other)
            if mine == its:
                same = other.shape == tensor.shape and other.stride() == tensor.stride()
                op = "alias" if same else "view"
                self._put(other, op, (new,), elementwise=same)
            elif not _disjoint(mine, its):
                old = self._node.get(id(other))
                self._put(other, "write", (new,) if old is None else (old, new))


def is_self_gating(node: Node) -> bool:
    """Whether a node is a tensor times, or over, an elementwise function of itself."""
    return node.op in SELF_GATING and node.root is not node and len(set(node.parents)) > 1


def elementwise_ancestors(node: Node) -> set[Node]:
    """What a node was made of on the way from its root, the root left out."""
    seen: set[Node] = set()
    stack = [node]
    while stack:
        for parent in stack.pop().parents:
            if parent.root is node.root and parent is not node.root and parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return seen


Places = tuple[int, int] | frozenset[int]


def _places(tensor: Tensor) -> Places:
    """Which elements of its memory a tensor holds: an interval, or a set if there are gaps."""
    first, numel = tensor.storage_offset(), tensor.numel()
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n)
    if numel == extent:
        return first, first + numel
    memory = torch.arange(tensor.untyped_storage().nbytes() // tensor.element_size())
    view = torch.as_strided(memory, tensor.shape, tensor.stride(), first)
    return frozenset(view.flatten().tolist())


def _disjoint(a: Places, b: Places) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return a[1] <= b[0] or b[1] <= a[0]
    if isinstance(a, tuple):
        a, b = b, a
    assert isinstance(a, frozenset)
    if isinstance(b, tuple):
        return not any(b[0] <= place < b[1] for place in a)
    return a.isdisjoint(b)


def tensors_in(output: object) -> Iterator[Tensor]:
    """All tensors in what a model returned."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_in(value)
    elif hasattr(output, "__dataclass_fields__"):
        yield from tensors_in(vars(output))
