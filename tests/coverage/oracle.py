"""Every activation call of a model and every operator in it, as one forward pass shows them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from .channels import Shape, Watched, told
from .gates import gates
from .tape import (
    TURNS,
    Event,
    Node,
    Tape,
    elementwise_ancestors,
    is_self_gating,
)

Example = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True)
class Call:
    """One activation call whose input depends on the model's input.

    Attributes:
        op: Name of the operation; of several, joined by `+`, for an activation written by hand.
        module: Name of the module that was running.
        gate: It only multiplies other tensors.
        shape: Shape of one statistic of its input, or why it cannot be told.
        operator: Name of the operator that its input comes from, or None.
        torn: The operator serves only a part of an activation written by hand.
    """

    op: str
    module: str
    gate: bool
    shape: Shape | str
    operator: str | None = None
    torn: bool = False

    def __str__(self) -> str:
        return f"{self.op} in {self.module or 'the model itself'}"


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        name: Name of its module.
        times: How often it ran.
        shape: Shape of one statistic of its input, or why it cannot be told.
        serves: How many activation calls that are no gates get their input from it.
        gates: How many that are.
    """

    name: str
    times: int
    shape: Shape | str
    serves: int
    gates: int = 0


@dataclass(frozen=True)
class Truth:
    """What the oracle saw: calls in execution order, and how often each module ran."""

    calls: tuple[Call, ...]
    operators: tuple[Operator, ...]
    runs: Mapping[str, int]


def look(
    model: nn.Module,
    example: Example,
    operators: Mapping[str, nn.Module] | None = None,
    *,
    shapes: bool = True,
) -> Truth:
    """Run a model and tell the truth about its activations.

    Args:
        model: The network, in eval mode. It runs some 15 times, on one batch.
        example: Images, or a dict of keyword tensors.
        operators: Those of its modules that are operators, by name.
        shapes: Whether to tell the channels; else the model runs once and shapes are `"not asked"`.
    """
    operators = dict(operators or {})
    keys = list(example) if isinstance(example, Mapping) else []
    inputs = list(example.values()) if isinstance(example, Mapping) else [example]

    def forward(tensors: Sequence[Tensor]) -> object:
        torch.manual_seed(0)
        for operator in operators.values():
            # On its first call it computes what it keeps for the next; let every call be the first.
            vars(operator).pop("_held", None)
        return model(**dict(zip(keys, tensors, strict=True))) if keys else model(*tensors)

    names = {module: name for name, module in operators.items()}
    tape = Tape(model, names)
    copies = [t.clone() for t in inputs]
    tape.run(lambda: forward(copies), copies)
    groups = _groups(tape)
    watched = {Watched(group.events[0].step, 0) for group in groups}
    watched |= {Watched(*p.seen) for p in tape.passages if p.seen and p.source}
    found: dict[Watched, Shape | str] = {}
    if shapes and watched:
        found = told(tape, forward, inputs, sorted(watched, key=lambda w: w.step))

    def shape(step: int, argument: int) -> Shape | str:
        return found.get(Watched(step, argument), "not asked")

    factors = gates(tape)
    covers, ends = _covers(tape, groups)
    calls: list[Call] = []
    serves: Counter[tuple[int, bool]] = Counter()
    for group in groups:
        first = group.events[0]
        served = {None if e.source in ends else covers[e.source] for e in group.events}
        whole = served | {covers[product] for product in group.products}
        gate = factors.issuperset(group.events)
        number = max((n for n in served if n is not None), default=None)
        if len(served) == 1 and number is not None:
            serves[number, gate] += 1
        calls.append(
            Call(
                op="+".join(event.op for event in group.events),
                module=first.module,
                gate=gate,
                shape=shape(first.step, 0),
                operator=None if number is None else tape.passages[number].name,
                torn=number is not None and len(whole) > 1,
            )
        )
    seen = []
    for name in operators:
        mine = [i for i, p in enumerate(tape.passages) if p.name == name]
        told_here = {shape(*p.seen) for p in (tape.passages[i] for i in mine) if p.seen}
        one = told_here.pop() if len(told_here) == 1 else "several shapes" if mine else "never ran"
        served = [sum(serves[i, gate] for i in mine) for gate in (False, True)]
        seen.append(Operator(name, len(mine), one, *served))
    return Truth(tuple(calls), tuple(seen), tape.runs)


@dataclass(eq=False)
class _Group:
    """The events of one activation call, and the products in which one written by hand ends."""

    events: list[Event]
    products: list[Node]


def _groups(tape: Tape) -> list[_Group]:
    groups = {event.result: _Group([event], []) for event in tape.events}
    for node in tape.nodes:
        if node.inside or not is_self_gating(node):
            continue
        joined = {groups[n] for n in elementwise_ancestors(node) if n in groups}
        if joined:
            events = sorted({e for g in joined for e in g.events}, key=lambda e: e.step)
            one = _Group(events, [*(p for g in joined for p in g.products), node])
            groups.update((event.result, one) for event in events)
    return sorted(dict.fromkeys(groups.values()), key=lambda group: group.events[0].step)


def _covers(tape: Tape, groups: list[_Group]) -> tuple[dict[Node, int | None], set[Node]]:
    """For each node the operator of whose output it is an elementwise function, alone.

    Views that keep every value count as such. What comes after an activation is not covered by what
    comes before it: the nodes in which activations end are given, too.
    """
    ends = {(g.products or [g.events[0].result])[-1] for g in groups}
    covers: dict[Node, int | None] = {}
    for node in tape.nodes:
        covers[node] = node.operator
        turned = node.op in TURNS and prod(node.shape) == prod(node.parents[0].shape)
        if node.operator is None and (node.elementwise or turned):
            before = {None if parent in ends else covers[parent] for parent in node.parents}
            if len(before) == 1:
                (covers[node],) = before
    return covers, ends
