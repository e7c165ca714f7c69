"""One forward pass that records where activations, residual sums and module borders are.

A dispatch mode sees every aten operation and hands it to the dataflow; a function mode gives
functional activations the names that they have in the code; global module hooks, which leave the
model alone, tell which module runs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_meansparse.sites import rules
from lightning_meansparse.sites.activations import (
    CLAMPS,
    CONTAINERS,
    EXTREMES,
    FUNCTIONS,
    is_activation,
    is_operator,
)
from lightning_meansparse.sites.dataflow import (
    Flow,
    Value,
    Written,
    first_two,
    is_residual,
    rectifies,
    written_out,
)
from lightning_meansparse.sites.events import Call, Frame, Place, Sum, Turn, tensors_in
from lightning_meansparse.sites.provenance import Op
from lightning_meansparse.sites.source import SUM, is_whole_sum
from lightning_meansparse.sites.spots import Spot, function_spot, handed, module_spot, sum_spot


class Probe(TorchDispatchMode):
    """Records one forward pass of `model`. See the module's docstring.

    Attributes:
        owners: Every module of the model by its name.
        names: The other way round.
        calls: Activation calls with input-dependent input, in execution order.
        places: Input-dependent tensors at module borders, in execution order.
        sums: Residual sums by their time.
        constants: Names of activations whose input does not depend on the model's.
        repeated: Modules that several owners call, or one owner several times in one run.
        flow: The dataflow.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.owners = dict(model.named_modules())
        self.names = {module: name for name, module in self.owners.items()}
        self.calls: list[Call] = []
        self.places: list[Place] = []
        self.sums: dict[int, Sum] = {}
        self.constants: list[str] = []
        self.repeated: set[nn.Module] = set()
        self.flow = Flow()
        self._output_free = 0
        self._frames = [Frame(model, "", 0, None, None, mutes=False)]
        self._owners: dict[nn.Module, str] = {}
        self._muted = 0
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
            self.flow.seed(tensor)
        enter = nn.modules.module.register_module_forward_pre_hook(self._enter)
        leave = nn.modules.module.register_module_forward_hook(self._leave)
        try:
            with self, _Functions(self):
                output = forward()
        finally:
            enter.remove()
            leave.remove()
        found = list(tensors_in(output))
        if not found:
            raise TypeError(
                f"model must return a tensor, or a tuple, dict or Hugging Face output that holds "
                f"tensors; it returned {type(output).__name__}."
            )
        for tensor in found:
            value = self.flow[tensor]
            if value is not None:
                self._output_free |= value.free
                self.flow.uses[value] += 1

    def is_gate(self, call: Call) -> bool:
        """Whether an activation reaches the output only as a factor of other tensors."""
        return bool(call.bit & self.flow.gated & ~self._output_free)

    def idle(self) -> list[str]:
        """Names of the activation modules that were not called."""
        held = [name for name, module in self.owners.items() if name and is_activation(module)]
        return [name for name in held if self.owners[name] not in self._owners]

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
        name, pointwise = rules.facts(func)
        turn = None
        if name == SUM and not self._muted and is_whole_sum(*args[:2]):
            turn = self._turn(sum_spot, SUM)
        known: dict[int, tuple[Tensor, Value]] = {}
        for leaf in tree_leaves((args, kwargs)):
            value = self.flow[leaf]
            if value is not None:
                known[id(leaf)] = (leaf, value)
        if not known:
            return func(*args, **kwargs)
        if not rules.is_known(func, name):
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out  # its parts have been seen one by one
        call = None
        if name in FUNCTIONS and not self._muted:  # called past the function mode (TorchScript)
            call = self.begin(name.removesuffix("_forward").strip("_"), args[0])
        shapes = {key: tensor.shape for key, (tensor, _) in known.items()}
        out = func(*args, **kwargs)
        outs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if name in rules.CONSTANTS:
            for leaf in outs:
                self.flow.forget(leaf)
            return out
        traces = {key: value.trace for key, (_, value) in known.items()}
        op = Op(func, name, args, kwargs, outs, traces, shapes)
        values = [value for _, value in known.values()]
        steps = self.flow.step(op, known, pointwise=pointwise, owner=self._owner().name or "")
        for leaf, value in zip(outs, steps, strict=True):
            residual = turn is not None and is_residual(op, values, value)
            self.flow[leaf] = self._add_sum(turn, value) if turn and residual else value
            if func._schema.is_mutable and leaf._base is not None:
                self.flow.write_through(leaf._base, value)
        if call is not None:
            self.end(call, out)
        elif not self._muted and steps:
            written = written_out(op, values, steps[0])
            if written is not None:
                self._end_written(name, written, outs[0])
        return out

    def _end_written(self, name: str, written: Written, output: Tensor) -> None:
        """Note an activation that is written out, and that the calls in it are parts of it."""
        parts = [call for call in self.calls if call.value in written.parts | {written.given}]
        parts = [call for call in parts if self._is_part(call, written)]
        for frame in self._frames:
            frame.calls = [call for call in frame.calls if call not in parts]
        self.calls = [call for call in self.calls if call not in parts]
        turn = self._turn(lambda _: "it is written out", name)
        kind = "+".join([*(call.kind for call in parts), name])
        call = Call(next(self.flow.clock), turn, kind, written.given, written=written)
        self.calls.append(call)
        self._frames[-1].calls.append(call)
        if written.given.total is not None:
            self.sums[written.given.total].before_activation = True
        self.end(call, output)

    def _is_part(self, call: Call, written: Written) -> bool:
        return any(call.bit & part.depends for part in written.parts)

    def _add_sum(self, turn: Turn, value: Value) -> Value:
        now = next(self.flow.clock)
        value = replace(value, total=now)
        self.sums[now] = Sum(now, turn, value)
        return value

    # ------------------------------------------------------------------------------ activations

    def begin(self, name: str, tensor: object, frame: Frame | None = None) -> Call | None:
        """Note an activation call that is about to run; None if its input is constant.

        Args:
            name: What the owner's code calls it.
            tensor: Its input.
            frame: The activation module, None for a functional call.
        """
        turn = (frame and frame.turn) or self._turn(function_spot, name)
        value = self.flow[tensor]
        if value is None:
            name = frame.name if frame and frame.name else f"{turn.owner}::{turn.name}"
            self.constants.append(name)
            return None
        call = Call(
            time=next(self.flow.clock),
            turn=turn,
            kind=frame.kind if frame else name,
            value=value,
            module=frame.module if frame and frame.name else None,
        )
        self.calls.append(call)
        if frame is None:
            self._frames[-1].calls.append(call)
            given = self.flow[handed(self._owner().module)]
            call.first_input = given is None or given.root == value.root
        if value.total is not None:
            self.sums[value.total].before_activation = True
        return call

    def end(self, call: Call, output: object) -> None:
        """Note what an activation call returned."""
        call.bit = self.flow.new_bit(call.value)
        for tensor in tensors_in(output):
            self.flow.activate(tensor, call.bit, call.value)

    def _turn(self, find: Callable[[nn.Module], Spot | str], name: str) -> Turn:
        """The call or sum that is about to run, named by the code of its owner if that is seen."""
        owner = self._owner()
        spot = find(owner.module)
        if isinstance(spot, Spot):
            name = spot.name
        # Names that the code does not give are counted apart: rewritten code does not meet them.
        key = name if isinstance(spot, Spot) else f"{name}?"
        owner.turns[key] += 1
        return Turn(owner.name or "", owner.kind, f"{name}[{owner.turns[key] - 1}]", spot)

    # ---------------------------------------------------------------------------------- modules

    def _owner(self) -> Frame:
        """The innermost running module that the model holds."""
        return next(frame for frame in reversed(self._frames) if frame.name is not None)

    def _enter(self, module: nn.Module, args: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        tensor = args[0] if args and isinstance(args[0], Tensor) else None
        name = self.names.get(module)
        activates = not self._muted and name != "" and is_activation(module)
        frame = Frame(
            module,
            name,
            next(self.flow.clock),
            self.flow[tensor],
            None if tensor is None else tensor.shape,
            mutes=activates or is_operator(module),
        )
        if name and not self._muted and not is_operator(module):
            owner = self._owner()
            if (
                module in owner.ran
                or self._owners.setdefault(module, owner.name or "") != owner.name
            ):
                self.repeated.add(module)
            owner.ran.add(module)
            frame.turn = self._turn(module_spot, frame.short)
        if activates and args:
            frame.active = self.begin(frame.short, tensor, frame)
        if self._is_place(frame) and frame.value and tensor is not None:
            self._add_place(frame, "in", tensor, None)
        self._muted += frame.mutes
        self._frames.append(frame)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        while True:  # also drops the frames of modules that raised inside a `try` of the model
            frame = self._frames.pop()
            self._muted -= frame.mutes
            if frame.module is module:
                break
        if is_operator(module) and frame.value and isinstance(output, Tensor):
            self.flow[output] = frame.value  # to the network an operator is the identity
        if not self._muted:
            self._note_activation(frame, args, output)
        if not self._is_place(frame):
            return
        several = isinstance(output, (tuple, list))
        for i, leaf in enumerate(output if several else (output,)):
            value = self.flow[leaf]
            if value is None:
                continue
            place = self._add_place(frame, "out", leaf, i if several else None)
            # The innermost module that made a sum and returns it gives it its name.
            total = None if value.total is None else self.sums[value.total]
            if total is not None and total.place is None and total.time > frame.start:
                total.place = place

    def _note_activation(self, frame: Frame, args: Any, output: object) -> None:
        if frame.mutes and not args and not is_operator(frame.module):
            # Called by keyword, which a global hook cannot see: known by its output alone.
            frame.active = self.begin(frame.short, output, frame)
            if frame.active is not None:
                frame.active.first_input = False
        elif self._wraps_activation(frame, output):
            self.calls = [call for call in self.calls if call not in frame.calls]
            frame.active = self.begin(frame.short, output, frame)
            if frame.active is not None and frame.value is not None:
                frame.active.time, frame.active.value = frame.start, frame.value
                self.calls.sort(key=lambda call: call.time)
                if frame.value.total is not None:
                    self.sums[frame.value.total].before_activation = True
        if frame.active is not None:
            self.end(frame.active, output)

    def _wraps_activation(self, frame: Frame, output: object) -> bool:
        """A leaf module that is an elementwise function around an activation is one itself."""
        value = self.flow[output]
        return (
            bool(frame.name)
            and bool(frame.calls)
            and all(is_operator(child) for child in frame.module.children())
            and frame.value is not None
            and value is not None
            and (value.root == frame.value.root or _normalises(frame, value))
            and isinstance(output, Tensor)
            and output.shape == frame.shape
        )

    def _is_place(self, frame: Frame) -> bool:
        return (
            bool(frame.name)
            and not self._muted
            and not isinstance(frame.module, CONTAINERS)
            and not is_operator(frame.module)
        )

    def _add_place(self, frame: Frame, side: str, tensor: Tensor, index: int | None) -> Place:
        value = self.flow[tensor]
        if value is None:
            raise AssertionError("a place has an input-dependent tensor")
        time = frame.start if side == "in" else next(self.flow.clock)
        place = Place(time, frame.module, side, index, value)
        if tensor.is_floating_point():
            self.places.append(place)
        return place


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
        probe = self.probe
        if probe._muted:
            return func(*args, **kwargs)
        given, other = first_two(name, args, kwargs)
        swapped = name in EXTREMES and rectifies(name, other, given, probe.flow)
        if name not in FUNCTIONS and not (swapped or rectifies(name, given, other, probe.flow)):
            if name in EXTREMES | CLAMPS:
                probe._turn(function_spot, name)  # no activation, but the code calls it the same
            return func(*args, **kwargs)
        call = probe.begin(name, other if swapped else given)
        if call is not None and swapped:
            call.first_input = False
        probe._muted += 1
        try:
            output = func(*args, **kwargs)
        finally:
            probe._muted -= 1
        if call is not None:
            probe.end(call, output)
        return output


def _normalises(frame: Frame, value: Value) -> bool:
    """Whether a module's result, `value`, is its own input activated and normalised (EvoNorm)."""
    given = frame.value
    return (
        given is not None
        and value.maker == given.maker
        and [call.value for call in frame.calls if call.written] == [given]
    )
