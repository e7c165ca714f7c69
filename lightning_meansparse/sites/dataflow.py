"""What is known of every input-dependent tensor, and how an operation passes it on.

That a tensor has a `Value` at all says that it depends on the model's input. Bit sets, one bit for
each activation call, tell which activations reach it other than as a factor: one sweep forward is
enough to know the gates at the end.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_meansparse.sites import provenance, rules
from lightning_meansparse.sites.activations import (
    BENDS,
    CLAMPS,
    EXTREMES,
    FLOORS,
    MEETINGS,
    names,
)
from lightning_meansparse.sites.provenance import Op, Trace

_SCALING = names("add sub rsub mul div neg")
_SOFTMAX = names("_softmax _safe_softmax")

Known = Mapping[int, tuple[Tensor, "Value"]]
"""An operation's input-dependent inputs, by the `id` of the tensor."""


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """What is known of one input-dependent tensor.

    Attributes:
        trace: Channel axes.
        depends: Bit set of the activations whose output it depends on.
        free: Those of them that reach it along a path on which they are not merely a factor.
        gating: It comes straight from an activation, through views, casts, scaling, resizing only.
        root: Equal for tensors that are elementwise functions of one and the same tensor.
        layer: Equal for tensors with no layer (convolution, norm, pooling ...) between them.
        total: Time of the residual sum that it is, None if it is none.
        maker: When its channels were made, and the module in whose code: the last of the layers
            that are joined in it. The model's input has no maker.
        made: When it was made.
        bent: The operation that made it bends.
        parents: What it is an elementwise function of, if all of that has its root.
    """

    trace: Trace
    depends: int = 0
    free: int = 0
    gating: bool = False
    root: int = 0
    layer: int = 0
    total: int | None = None
    maker: tuple[int, str] = (0, "")
    made: int = 0
    bent: bool = False
    parents: tuple[Value, ...] = ()


@dataclass(frozen=True, slots=True)
class Written:
    """An activation that is written out: `x * sigmoid(v * x)`.

    Attributes:
        given: What it is a function of, the `x`.
        parts: All tensors on the way from there.
        uses: How often they use `given`.
    """

    given: Value
    parts: frozenset[Value]
    uses: int


class Flow:
    """Values of all living tensors of one forward pass.

    Attributes:
        clock: Counts events; earlier events have smaller numbers.
        gated: Bit set of the activations that were a factor somewhere.
        uses: How many operations each value went into.
    """

    def __init__(self) -> None:
        self.clock = itertools.count(1)
        self.gated = 0
        self.uses: Counter[Value] = Counter()
        self._roots: list[int] = []  # per activation bit: root of its input
        self._values = WeakTensorKeyDictionary()

    def __getitem__(self, tensor: object) -> Value | None:
        """What is known of a tensor, None when it does not depend on the model's input."""
        if not isinstance(tensor, Tensor):
            return None
        value: Value | None = self._values.get(tensor)  # type: ignore[no-untyped-call]
        return value

    def __setitem__(self, tensor: Tensor, value: Value) -> None:
        self._values[tensor] = value

    def forget(self, tensor: Tensor) -> None:
        """Note that a tensor does not depend on the model's input (any more)."""
        self._values.pop(tensor, None)  # type: ignore[no-untyped-call]

    def seed(self, tensor: Tensor) -> None:
        """Note that a tensor is the model's input. Images are `(N, C, H, W)` by contract."""
        now = next(self.clock)
        image = tensor.ndim == 4 and tensor.is_floating_point()
        numbers = provenance.numbering(4, 1, tensor.shape[1]) if image else None
        self[tensor] = Value(Trace(numbers), root=now, layer=now)

    def activate(self, tensor: Tensor, bit: int, given: Value) -> None:
        """Note that a tensor came out of an activation whose input was `given`."""
        value = self[tensor] or given
        self[tensor] = replace(
            value,
            depends=value.depends | bit,
            free=value.free | bit,
            gating=True,
            total=None,
        )

    def new_bit(self, given: Value) -> int:
        """Bit of an activation whose input is `given`."""
        self._roots.append(given.root)
        return 1 << (len(self._roots) - 1)

    def step(self, op: Op, known: Known, *, pointwise: bool, owner: str = "") -> list[Value]:
        """Values of an operation's outputs; `known` holds those of its inputs before it ran.

        `owner` names the module in whose code it runs.
        """
        values = [value for _, value in known.values()]
        self.uses.update(values)
        first, now = values[0], next(self.clock)
        alone = len(values) == 1
        copies = op.name in rules.COPIES
        passes = copies or op.name in rules.MOVES
        hands_on = passes or op.name in rules.RESIZES or (pointwise and op.name in _SCALING)
        joins = passes or pointwise or op.name in rules.JOINS
        same_root = copies or (pointwise and len({v.root for v in values}) == 1)
        same_layer = joins and len({v.layer for v in values}) == 1
        depends = free = 0
        for value in values:
            depends |= value.depends
            free |= value.free
        if op.name == "mul" and len(values) == 2:
            free = self._multiply(op, known)
        gating = op.name in _SOFTMAX or (alone and first.gating and hands_on)
        numel = next(iter(op.shapes.values())).numel()
        makes = op.name in rules.MAKES and (alone or op.name not in rules.PRODUCTS)
        # A gate that broadcasts has not made the channels that it multiplies.
        sizes = {out.shape for out in op.outs}
        full = [value for key, (_, value) in known.items() if op.shapes[key] in sizes]
        maker = (now, owner) if makes else max(value.maker for value in full or values)
        return [
            Value(
                trace=trace,
                depends=depends,
                free=free,
                gating=gating,
                # The parts of a split are different tensors: each is its own root.
                root=first.root if same_root else next(self.clock),
                layer=first.layer if same_layer else now,
                total=first.total if passes and alone and out.numel() == numel else None,
                maker=maker,
                made=now,
                bent=op.name in BENDS,
                parents=tuple(values) if same_root else (),
            )
            for out, trace in zip(op.outs, rules.propagate(op), strict=True)
        ]

    def _multiply(self, op: Op, known: Known) -> int:
        """Activations that reach a product other than as a factor; notes the others in `gated`.

        The factor is the operand that broadcasts (squeeze-excite) or, at equal shapes, the one
        that comes straight from an activation (GLU). What it multiplies must not depend on it, else
        every activation upstream of a gate were one, and must not be the activation's own input,
        else `x * sigmoid(x)` were a gate and not an activation.
        """
        (left, a), (right, b) = known.values()
        narrow = [_broadcasts(op, left), _broadcasts(op, right)]
        free = 0
        for i, (mine, other) in enumerate(((a, b), (b, a))):
            factor = 0
            if narrow[i] or (mine.gating and not narrow[1 - i]):
                factor = mine.free & ~other.depends
                for bit, root in enumerate(self._roots):
                    if root == other.root:
                        factor &= ~(1 << bit)
            self.gated |= factor
            free |= mine.free & ~factor
        return free

    def write_through(self, base: Tensor, value: Value) -> None:
        """A write into a view, whose value is now `value`, is a write into its base."""
        old = self[base]
        now = next(self.clock)
        channels = provenance.fit(value.trace.channels, base.shape, "a write into a view")
        self[base] = Value(
            trace=old.trace if old else Trace(channels),
            depends=value.depends | (old.depends if old else 0),
            free=value.free | (old.free if old else 0),
            root=now,
            layer=now,
            maker=value.maker,
        )


def written_out(op: Op, values: list[Value], result: Value) -> Written | None:
    """The activation that ends in an operation; None if it ends none.

    It ends one where a tensor meets a bent elementwise function of itself. A gate meets what it was
    not made from elementwise, and a power of a tensor does not bend.
    """
    meets = op.name in MEETINGS and len(values) > 1 and op.outs[0].is_floating_point()
    if not meets or not result.parents:
        return None
    before = [_ancestors(value) for value in values]
    given = max(frozenset.intersection(*before), key=lambda value: value.made, default=None)
    if given is None:
        return None
    parts = frozenset.union(*before) - _ancestors(given) | {result}
    if not any(part.bent for part in parts):
        return None
    return Written(given, parts, sum(given in part.parents for part in parts))


def _ancestors(value: Value) -> frozenset[Value]:
    """A value and all that it is an elementwise function of, up to its root."""
    found, waiting = {value}, [value]
    while waiting:
        new = set(waiting.pop().parents) - found
        found |= new
        waiting += new
    return frozenset(found)


def first_two(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """A function's input and second argument, by position or by keyword."""
    second = "min" if name in CLAMPS else "other"
    given = dict(zip(("input", second), args, strict=False)) | kwargs
    return given.get("input"), given.get(second)


def rectifies(name: str, given: Any, other: Any, flow: Flow) -> bool:
    """Whether a function is a rectifier by another name.

    That is the maximum or minimum of a layer's output with what does not depend on the input
    (zeros, the threshold of filter response normalisation), or a clamp from 0 on. A clamp of the
    images themselves, or of positions, keeps them in their range and is none.
    """
    value = flow[given]
    made = value is not None and value.maker[0] > 0 and given.is_floating_point()
    if not made:
        return False
    if isinstance(other, Tensor):  # a clamp to learned bounds keeps a range and is none either
        return name in EXTREMES and flow[other] is None
    return name in CLAMPS and other in FLOORS


def is_residual(op: Op, values: list[Value], total: Value) -> bool:
    """Whether an operation adds two whole tensors that different layers made.

    What has different channel axes, such as the scores and the position bias of an attention, is no
    sum of features.
    """
    channels = total.trace.channels
    agree = not isinstance(channels, str) or provenance.DISAGREEMENT not in channels
    return (
        op.name == "add"
        and len(values) == 2
        and values[0].layer != values[1].layer
        and all(shape == op.outs[0].shape for shape in op.shapes.values())
        and agree
    )


def _broadcasts(op: Op, tensor: Tensor) -> bool:
    """Whether an operand is repeated along some axis, by the operation or by `expand` before it."""
    shape = op.shapes[id(tensor)]
    expanded = any(
        size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return shape != op.outs[0].shape or expanded
