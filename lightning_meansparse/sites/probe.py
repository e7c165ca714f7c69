"""One forward pass that records where activations, residual sums and module inputs are.

The pass runs under two modes. A dispatch mode sees every aten operation and passes a `Value` from its
inputs to its outputs: does it depend on the example (it has a `Value` at all), which axes are channels
(`provenance`), and which activations reach it other than as a factor (the bit sets below). A function
mode gives functional activations the name that they have in the code. Global module hooks, which leave
the model alone, tell which module runs.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_meansparse.sites import provenance
from lightning_meansparse.sites.provenance import Op, Trace

ACTIVATION_MODULES: tuple[type[nn.Module], ...] = tuple(
    getattr(nn, name)
    for name in (
        "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU RReLU "
        "ReLU ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink Threshold"
    ).split()
)
ACTIVATION_PACKAGES = ("timm.layers.activations", "transformers.activations")
NOT_ACTIVATIONS = frozenset(("LinearActivation",))  # transformers' name for the identity
ACTIVATION_FUNCTIONS = frozenset(
    "celu elu gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu logsigmoid log_sigmoid mish "
    "prelu rrelu relu relu6 selu silu sigmoid expit softplus softshrink softsign tanh tanhshrink "
    "threshold log_sigmoid_forward _prelu_kernel rrelu_with_noise".split()
)
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_SCALING = frozenset("add sub rsub mul div neg".split())
_SOFTMAX = frozenset("_softmax _safe_softmax".split())


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """What is known of one input-dependent tensor.

    Attributes:
        trace: Channel axes.
        depends: Bit set of the activations whose output it depends on.
        free: Those of them that reach it along a path on which they are not merely a factor.
        gating: It comes straight from an activation, through views, casts and scaling only.
        root: Equal for tensors that are elementwise functions of one and the same tensor.
        layer: Equal for tensors with no layer (convolution, norm, pooling ...) between them.
        total: The residual sum that it is, None if it is none.
    """

    trace: Trace
    depends: int = 0
    free: int = 0
    gating: bool = False
    root: int = 0
    layer: int = 0
    total: int | None = None


@dataclass(eq=False)
class Call:
    """One call of an activation whose input depends on the example."""

    time: int
    owner: str
    owner_class: str
    call: str
    kind: str
    value: Value
    shape: torch.Size
    module: nn.Module | None = None
    first_input: bool = True
    bit: int = 0


@dataclass(eq=False)
class Place:
    """A tensor at a module's border."""

    time: int
    module: nn.Module
    side: str
    index: int | None
    value: Value
    shape: torch.Size


@dataclass(eq=False)
class Sum:
    """A residual sum: an add of two input-dependent tensors that different layers made."""

    time: int
    owner: str
    owner_class: str
    index: int
    value: Value
    shape: torch.Size
    place: Place | None = None
    before_activation: bool = False


@dataclass(eq=False)
class Frame:
    """A running module."""

    module: nn.Module
    name: str | None
    start: int
    value: Value | None
    shape: torch.Size | None
    activation: tuple[str, str] | None = None
    active: Call | None = None
    mutes: bool = False
    calls: list[Call] = field(default_factory=list)


def is_activation(module: nn.Module) -> bool:
    """Whether a module is an activation by its class or its class's home."""
    kind = type(module)
    if kind.__name__ in NOT_ACTIVATIONS:
        return False
    return isinstance(module, ACTIVATION_MODULES) or kind.__module__.startswith(ACTIVATION_PACKAGES)


def is_operator(module: nn.Module) -> bool:
    """Whether a module is one of our operators, left there by an earlier `sparsify_`."""
    return type(module).__module__.startswith("lightning_meansparse.layer")


def tensors_in(output: object) -> Iterator[Tensor]:
    """All tensors in a model's output: a tensor, sequence, mapping or Hugging Face output."""
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


@lru_cache(maxsize=4096)
def _facts(func: Any) -> tuple[str, bool, bool]:
    """Base name, whether it is elementwise, whether it writes into an input."""
    name = func._schema.name.removeprefix("aten::")
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    name = name.removesuffix("_copy") or name
    return name, provenance.is_pointwise(func, name), func._schema.is_mutable


class Probe(TorchDispatchMode):
    """Records one forward pass of `model`. See the module's docstring.

    Attributes:
        calls: Activation calls with input-dependent input, in execution order.
        places: Tensors at module borders, in execution order.
        sums: Residual sums by their time.
        counts: How often each module was called.
        gated: Bit set of activations that were a factor somewhere.
        output_free: Bit set of activations that reach the output other than as a factor.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.calls: list[Call] = []
        self.places: list[Place] = []
        self.sums: dict[int, Sum] = {}
        self.counts: Counter[nn.Module] = Counter()
        self.gated = 0
        self.output_free = 0
        self._values: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._clock = itertools.count(1)
        self._frames: list[Frame] = []
        self._indices: Counter[tuple[str, str]] = Counter()
        self._mute = 0
        self._by_bit: list[Call] = []
        self._thread = threading.get_ident()

    def run(self, forward: Callable[[], object], inputs: list[Tensor]) -> None:
        """Run the forward pass and record it.

        Args:
            forward: Calls the model and returns its output.
            inputs: The tensors that count as the model's input.

        Raises:
            TypeError: If no tensor is found in the output.
        """
        for tensor in inputs:
            now = next(self._clock)
            self._values[tensor] = Value(Trace(), root=now, layer=now)
        before = nn.modules.module.register_module_forward_pre_hook(self._enter)
        after = nn.modules.module.register_module_forward_hook(self._leave)
        try:
            with self, _Functions(self):
                output = forward()
        finally:
            before.remove()
            after.remove()
        found = list(tensors_in(output))
        if not found:
            raise TypeError(
                f"model must return a tensor, or a tuple, dict or Hugging Face output with tensors; "
                f"{type(self.model).__name__} returned {type(output).__name__}."
            )
        for tensor in found:
            value = self.value(tensor)
            self.output_free |= value.free if value else 0

    def value(self, tensor: object) -> Value | None:
        """What is known of a tensor, None when it does not depend on the example."""
        if not isinstance(tensor, Tensor):
            return None
        found: Value | None = self._values.get(tensor)
        return found

    def is_gate(self, call: Call) -> bool:
        """Whether an activation reaches the output only as a factor of other tensors."""
        return bool(call.bit & self.gated & ~self.output_free)

    # ------------------------------------------------------------------------------- operations

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operation and pass the values of its inputs on to its outputs."""
        kwargs = kwargs or {}
        name, pointwise, mutates = _facts(func)
        known: dict[int, tuple[Tensor, Value]] = {}
        for leaf in tree_leaves((args, kwargs)):
            value = self.value(leaf)
            if value is not None:
                known[id(leaf)] = (leaf, value)
        if not known:
            return func(*args, **kwargs)
        if not provenance.is_known(func, name):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out  # its parts have been seen one by one
        call = None
        if name in ACTIVATION_FUNCTIONS and not self._mute:
            call = self.begin(name.removesuffix("_forward").strip("_"), args[0] if args else None)
        shapes = {key: tensor.shape for key, (tensor, _) in known.items()}
        out = func(*args, **kwargs)
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if name in provenance.CONSTANTS:
            for leaf in outs:
                self._values.pop(leaf, None)
            return out
        op = Op(func, name, args, kwargs, outs, {k: v.trace for k, (_, v) in known.items()}, shapes)
        results = self._evaluate(op, known, pointwise)
        for leaf, result in zip(outs, results, strict=True):
            self._values[leaf] = result
            if mutates and leaf._base is not None:
                self._write_through(leaf, leaf._base, result)
        if call is not None:
            self.end(call, out)
        return out

    def _evaluate(
        self, op: Op, known: dict[int, tuple[Tensor, Value]], pointwise: bool
    ) -> list[Value]:
        values = [value for _, value in known.values()]
        first, now = values[0], next(self._clock)
        alone = len(values) == 1
        copies = op.name in provenance.COPIES
        passes = copies or op.name in provenance.MOVES
        joins = passes or pointwise or op.name in provenance.JOINS
        depends = free = 0
        for value in values:
            depends |= value.depends
            free |= value.free
        if op.name == "mul" and len(values) == 2:
            factors = self._factors(op, *known.values())
            self.gated |= factors[0] | factors[1]
            free = values[0].free & ~factors[0] | values[1].free & ~factors[1]
        gating = op.name in _SOFTMAX or (
            alone and first.gating and (passes or pointwise and op.name in _SCALING)
        )
        same_root = copies or (pointwise and len({v.root for v in values}) == 1)
        same_layer = joins and len({v.layer for v in values}) == 1
        result = []
        for out, trace in zip(op.outs, provenance.propagate(op), strict=True):
            total = None
            whole = out.numel() == next(iter(op.shapes.values())).numel()
            if passes and alone and whole:
                total = first.total
            value = Value(
                trace=trace,
                depends=depends,
                free=free,
                gating=gating,
                # The parts of a split are different tensors: each its own root.
                root=first.root if same_root else next(self._clock),
                layer=first.layer if same_layer else now,
                total=total,
            )
            if op.name == "add" and self._is_residual(op, values, out):
                value = self._add_sum(now, value, out.shape)
            result.append(value)
        return result

    def _factors(self, op: Op, a: tuple[Tensor, Value], b: tuple[Tensor, Value]) -> tuple[int, int]:
        """Activations that either operand of a product brings in merely as a factor.

        The factor is the operand that broadcasts (squeeze-excite) or, at equal shapes, the one that
        comes straight from an activation (GLU); what it multiplies must not depend on it, else every
        activation upstream of a gate were one, and must not be the activation's own input, else
        `x * sigmoid(x)` were a gate and not an activation.
        """
        out = op.outs[0].shape
        small = [op.shapes[id(tensor)] != out for tensor, _ in (a, b)]
        bits = []
        for i, (mine, other) in enumerate(((a[1], b[1]), (b[1], a[1]))):
            if small[i] or (mine.gating and not small[1 - i]):
                factor = mine.free & ~other.depends
                for call in self._by_bit:
                    if call.bit & factor and call.value.root == other.root:
                        factor &= ~call.bit
                bits.append(factor)
            else:
                bits.append(0)
        return bits[0], bits[1]

    def _is_residual(self, op: Op, values: list[Value], out: Tensor) -> bool:
        return (
            not self._mute
            and len(values) == 2
            and values[0].layer != values[1].layer
            and all(shape == out.shape for shape in op.shapes.values())
        )

    def _add_sum(self, now: int, value: Value, shape: torch.Size) -> Value:
        frame = self._owner()
        value = replace(value, total=now, layer=now)
        owner = frame.name or ""
        index = self._next_index(owner, "add")
        kind = type(frame.module).__name__
        self.sums[now] = Sum(now, owner, kind, index, value, shape)
        return value

    def _write_through(self, view: Tensor, base: Tensor, value: Value) -> None:
        """A write into a view is a write into the tensor that it looks at."""
        old = self.value(base)
        channels = provenance.fit(value.trace.channels, base.shape, "a write into a view")
        self._values[base] = replace(
            value,
            trace=old.trace if old else Trace(channels),
            depends=value.depends | (old.depends if old else 0),
            free=value.free | (old.free if old else 0),
            gating=False,
            root=next(self._clock),
            layer=next(self._clock),
            total=None,
        )

    # ------------------------------------------------------------------------------ activations

    def begin(
        self,
        name: str,
        tensor: object,
        *,
        kind: str | None = None,
        module: nn.Module | None = None,
        first_input: bool = True,
    ) -> Call | None:
        """Note an activation call that is about to run; None if its input is constant."""
        frame = self._owner()
        owner = frame.name or ""
        index = self._next_index(owner, name)
        value = self.value(tensor)
        if value is None or not isinstance(tensor, Tensor):
            return None
        call = Call(
            time=next(self._clock),
            owner=owner,
            owner_class=type(frame.module).__name__,
            call=f"{name}[{index}]",
            kind=kind or name,
            value=value,
            shape=tensor.shape,
            module=module,
            first_input=first_input,
        )
        self.calls.append(call)
        if module is None:
            frame.calls.append(call)
        if value.total is not None:
            self.sums[value.total].before_activation = True
        return call

    def end(self, call: Call, output: object) -> None:
        """Mark what an activation call returned."""
        call.bit = 1 << len(self._by_bit)
        self._by_bit.append(call)
        for leaf in tensors_in(output):
            value = self.value(leaf) or call.value
            self._values[leaf] = replace(
                value,
                depends=value.depends | call.bit,
                free=value.free | call.bit,
                gating=True,
                total=None,
            )

    def _next_index(self, owner: str, name: str) -> int:
        self._indices[owner, name] += 1
        return self._indices[owner, name] - 1

    # ---------------------------------------------------------------------------------- modules

    def _owner(self) -> Frame:
        """Innermost running module that has a name in the model."""
        return next(frame for frame in reversed(self._frames) if frame.name is not None)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        value, name = self.value(tensor), self.names.get(module)
        shape = None if tensor is None else tensor.shape
        frame = Frame(module, name, next(self._clock), value, shape)
        self.counts[module] += 1
        if self._mute == 0 and name != "" and is_activation(module):
            kind = type(module).__name__
            short = name.rpartition(".")[2] if name else kind
            frame.activation = (short, kind)
            if args:
                frame.active = self.begin(
                    short, args[0], kind=kind, module=module if name else None
                )
            frame.mutes = True
        frame.mutes = frame.mutes or is_operator(module)
        if value is not None and tensor is not None and self._is_place(frame):
            if tensor.is_floating_point():
                self.places.append(Place(frame.start, module, "in", None, value, tensor.shape))
        self._mute += frame.mutes
        self._frames.append(frame)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        while self._frames:  # frames of modules that raised inside a `try` of the model
            frame = self._frames.pop()
            self._mute -= frame.mutes
            if frame.module is module:
                break
        if frame.activation and not args:  # called by keyword: known only by its output
            short, kind = frame.activation
            frame.active = self.begin(short, output, kind=kind, module=module, first_input=False)
        if frame.active is not None:
            self.end(frame.active, output)
        elif not self._mute:
            self._adopt(frame, output)
        if not self._is_place(frame):
            return
        several = isinstance(output, (tuple, list))
        for i, leaf in enumerate(output if several else (output,)):
            value = self.value(leaf)
            if value is None or not leaf.is_floating_point():
                continue
            place = Place(
                next(self._clock), module, "out", i if several else None, value, leaf.shape
            )
            self.places.append(place)
            # The innermost module that made a sum and returns it gives it its name.
            total = None if value.total is None else self.sums[value.total]
            if total is not None and total.place is None and total.time > frame.start:
                total.place = place

    def _is_place(self, frame: Frame) -> bool:
        return (
            bool(frame.name)
            and not self._mute
            and not isinstance(frame.module, CONTAINERS)
            and not is_operator(frame.module)
        )

    def _adopt(self, frame: Frame, output: object) -> None:
        """A leaf module that is an elementwise function around an activation is one itself."""
        value = self.value(output)
        if (
            not frame.name
            or not frame.calls
            or next(frame.module.children(), None) is not None
            or frame.value is None
            or value is None
            or value.root != frame.value.root
            or not isinstance(output, Tensor)
            or output.shape != frame.shape
        ):
            return
        inner = set(map(id, frame.calls))
        self.calls = [call for call in self.calls if id(call) not in inner]
        kind = type(frame.module).__name__
        outer = self._owner()
        name = frame.name.rpartition(".")[2]
        call = Call(
            time=frame.start,
            owner=outer.name or "",
            owner_class=type(outer.module).__name__,
            call=f"{name}[{self._next_index(outer.name or '', name)}]",
            kind=kind,
            value=frame.value,
            shape=output.shape,
            module=frame.module,
        )
        self.calls.append(call)
        self.calls.sort(key=lambda item: item.time)
        if frame.value.total is not None:
            self.sums[frame.value.total].before_activation = True
        self.end(call, output)


class _Functions(TorchFunctionMode):
    """Gives functional activations the names that they have in the code."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = str(getattr(func, "__name__", "")).removeprefix("special_").rstrip("_")
        if name not in ACTIVATION_FUNCTIONS or self.probe._mute:
            return func(*args, **kwargs)
        call = self.probe.begin(name, args[0] if args else kwargs.get("input"))
        self.probe._mute += 1
        try:
            output = func(*args, **kwargs)
        finally:
            self.probe._mute -= 1
        if call is not None:
            self.probe.end(call, output)
        return output
